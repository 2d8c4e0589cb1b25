"""Exports, run by the runtimes that they are for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from bundles import pointwise_bundle, small_unet_bundle, spoil
from safetensors.torch import save_file

from wsi_pipeline.bundle import Bundle, bundle_toml, load_bundle
from wsi_pipeline.errors import BundleError
from wsi_pipeline.networks import build, create
from wsi_pipeline.networks.check import random_patches, run, with_patch_size
from wsi_pipeline.networks.checkpoints import init_model
from wsi_pipeline.networks.program import export_onnx, export_torch
from wsi_pipeline.networks.weights import kept_state

MODELS = Path(__file__).parents[1] / "models"


def small_bundle(name: str, folder: Path) -> Bundle:
    """Return a bundle like one of the repository's with small patches and random weights."""
    like = load_bundle(MODELS / name)
    with torch.device("meta"):
        side = 2 * create(like).size_multiple
    bundle = with_patch_size(like, (side,))
    torch.manual_seed(0)
    network = create(bundle)
    for layer in network.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    folder.mkdir()
    save_file(kept_state(network), folder / "model.safetensors")
    text = bundle_toml(bundle, weights="model.safetensors")
    (folder / "model.toml").write_text(text, "utf-8")
    return load_bundle(folder)


EACH = pytest.mark.parametrize(
    "name",
    [
        "nmtnet-ultrasound",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "lightmuseg-bcss-demo",
                "mm3d-unet-dcemri",
                "highres-unet-mammography",
                "swish-unet-breast",
            )
        ),
    ],
)


@EACH
def test_onnx_gives_the_networks_logits_mask_first(tmp_path: Path, name: str) -> None:
    bundle = small_bundle(name, tmp_path / "bundle")
    difference = export_onnx(bundle, tmp_path / "out" / "network.onnx")
    assert 0 < difference < 1e-5
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["network.onnx"]
    model = onnx.load(tmp_path / "out" / "network.onnx")
    onnx.checker.check_model(model, full_check=True)
    (about,) = model.metadata_props
    assert about.key == "model.toml"
    assert f'name = "{bundle.name}"' in about.value
    session = onnxruntime.InferenceSession(model.SerializeToString())
    patches = random_patches(bundle, 3)
    expected = run(build(bundle).module, patches)
    assert [o.name for o in session.get_outputs()] == list(expected)
    assert next(iter(expected)) == "mask"
    answer = session.run(None, {"patches": patches.numpy()})
    for logits, ours in zip(answer, expected.values(), strict=True):
        scale = float(ours.abs().max())
        torch.testing.assert_close(torch.from_numpy(logits), ours, rtol=0, atol=1e-5 * scale)


@EACH
def test_an_exported_program_is_a_bundle_that_answers_the_same(tmp_path: Path, name: str) -> None:
    bundle = small_bundle(name, tmp_path / "bundle")
    (bundle.path / "README.md").write_text("# Card\n\nLimits.\n", "utf-8")
    assert 0 < export_torch(bundle, tmp_path / "program") < 1e-5
    exported = load_bundle(tmp_path / "program")
    assert (exported.name, exported.network) == (bundle.name, "exported")
    assert (exported.input, exported.classes, exported.labels) == (
        bundle.input,
        bundle.classes,
        bundle.labels,
    )
    card = (tmp_path / "program" / "README.md").read_text("utf-8")
    assert card.startswith("# Card\n\nLimits.\n")
    assert bundle.weights_sha256 in card
    network = build(exported)
    assert network.batch_size is None
    patches = random_patches(bundle, 3)
    expected = run(build(bundle).module, patches)
    for name_, logits in run(network.module, patches).items():
        scale = float(expected[name_].abs().max())
        torch.testing.assert_close(logits, expected[name_], rtol=0, atol=1e-5 * scale)


def test_a_batch_size_can_be_fixed(tmp_path: Path) -> None:
    bundle = load_bundle(small_unet_bundle(tmp_path / "bundle"))
    export_torch(bundle, tmp_path / "program", batch_size=1)
    assert build(load_bundle(tmp_path / "program")).batch_size == 1


def test_a_batch_size_can_be_fixed_in_onnx(tmp_path: Path) -> None:
    bundle = load_bundle(small_unet_bundle(tmp_path / "bundle"))
    export_onnx(bundle, tmp_path / "network.onnx", batch_size=1)
    (patches,) = onnxruntime.InferenceSession(tmp_path / "network.onnx").get_inputs()
    assert patches.shape == [1, 3, 32, 32]


def test_a_program_that_differs_is_not_written(tmp_path: Path) -> None:
    folder = small_unet_bundle(tmp_path / "bundle")
    spoil(folder)
    with pytest.raises(BundleError, match=r"differs from the network by .*; not written"):
        export_torch(load_bundle(folder), tmp_path / "program")
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_full_disk_ends_in_a_sentence(tmp_path: Path, least_room: Any) -> None:
    bundle = load_bundle(small_unet_bundle(tmp_path / "bundle"))
    writers: tuple[Callable[[Bundle, Path], object], ...] = (export_torch, export_onnx, init_model)
    for write in writers:
        with least_room(4000), pytest.raises(BundleError, match=r"cannot write .*out"):
            write(bundle, tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_what_is_there_stays(tmp_path: Path) -> None:
    bundle = load_bundle(small_unet_bundle(tmp_path / "bundle"))
    (tmp_path / "network.onnx").write_text("mine", "utf-8")
    with pytest.raises(BundleError, match=r"is there already; .*--overwrite"):
        export_onnx(bundle, tmp_path / "network.onnx")
    assert (tmp_path / "network.onnx").read_text("utf-8") == "mine"
    with pytest.raises(BundleError, match="is there already"):
        export_onnx(bundle, tmp_path / "bundle", overwrite=True)
    with pytest.raises(BundleError, match="is there already"):
        export_torch(bundle, tmp_path / "bundle")


def test_there_must_be_a_network_with_weights(tmp_path: Path) -> None:
    program = load_bundle(pointwise_bundle(tmp_path / "program", mpp=0.5))
    untrained = load_bundle(MODELS / "nmtnet-mri")
    for write in (export_onnx, export_torch):
        with pytest.raises(BundleError, match="is a program already"):
            write(program, tmp_path / "out")
        with pytest.raises(BundleError, match="no weights"):
            write(untrained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_onnx_without_its_packages_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsi_pipeline.networks.program.ONNX_PACKAGES", ("onnx", "no_such_package"))
    bundle = load_bundle(small_unet_bundle(tmp_path / "bundle"))
    with pytest.raises(BundleError, match=r'no no_such_package here: pip install "wsi-pipeline'):
        export_onnx(bundle, tmp_path / "network.onnx")
