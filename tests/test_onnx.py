"""ONNX files as models: the pipeline says what onnxruntime says by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import zarr
from bundles import THRESHOLDS, pointwise_bundle, small_unet_bundle, write_toml
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from wsi_pipeline.bundle import Bundle, load_bundle
from wsi_pipeline.cli import group
from wsi_pipeline.errors import BundleError
from wsi_pipeline.inference.predictor import Predictor, choose_dtype
from wsi_pipeline.networks import build
from wsi_pipeline.networks.check import random_patches, run
from wsi_pipeline.networks.program import export_onnx

OPSETS = [helper.make_opsetid("", 18)]


def onnx_bundle(
    folder: Path,
    *,
    shape: tuple[int | str, ...] = ("n", 3, "h", "w"),
    last: bool = False,
    kind: int = TensorProto.FLOAT,
    classes: int = 3,
    options: str = "",
) -> Path:
    """Write a bundle of patches of 32 × 32 whose file sorts pixels as `classify` does."""
    number = helper.tensor_dtype_to_np_dtype(kind)
    low, high = (50 * (threshold - 0.5) / 255 for threshold in THRESHOLDS)
    # Lines over green, each the highest where its class is.
    slopes, bias = np.array([100, 0, 50]), np.array([-low - high, 0, -low])
    weights = np.outer([0, 1, 0], slopes)[:, :classes].astype(number)
    nodes = [
        helper.make_node("Transpose", ["patches"], ["moved"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["patches" if last else "moved", "weights"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["logits" if last else "sum"]),
        helper.make_node("Transpose", ["sum"], ["logits"], perm=[0, 3, 1, 2]),
    ][1 if last else 0 : 3 if last else 4]
    graph = helper.make_graph(
        nodes,
        "sorts",
        [helper.make_tensor_value_info("patches", kind, shape)],
        [helper.make_tensor_value_info("logits", kind, [None] * 4)],
        [
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(bias[:classes].astype(number), "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=9)
    write_toml(
        folder, mpp=0.25, patch_size=32, overlap=8, network='"onnx"', weights='"model.onnx"',
        network_options=options,
    )  # fmt: skip
    onnx.save(model, folder / "model.onnx")
    return folder


def by_hand(bundle: Bundle, patches: torch.Tensor) -> np.ndarray:
    """Return the classes that onnxruntime says of patches (N, C, H, W), one by one."""
    session = onnxruntime.InferenceSession(bundle.path / "model.onnx")
    given = session.get_inputs()[0]
    is_last, number = given.shape[-1] == 3, {"tensor(float16)": np.float16}.get(given.type)
    found = []
    for patch in patches.numpy()[:, None]:
        shown = np.moveaxis(patch, 1, -1) if is_last else patch
        count = given.shape[0] if isinstance(given.shape[0], int) else 1
        shown = np.repeat(shown, count, axis=0).astype(number or np.float32)
        logits = session.run(None, {given.name: shown})[0][:1]
        found.append(logits.argmax(-1 if is_last else 1)[0])
    return np.stack(found)


@pytest.mark.parametrize(
    ("shape", "last", "kind"),
    [
        (("n", 3, "h", "w"), False, TensorProto.FLOAT),
        ((1, 3, 32, 32), False, TensorProto.FLOAT),
        ((3, 3, 32, 32), False, TensorProto.FLOAT),
        (("n", "h", "w", 3), True, TensorProto.FLOAT),
        ((2, 32, 32, 3), True, TensorProto.FLOAT16),
    ],
)
def test_classes_are_those_of_onnxruntime_by_hand(
    tmp_path: Path, shape: tuple[int | str, ...], last: bool, kind: int
) -> None:
    bundle = load_bundle(onnx_bundle(tmp_path / "m", shape=shape, last=last, kind=kind))
    fixed = shape[0] if isinstance(shape[0], int) else None
    assert build(bundle).batch_size == fixed
    region = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    origins = np.array([[0, 0], [5, 40], [38, 58], [11, 3], [20, 20]])
    predictor = Predictor(bundle, device="cpu", threads=2)
    found = [p.numpy() for p in predictor.predict(predictor.upload(region), origins)]
    assert f"onnxruntime {onnxruntime.__version__} (CPU)" in predictor.how
    predictor.close()
    cut = np.stack([region[y : y + 32, x : x + 32] for y, x in origins])
    patches = torch.from_numpy(cut.astype(np.float32) / 255).movedim(-1, 1)
    expected = by_hand(bundle, patches)
    assert len(np.unique(expected)) == 3
    np.testing.assert_array_equal(np.stack(found).argmax(1), expected)
    np.testing.assert_allclose(np.stack(found).sum(1), 1, rtol=1e-5)


def test_an_export_of_ours_is_a_model_that_says_what_it_is(tmp_path: Path) -> None:
    ours = load_bundle(small_unet_bundle(tmp_path / "ours"))
    export_onnx(ours, tmp_path / "network.onnx", batch_size=2)
    arguments = ["models", "import", str(tmp_path / "network.onnx"), "-o", str(tmp_path / "theirs")]
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 0, result.output
    theirs = load_bundle(tmp_path / "theirs")
    assert (theirs.name, theirs.network) == ("theirs", "onnx")
    assert (theirs.input, theirs.classes) == (ours.input, ours.classes)
    network = build(theirs)
    assert network.batch_size == 2
    patches = random_patches(ours, 2)
    expected, found = (run(m, patches)["mask"] for m in (build(ours).module, network.module))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    for command in ("check", "show"):
        assert CliRunner().invoke(group, ["models", command, str(theirs.path)]).exit_code == 0


def test_numbers_that_lie_beside_are_read_by_the_import_alone(tmp_path: Path) -> None:
    whole = onnx_bundle(tmp_path / "whole")
    model = onnx.load(whole / "model.onnx")
    onnx.save(
        model, tmp_path / "parts.onnx", save_as_external_data=True, location="parts.data",
        size_threshold=0,
    )  # fmt: skip
    apart = onnx_bundle(tmp_path / "apart")
    for name in ("parts.onnx", "parts.data"):
        (apart / name).write_bytes((tmp_path / name).read_bytes())
    (apart / "model.onnx").unlink()
    (apart / "parts.onnx").rename(apart / "model.onnx")
    with pytest.raises(BundleError, match=r"model\.onnx: it keeps 'weights' in another file"):
        build(load_bundle(apart))
    arguments = ["models", "import", str(tmp_path / "parts.onnx"), "-o", str(tmp_path / "one")]
    arguments += ["--classes", "Background,Tumor,Stroma", "--mpp", "0.5", "--patch-size", "32"]
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 0, result.output
    bundle = load_bundle(tmp_path / "one")
    patches = random_patches(bundle, 1)
    found = [run(build(load_bundle(path)).module, patches)["mask"] for path in (whole, bundle.path)]
    assert torch.equal(*found)
    assert sorted(p.name for p in bundle.path.iterdir()) == [
        "README.md", "model.onnx", "model.toml"
    ]  # fmt: skip
    model = onnx.load(tmp_path / "parts.onnx", load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../parts.data"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "out.onnx").write_bytes(model.SerializeToString())
    arguments[2], arguments[4] = str(tmp_path / "in" / "out.onnx"), str(tmp_path / "two")
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 1
    assert "cannot read" in result.output
    assert not (tmp_path / "two").exists()


def test_what_does_not_fit_is_said_and_by_name(tmp_path: Path) -> None:
    def told(folder: str, **changes: object) -> str:
        with pytest.raises(BundleError) as caught:
            build(load_bundle(onnx_bundle(tmp_path / folder, **changes)))
        return str(caught.value)

    assert "mask (1, 2, 32, 32); activation, classes" in told("few", classes=2)
    assert "its input is ['n', 3, 64, 64]; channels and patch_size" in told(
        "size", shape=("n", 3, 64, 64)
    )
    assert "set network_options.layout to channels_first" in told("any", shape=("n", "c", "h", "w"))
    assert "is a tensor(int32); may be tensor(float)" in told("ints", kind=TensorProto.INT32)
    assert "layout is 'NCHW'; expected channels_first" in told("word", options='layout = "NCHW"')
    known = onnx_bundle(
        tmp_path / "told", shape=("n", "c", "h", "w"), options='layout = "channels_first"'
    )
    assert build(load_bundle(known)).batch_size is None


def test_custom_operators_and_what_is_no_onnx_are_refused(tmp_path: Path) -> None:
    folder = onnx_bundle(tmp_path / "m")
    model = onnx.load(folder / "model.onnx")
    # also where it hides: in the branch of an If
    branch = helper.make_graph(
        [helper.make_node("Evil", ["bias"], ["b"], domain="their.ops")],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [3])],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    choice = helper.make_node("If", ["yes"], ["c"], then_branch=branch, else_branch=branch)
    model.graph.node.insert(0, choice)
    model.opset_import.append(helper.make_opsetid("their.ops", 1))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"needs the custom operator their\.ops:Evil"):
        build(load_bundle(folder))
    for data in (b"not onnx", b"", (tmp_path / "m" / "model.toml").read_bytes()):
        (folder / "model.onnx").write_bytes(data)
        with pytest.raises(BundleError, match=r"model\.onnx"):
            build(load_bundle(folder))


def test_without_its_packages_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(onnx_bundle(tmp_path / "m"))
    monkeypatch.setattr("wsi_pipeline.networks.onnx.find_spec", lambda name: None)
    with pytest.raises(BundleError, match=r'onnxruntime: pip install "wsi-pipeline\[onnx\]"'):
        build(bundle)


def test_other_number_formats_are_refused(tmp_path: Path) -> None:
    bundle = load_bundle(onnx_bundle(tmp_path / "m"))
    for precision in ("bf16", "int8"):
        with pytest.raises(BundleError, match=f"--precision {precision}: .* is an ONNX file"):
            choose_dtype(precision, torch.device("cpu"), bundle)


def test_a_slide_gets_the_mask_of_the_same_as_torchscript(tmp_path: Path, slide_path: Path) -> None:
    models = {
        "onnx": onnx_bundle(tmp_path / "onnx", shape=(2, 3, 32, 32)),
        "script": pointwise_bundle(tmp_path / "script", mpp=0.25, patch_size=32, overlap=8),
    }
    masks, computed = [], ""
    for name, model in models.items():
        arguments = ["segment", str(slide_path), "--model", str(model), "-o", str(tmp_path / name)]
        arguments += ["--device", "cpu", "--outputs", "zarr", "--tissue", "none"]
        result = CliRunner().invoke(group, arguments)
        assert result.exit_code == 0, result.output
        (told,) = (tmp_path / name).glob("*/run.json")
        computed += str(json.loads(told.read_text("utf-8"))["certificate"])
        masks.append(zarr.open_group(told.parent / "mask.ome.zarr", mode="r")["0"][:])
    assert computed.count("onnxruntime") == 1
    assert len(np.unique(masks[0])) == 3
    np.testing.assert_array_equal(*masks)


@pytest.mark.slow
def test_the_shipped_model_marks_a_slide_alike_as_onnx(tmp_path: Path, cmu_path: Path) -> None:
    shipped = Path(__file__).parents[1] / "models" / "lightmuseg-bcss-demo"
    export_onnx(load_bundle(shipped), tmp_path / "network.onnx")
    arguments = ["models", "import", str(tmp_path / "network.onnx"), "-o", str(tmp_path / "theirs")]
    assert CliRunner().invoke(group, arguments).exit_code == 0
    masks = []
    for model in (shipped, tmp_path / "theirs"):
        output = tmp_path / f"out-{model.name}"
        arguments = ["segment", str(cmu_path), "--model", str(model), "-o", str(output)]
        arguments += ["--device", "cpu", "--precision", "fp32", "--outputs", "zarr"]
        result = CliRunner().invoke(group, arguments)
        assert result.exit_code == 0, result.output
        (mask,) = output.glob("*/mask.ome.zarr")
        masks.append(zarr.open_group(mask, mode="r")["0"][:])
    assert masks[0].any()
    # Sums are rounded differently: a pixel on the border of two classes may fall on either side.
    assert (masks[0] != masks[1]).mean() < 1e-5
