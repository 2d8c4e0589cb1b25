"""Checkpoints in the authors' naming, made here from what is known of them, and damaged ones."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wsi_pipeline.bundle import Bundle, load_bundle
from wsi_pipeline.errors import BundleError
from wsi_pipeline.networks import NETWORKS, build
from wsi_pipeline.networks.checkpoints import import_encoder, import_model, make_template
from wsi_pipeline.networks.encoders import ResNet18, load_imagenet, mobilenet_v2_features

Shapes = dict[str, tuple[int, ...]]
CLASSES = ["Background", "Tumor"]


def norm(name: str, channels: int) -> Shapes:
    vectors = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{v}": (channels,) for v in vectors} | {f"{name}.num_batches_tracked": ()}


def conv(name: str, inputs: int, outputs: int, kernel: int, *, bias: bool = True) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (outputs, inputs, kernel, kernel)}
    return shapes | ({f"{name}.bias": (outputs,)} if bias else {})


def encoder_shapes(prefix: str) -> Shapes:
    """Return torchvision's MobileNetV2 features: MobileNetV2's table 2 and its naming."""
    shapes = conv(f"{prefix}0.0", 3, 32, 3, bias=False) | norm(f"{prefix}0.1", 32)
    table = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]
    index, inputs = 1, 32
    for expansion, outputs, repeats in table:
        for _ in range(repeats):
            hidden, block = inputs * expansion, f"{prefix}{index}.conv."
            if expansion > 1:
                shapes |= conv(f"{block}0.0", inputs, hidden, 1, bias=False)
                shapes |= norm(f"{block}0.1", hidden)
            depthwise, project = ("1", "2") if expansion > 1 else ("0", "1")
            shapes |= conv(f"{block}{depthwise}.0", 1, hidden, 3, bias=False)
            shapes |= norm(f"{block}{depthwise}.1", hidden)
            shapes |= conv(f"{block}{project}", hidden, outputs, 1, bias=False)
            shapes |= norm(f"{block}{int(project) + 1}", outputs)
            index, inputs = index + 1, outputs
    last = conv(f"{prefix}18.0", 320, 1280, 1, bias=False) | norm(f"{prefix}18.1", 1280)
    return shapes | last


def lightmuseg_shapes(classes: int, *, attention: str = "conv7x7", bias: bool = False) -> Shapes:
    """Return the 456 tensors of the authors' network."""
    shapes = encoder_shapes("encoder.")
    for i, c in enumerate((16, 24, 32, 96, 320), start=1):
        name = f"mltslayer{i}"
        for scale, kernel in ((1, 1), (2, 3), (3, 5)):
            shapes |= conv(f"{name}.scale{scale}", c, c, kernel)
        shapes |= conv(f"{name}.reduce_channel", 3 * c, c, 1)
        shapes |= conv(f"{name}.fc1", c, c // 4, 1) | conv(f"{name}.fc2", c // 4, c, 1)
        shapes |= conv(f"{name}.spatialatt.{attention}", 2, 1, 7, bias=bias)
        shapes |= conv(f"{name}.fusion_conv", c, c, 1)
    for level, (a, b) in {5: (320, 96), 4: (96, 32), 3: (32, 24), 2: (24, 16)}.items():
        shapes |= conv(f"s{level}_up_conv.1", a, b, 3) | norm(f"s{level}_up_conv.2", b)
    for name, c in {"lca45": 96, "lca34": 32, "lca23": 24, "lca12": 16}.items():
        shapes[f"{name}.channel_fc.0.weight"] = (c // 4, c)
        shapes[f"{name}.channel_fc.2.weight"] = (c, c // 4)
        shapes |= conv(f"{name}.spatial_fusion", 2 * c, c, 1, bias=False)
    for name, c in {"sideout4": 96, "sideout3": 32, "sideout2": 24}.items():
        shapes |= conv(f"{name}.conv1.conv", c, c // 4, 3) | norm(f"{name}.conv1.bn", c // 4)
        shapes |= conv(f"{name}.conv2", c // 4, 1, 1)
    return shapes | conv("last_conv", 16, classes, 3)


def swish_shapes() -> Shapes:
    """Return the tensors of the Breast-CT authors' light network, 3 channels and 2 classes."""

    def double(name: str, inputs: int, outputs: int) -> Shapes:
        name, middle = f"{name}.double_conv", outputs // 2
        first = conv(f"{name}.0", inputs, middle, 3) | norm(f"{name}.1", middle)
        return first | conv(f"{name}.3", middle, outputs, 3) | norm(f"{name}.4", outputs)

    shapes = double("inc", 3, 64) | conv("outc", 64, 2, 1)
    for i, c in enumerate((64, 128, 256), start=1):
        shapes |= double(f"down{i}.maxpool_conv.1", c, 2 * c)
    for i, c in zip((2, 3, 4), (512, 256, 128), strict=True):
        shapes[f"up{i}.up.weight"] = (c, c // 2, 2, 2)
        shapes[f"up{i}.up.bias"] = (c // 2,)
        shapes |= double(f"up{i}.conv", c, c // 2)
    return shapes


def tensors(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Return random tensors that keep features at unit scale."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        else:
            scale = max(1, torch.Size(shape[1:]).numel()) ** -0.5 if len(shape) > 1 else 0.1
            state[name] = torch.randn(shape, generator=generator) * scale
    return state


@pytest.fixture(scope="module")
def authors() -> dict[str, Tensor]:
    return tensors(lightmuseg_shapes(3))


@pytest.fixture
def template(tmp_path: Path) -> Bundle:
    return make_template(
        folder=tmp_path / "mine",
        network="lightmuseg",
        classes=["Background", "Tumor", "Fat"],
        mpp=0.25,
        patch_size=(64,),
    )


@pytest.fixture
def small(tmp_path: Path) -> Bundle:
    """Return a description of a network so small that it costs no time."""
    bundle = make_template(
        folder=tmp_path / "mine", network="swish_unet", classes=CLASSES, mpp=1.0, patch_size=(16,)
    )
    return dataclasses.replace(bundle, network_options={"channels": 3, "widths": [8, 16]})


@pytest.fixture
def state(small: Bundle) -> dict[str, Tensor]:
    """Return the tensors of the small network."""
    torch.manual_seed(0)
    return dict(NETWORKS["swish_unet"](**small.network_options).state_dict())


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def logits(network: torch.nn.Module, channels: int = 3) -> Tensor:
    patches = torch.randn(2, channels, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        output: Tensor = network(patches)
    return output


def test_the_authors_network_has_456_tensors() -> None:
    names = lightmuseg_shapes(1)
    assert len(names) == 456
    assert len([name for name in names if not name.startswith("sideout")]) == 429


@pytest.mark.parametrize(("attention", "bias"), [("conv7x7", False), ("conv2d", True)])
def test_the_authors_checkpoint_gives_the_same_logits(
    tmp_path: Path, template: Bundle, attention: str, bias: bool
) -> None:
    state = tensors(lightmuseg_shapes(3, attention=attention, bias=bias))
    bundle = import_model(saved(tmp_path / "best.pth", state), template, tmp_path / "mine")
    ours = NETWORKS["lightmuseg"](classes=3).eval()
    for i in range(1, 6):  # by hand, without any loader
        layer = ours.get_submodule(f"mltslayer{i}.spatialatt")
        layer.conv = torch.nn.Conv2d(2, 1, 7, padding=3, bias=bias)
    own = {n.replace(f"spatialatt.{attention}.", "spatialatt.conv."): t for n, t in state.items()}
    with torch.no_grad():
        for name, tensor in ours.state_dict(keep_vars=True).items():
            tensor.copy_(own[name])
    expected = logits(ours)
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits(build(bundle).module), expected, rtol=0, atol=0)


def test_the_bundle_says_what_it_is(
    tmp_path: Path, template: Bundle, authors: dict[str, Tensor]
) -> None:
    checkpoint = saved(tmp_path / "best.pth", authors)
    bundle = import_model(checkpoint, template, tmp_path / "mine")
    assert sorted(p.name for p in bundle.path.iterdir()) == [
        "README.md",
        "model.safetensors",
        "model.toml",
    ]
    assert bundle == load_bundle(tmp_path / "mine")
    assert (bundle.name, bundle.modality, bundle.mpp) == ("mine", "slide", 0.25)
    assert (bundle.input.patch_size, bundle.input.overlap) == ((64, 64), (16, 16))
    assert bundle.activation == "softmax"
    assert [c.name for c in bundle.classes] == ["Background", "Tumor", "Fat"]
    assert bundle.classes[1].color == (200, 0, 0)
    assert bundle.classes[2].color is not None
    names = load_file(bundle.path / "model.safetensors")
    assert not [n for n in names if n.startswith(("sideout", "encoder.18.")) or "tracked" in n]
    card = (bundle.path / "README.md").read_text("utf-8")
    for words in ("best.pth", "lightmuseg", "Tumor, Fat", "Not a medical device", "Not measured"):
        assert words in card


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net.", "_orig_mod.module.model."])
def test_wrappers_names_are_taken_off(
    tmp_path: Path, small: Bundle, state: dict[str, Tensor], prefix: str
) -> None:
    wrapped = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    bundle = import_model(saved(tmp_path / "best.pth", wrapped), small, tmp_path / "mine")
    for name, tensor in load_file(bundle.path / "model.safetensors").items():
        assert torch.equal(tensor, state[name]), name


def test_a_prefix_of_some_names_only_is_refused(
    tmp_path: Path, small: Bundle, state: dict[str, Tensor]
) -> None:
    mixed = {f"module.{n}" if "outc" in n else n: t for n, t in state.items()}
    with pytest.raises(BundleError, match=r"missing outc\.weight.*unexpected module\.outc\.weight"):
        import_model(saved(tmp_path / "best.pth", mixed), small, tmp_path / "mine")


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "weights"])
def test_checkpoints_of_trainers_are_read(
    tmp_path: Path, small: Bundle, state: dict[str, Tensor], key: str
) -> None:
    whole = {
        "epoch": 3,
        key: OrderedDict(state),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
        "rng": torch.zeros(4, dtype=torch.uint8),
    }
    import_model(saved(tmp_path / "last.ckpt", whole), small, tmp_path / "mine")


def test_the_key_decides_between_several(
    tmp_path: Path, small: Bundle, state: dict[str, Tensor]
) -> None:
    other = {name: tensor + 1 for name, tensor in state.items()}
    path = saved(tmp_path / "c.pt", {"student": state, "ema": {"model": other}})
    with pytest.raises(BundleError, match=r"under student, ema\.model; `models import --key`"):
        import_model(path, small, tmp_path / "mine")
    with pytest.raises(BundleError, match=r"under 'teacher'; it does under student, ema\.model"):
        import_model(path, small, tmp_path / "mine", key="teacher")
    bundle = import_model(path, small, tmp_path / "mine", key="ema.model")
    name = "outc.weight"
    assert torch.equal(load_file(bundle.path / "model.safetensors")[name], other[name])


def test_safetensors_are_known_by_their_content(
    tmp_path: Path, small: Bundle, state: dict[str, Tensor]
) -> None:
    save_file(state, tmp_path / "best.pth")
    import_model(tmp_path / "best.pth", small, tmp_path / "mine")


def test_the_projects_own_weights_come_in_too(tmp_path: Path, template: Bundle) -> None:
    network = NETWORKS["lightmuseg"](classes=3)
    import_model(saved(tmp_path / "own.pt", network.state_dict()), template, tmp_path / "mine")


@pytest.mark.parametrize(("count", "activation"), [(1, "sigmoid"), (2, "softmax")])
def test_the_checkpoint_decides_how_two_classes_come(
    tmp_path: Path, count: int, activation: str
) -> None:
    template = make_template(
        folder=tmp_path / "mine", network="lightmuseg", classes=CLASSES, mpp=0.5
    )
    path = saved(tmp_path / "best.pth", tensors(lightmuseg_shapes(count)))
    bundle = import_model(path, template, tmp_path / "mine")
    assert (bundle.activation, bundle.network_options["classes"]) == (activation, count)


def test_the_light_u_net_of_breast_ct_comes_in(tmp_path: Path) -> None:
    template = make_template(
        folder=tmp_path / "mine",
        network="swish_unet",
        classes=["Background", "Lesion"],
        mpp=1.0,
        patch_size=(64,),
    )
    state = tensors(swish_shapes())
    bundle = import_model(saved(tmp_path / "light.pth", state), template, tmp_path / "mine")
    ours = NETWORKS["swish_unet"](classes=2).eval()
    ours.load_state_dict(state)
    assert torch.equal(logits(build(bundle).module), logits(ours))


# -- what is refused --------------------------------------------------------------------------


def damaged(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    changed = state | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in changed.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"last_conv__bias": None}, r"missing last_conv\.bias$"),
        ({"decoder__stranger": torch.ones(3)}, r"unexpected decoder\.stranger$"),
        (
            {"lca12__spatial_fusion__weight": torch.ones(16, 31, 1, 1)},
            r"misshapen lca12\.spatial_fusion\.weight 16×31×1×1 for 16×32×1×1$",
        ),
        (
            {
                "last_conv__bias": None,
                "decoder__stranger": torch.ones(3),
                "mltslayer1__fc1__bias": torch.ones(5),
            },
            r"missing last_conv\.bias; unexpected decoder\.stranger; "
            r"misshapen mltslayer1\.fc1\.bias 5 for 4$",
        ),
        ({"mltslayer1__fc1__bias": torch.tensor([1, 2, 3, float("nan")])}, "not finite"),
        ({"mltslayer1__fc1__bias": torch.ones(4).to_sparse()}, "not plain arrays"),
        ({"mltslayer1__fc1__bias": torch.ones(4, dtype=torch.complex64)}, "not plain arrays"),
        # an attention with a batch norm is another one than ours
        (
            tensors(norm("mltslayer1.spatialatt.bn", 1)),
            r"missing mltslayer1\.spatialatt\.conv\.weight; unexpected",
        ),
        (
            {"mltslayer1__spatialatt__conv7x7__weight": torch.ones(1, 2, 4, 4)},
            r"missing mltslayer1\.spatialatt\.conv\.weight; unexpected",
        ),
    ],
    ids=["missing", "surplus", "shape", "all", "nan", "sparse", "complex", "bn", "even"],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path,
    template: Bundle,
    authors: dict[str, Tensor],
    changes: dict[str, Tensor | None],
    message: str,
) -> None:
    path = saved(tmp_path / "best.pth", damaged(authors, **changes))
    with pytest.raises(BundleError, match=message):
        import_model(path, template, tmp_path / "mine")
    assert not list(tmp_path.glob("*mine*"))


def test_unused_tensors_may_lack_and_may_have_any_shape(
    tmp_path: Path, template: Bundle, authors: dict[str, Tensor]
) -> None:
    state = {n: t for n, t in authors.items() if not n.startswith("encoder.18.")}
    state["sideout4.conv2.weight"] = torch.ones(9)
    import_model(saved(tmp_path / "best.pth", state), template, tmp_path / "mine")


def test_many_names_are_cut(tmp_path: Path, template: Bundle) -> None:
    path = saved(tmp_path / "best.pth", {"a": torch.ones(1), "b": torch.ones(2)})
    with pytest.raises(BundleError, match=r"missing encoder\.0.* and \d+ more; unexpected a, b$"):
        import_model(path, template, tmp_path / "mine")


def test_another_number_of_classes_is_refused(
    tmp_path: Path, template: Bundle, authors: dict[str, Tensor]
) -> None:
    path = saved(tmp_path / "five.pth", tensors(lightmuseg_shapes(5)))
    with pytest.raises(BundleError, match=r"misshapen last_conv\.weight 5×16×3×3 for 3×16×3×3"):
        import_model(path, template, tmp_path / "mine")


def test_a_folder_that_is_taken_stays_as_it_is(
    tmp_path: Path, small: Bundle, state: dict[str, Tensor]
) -> None:
    path, folder = saved(tmp_path / "best.pth", state), tmp_path / "mine"
    import_model(path, small, folder)
    (folder / "README.md").write_text("filled in", "utf-8")
    with pytest.raises(BundleError, match=r"is there already.*--overwrite"):
        import_model(path, small, folder)
    assert (folder / "README.md").read_text("utf-8") == "filled in"
    import_model(path, small, folder, overwrite=True)
    assert (folder / "README.md").read_text("utf-8") != "filled in"


def test_a_bundle_may_be_imported_onto_itself(
    tmp_path: Path, small: Bundle, state: dict[str, Tensor]
) -> None:
    folder = tmp_path / "mine"
    bundle = import_model(saved(tmp_path / "best.pth", state), small, folder)
    again = import_model(folder / "model.safetensors", bundle, folder, overwrite=True)
    assert again.weights_sha256 == bundle.weights_sha256


# -- templates --------------------------------------------------------------------------------


def test_a_bundle_can_be_like_another(tmp_path: Path, template: Bundle) -> None:
    told = replace(template, limits="of its weights", temperature=1.5)
    like = make_template(folder=tmp_path / "new", like=told, patch_size=(96, 128))
    assert (like.name, like.limits, like.temperature) == ("new", "", 1)
    assert like.classes == template.classes
    assert like.mpp == template.mpp == 0.25
    assert (like.input.patch_size, like.input.overlap) == ((96, 128), (24, 32))
    other = make_template(
        folder=tmp_path / "new", like=template, classes=["Glass", "Fat", "Ink"], mpp=1.0
    )
    assert other.mpp == 1.0
    assert [c.name for c in other.classes] == ["Glass", "Fat", "Ink"]
    assert other.classes[1].color == template.classes[2].color
    assert other.classes[2].color not in (None, other.classes[1].color)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "--like, or by --network"),
        ({"network": "lightmuseg", "mpp": 0.5}, "--like, or by --network"),
        ({"network": "lightmuseg", "classes": CLASSES}, "--like, or by --network"),
        ({"network": "resnet", "classes": CLASSES, "mpp": 0.5}, "no network 'resnet'; there are l"),
        ({"network": "nmtnet", "classes": CLASSES, "mpp": 0.5}, "not made for slides; name a bun"),
        ({"network": "unet3d", "classes": CLASSES, "mpp": 0.5}, "not made for slides"),
        ({"network": "lightmuseg", "classes": CLASSES, "mpp": -1.0}, "above 0"),
        ({"network": "lightmuseg", "classes": ["A"], "mpp": 1.0}, "softmax 2 to 255"),
    ],
)
def test_a_poor_description_is_refused(
    tmp_path: Path, description: dict[str, Any], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        make_template(folder=tmp_path, **description)


def test_programs_take_no_checkpoint(tmp_path: Path, template: Bundle) -> None:
    program = dataclasses.replace(template, network="torchscript")
    with pytest.raises(BundleError, match="a program, which takes no checkpoint"):
        make_template(folder=tmp_path, like=program)


# -- encoders ---------------------------------------------------------------------------------


def test_torchvisions_mobilenet_becomes_a_start_for_training(tmp_path: Path) -> None:
    state = tensors(encoder_shapes("features."))
    classifier = {"classifier.1.weight": torch.ones(9, 4), "classifier.1.bias": torch.ones(9)}
    path = saved(tmp_path / "mobilenet_v2.pth", state | classifier)
    kind, written = import_encoder(path, tmp_path / "encoder")
    assert (kind.name, kind.network) == ("MobileNetV2", "lightmuseg")
    features = mobilenet_v2_features()
    load_imagenet(features, written)
    loaded = features.state_dict()
    assert len(loaded) == len(state) == 312
    for name, tensor in state.items():
        if "tracked" not in name:
            assert torch.equal(loaded[name.removeprefix("features.")], tensor), name


@pytest.mark.parametrize("factor", [math.nan, math.inf, 20])
def test_an_encoder_of_no_real_numbers_is_refused(tmp_path: Path, factor: float) -> None:
    state = {f"features.{n}": t for n, t in mobilenet_v2_features().state_dict().items()}
    first = state["features.0.0.weight"] * factor
    state["features.0.0.weight"] = first.to(torch.int8) if factor == 20 else first
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(BundleError, match=r"0\.0\.weight holds whole numbers, or values that are"):
        import_encoder(tmp_path / "a.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mobilenet_with_the_names_of_old_becomes_the_same_start(tmp_path: Path) -> None:
    state = tensors(encoder_shapes("features."))
    renamed = {}
    for name, tensor in state.items():
        stage, _, layer = name.removeprefix("features.").partition(".")
        if layer.startswith("conv."):
            # all layers in one row, each activation one of them
            now = (
                ["0.0", "0.1", "1", "2"] if stage == "1" else ["0.0", "0.1", "1.0", "1.1", "2", "3"]
            )
            place, _, what = layer.removeprefix("conv.").rpartition(".")
            layer = f"conv.{(0, 1, 3, 4, 6, 7)[now.index(place)]}.{what}"
        renamed[f"features.{stage}.{layer}"] = tensor
    assert len(renamed) == len(state)
    assert not renamed.keys() >= state.keys()
    path = saved(tmp_path / "bottleneck.pt", renamed)
    kind, written = import_encoder(path, tmp_path / "encoder")
    assert kind.name == "MobileNetV2"
    for source in (written, path):
        features = mobilenet_v2_features()
        load_imagenet(features, source)
        for name, tensor in features.state_dict().items():
            if "tracked" not in name:
                assert torch.equal(tensor, state[f"features.{name}"]), name


@pytest.mark.parametrize("prefix", ["", "module.", "encoder."])
def test_resnet18_becomes_one_too(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    state = ResNet18().state_dict() | {"fc.weight": torch.ones(9, 4), "fc.bias": torch.ones(9)}
    path = saved(tmp_path / "r.pth", {f"{prefix}{n}": t for n, t in state.items()})
    kind, written = import_encoder(path, tmp_path / "encoder")
    assert kind.name == "ResNet18"
    other = ResNet18()
    load_imagenet(other, written)
    assert torch.equal(other.state_dict()["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])


def test_an_encoder_is_no_model(tmp_path: Path, template: Bundle) -> None:
    path = saved(tmp_path / "m.pth", tensors(encoder_shapes("features.")))
    with pytest.raises(BundleError, match="MobileNetV2 alone: an encoder, no model"):
        import_model(path, template, tmp_path / "mine")


def test_a_model_is_no_encoder(tmp_path: Path, authors: dict[str, Tensor]) -> None:
    with pytest.raises(BundleError, match="say what it is with --network or --like"):
        import_encoder(saved(tmp_path / "best.pth", authors), tmp_path / "encoder")
