"""A decoder behind a frozen encoder: what it answers, what is refused, and how it is trained."""

from __future__ import annotations

import csv
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import pytest
import torch
import zarr
from bundles import write_toml
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from wsi_pipeline import train
from wsi_pipeline.bundle import bundle_toml, load_bundle
from wsi_pipeline.cli import group
from wsi_pipeline.errors import BundleError, RecipeError
from wsi_pipeline.files.atomic import sha256_of
from wsi_pipeline.files.models import ORIGIN
from wsi_pipeline.inference.predictor import Predictor
from wsi_pipeline.networks import build
from wsi_pipeline.networks.check import random_patches, run
from wsi_pipeline.networks.decoder import Decoder, FrozenEncoder
from wsi_pipeline.networks.program import export_onnx
from wsi_pipeline.run.estimate import model_bytes
from wsi_pipeline.training.recipe import load_recipe

SIDE, STRIDE, FEATURES, PREFIX = 64, 16, 12, 5
OPTIONS = f"classes = 1\nfeatures = {FEATURES}\nstride = {STRIDE}\nwidth = 8"
ONE = '[{ name = "Background" }, { name = "Tumor", color = [200, 0, 0] }]'


class Maps(nn.Module):
    """An encoder that gives maps: one strided convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Conv2d(3, FEATURES, STRIDE, STRIDE)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.embed(x))


class Transformer(nn.Module):
    """A small ViT with a token of the class and four registers, for patches of one size."""

    def __init__(self, side: int = SIDE) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embed = nn.Conv2d(3, FEATURES, STRIDE, STRIDE)
        self.prefix = nn.Parameter(torch.randn(1, PREFIX, FEATURES))
        count = PREFIX + (side // STRIDE) ** 2
        self.places = nn.Parameter(torch.randn(1, count, FEATURES))
        self.norm = nn.LayerNorm(FEATURES)
        self.queries, self.keys, self.values = (nn.Linear(FEATURES, FEATURES) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.prefix.expand(x.shape[0], -1, -1), tokens], 1)
        tokens = tokens + self.places
        x = self.norm(tokens)
        alike = (self.queries(x) @ self.keys(x).transpose(1, 2) / FEATURES**0.5).softmax(2)
        return tokens + alike @ self.values(x)


def decoder_bundle(
    folder: Path,
    encoder: nn.Module,
    *,
    kind: str = "torchscript",
    options: str = "",
    mpp: float = 0.25,
) -> Path:
    """Write a bundle of a decoder with random weights behind an encoder; return its folder."""
    write_toml(
        folder,
        mpp=mpp,
        patch_size=SIDE,
        overlap=0,
        network='"decoder"',
        weights='"model.safetensors"',
        network_options=f"{OPTIONS}\n{options}",
        activation='"sigmoid"',
        classes=ONE,
        mean="[0.7, 0.6, 0.65]",
        std="[0.2, 0.25, 0.15]",
    )
    file = (
        folder
        / {"torchscript": "encoder.pt", "exported": "encoder.pt2", "onnx": "encoder.onnx"}[kind]
    )
    with (folder / "model.toml").open("a", encoding="utf-8") as toml:
        toml.write(f'[encoder]\nnetwork = "{kind}"\nweights = "{file.name}"\n')
    encoder.eval()
    example = torch.rand(2, 3, SIDE, SIDE)
    if kind == "torchscript":
        torch.jit.trace(encoder, example).save(file)
    elif kind == "exported":
        torch.export.save(torch.export.export(encoder, (example,)), file)
    else:
        # PyTorch warns of itself.
        with warnings.catch_warnings(action="ignore"):
            told = {"dynamo": True, "external_data": False, "verbose": False}
            torch.onnx.export(encoder, (example[:1],), file, **told)
    torch.manual_seed(7)
    decoder = Decoder(features=FEATURES, stride=STRIDE, width=8)
    for module in decoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn_like(module.running_mean) / 4
            module.running_var = torch.rand_like(module.running_var) + 0.5
    # So that both classes occur.
    decoder.head.weight.data *= 5
    save_file(decoder.state_dict(), folder / "model.safetensors")
    return folder


def decoded(features: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Return the logits of features, written out layer by layer."""
    x = features
    for place, padding, doubles in ((0, 0, False), (3, 1, True), (7, 1, True), (11, 1, False)):
        x = functional.conv2d(x, state[f"layers.{place}.weight"], padding=padding)
        mean, var, weight, bias = (
            state[f"layers.{place + 1}.{name}"][:, None, None]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        x = (((x - mean) / (var + 1e-5).sqrt()) * weight + bias).clamp(min=0)
        if doubles:
            x = functional.interpolate(x, scale_factor=2, mode="bilinear")
    x = functional.conv2d(x, state["head.weight"], state["head.bias"])
    return functional.interpolate(x, (SIDE, SIDE), mode="bilinear")


def ok(*arguments: str) -> str:
    result = CliRunner().invoke(group, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(
    ("encoder", "options"), [(Maps, ""), (Transformer, f"prefix_tokens = {PREFIX}")]
)
def test_segment_writes_what_encoder_and_decoder_say_by_hand(
    tmp_path: Path, slide_path: Path, encoder: Callable[[], nn.Module], options: str
) -> None:
    model = decoder_bundle(tmp_path / "model", encoder(), options=options)
    ok("segment", str(slide_path), "--model", str(model), "-o", str(tmp_path / "out"),
       "--precision", "fp32", "--device", "cpu", "--probability-mpp", "0.25",
       "--tissue", "none")  # fmt: skip
    (home,) = [path.parent for path in (tmp_path / "out").glob("*/run.json")]
    planes = zarr.open_group(home / "probability.ome.zarr", mode="r")["0"][0]
    program, state = encoder().eval(), load_file(model / "model.safetensors")
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.7, 0.6, 0.65], [0.2, 0.25, 0.15]))
    least, most = 1.0, 0.0
    with openslide.OpenSlide(slide_path) as slide:
        # Patches at the far ends reach back into those before them.
        for y in range(0, slide.dimensions[1] - 2 * SIDE, SIDE):
            for x in range(0, slide.dimensions[0] - 2 * SIDE, SIDE):
                pixels = np.asarray(slide.read_region((x, y), 0, (SIDE, SIDE)))[..., :3]
                patch = torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1)
                with torch.inference_mode():
                    found = program(((patch - mean) / std)[None])
                    if found.ndim == 3:
                        found = found[:, PREFIX:].transpose(1, 2).reshape(1, FEATURES, 4, 4)
                    expected = decoded(found, state).sigmoid()[0, 0].numpy()
                here = planes[y : y + SIDE, x : x + SIDE] / 255
                # A byte holds half a 255th.
                assert np.abs(here - expected).max() <= 0.5 / 255 + 1e-5
                least, most = min(least, expected.min()), max(most, expected.max())
    assert most - least > 0.05


@pytest.mark.parametrize("kind", ["exported", "onnx"])
def test_an_encoder_of_any_kind_and_batch_gives_the_same(tmp_path: Path, kind: str) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    script = load_bundle(decoder_bundle(tmp_path / "script", Maps()))
    other = load_bundle(decoder_bundle(tmp_path / kind, Maps(), kind=kind))
    network = build(other)
    # Both were made for the batch of their example.
    assert network.batch_size == {"exported": 2, "onnx": 1}[kind]
    patches = random_patches(script, 3)
    expected = run(build(script).module, patches)["mask"]
    assert torch.allclose(run(network.module, patches)["mask"], expected, atol=1e-4)
    ok("models", "check", str(other.path))
    with pytest.raises(BundleError, match="is a program already, or works behind one"):
        export_onnx(other, tmp_path / "no.onnx")
    if kind == "onnx":
        with pytest.raises(
            BundleError, match=r"--precision bf16: the encoder of .* is an ONNX file"
        ):
            Predictor(other, device="cpu", precision="bf16")
        assert "its encoder onnxruntime" in Predictor(other, device="cpu", precision="fp32").how


def test_half_precision_reaches_the_encoder_where_asked_for(tmp_path: Path) -> None:
    bundle = load_bundle(decoder_bundle(tmp_path / "model", Maps()))
    probabilities = {}
    for precision in ("fp32", "bf16", "auto"):
        predictor = Predictor(bundle, device="cpu", precision=precision, threads=1)
        pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        (found,) = predictor.predict(predictor.upload(pixels), np.zeros((1, 2), np.int64))
        probabilities[precision] = found.clone()
        predictor.close()
    # Programs are made for single precision: auto keeps to it.
    assert torch.equal(probabilities["auto"], probabilities["fp32"])
    difference = (probabilities["bf16"] - probabilities["fp32"]).abs().max()
    assert 0 < difference < 0.05


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({f"features = {FEATURES}": "features = 13"}, "misshapen layers.0.weight 8×12"),
        (
            {"stride = 16": "stride = 32"},
            r"gives \(1, 12, 4, 4\) of patches \(1, 3, 64, 64\).*2, 2",
        ),
        ({"stride = 16": "stride = 24"}, r"patch_size \[64, 64\] px; decoder takes 2 multiples"),
        ({'weights = "encoder.pt"': 'weights = "gone.pt"'}, "names weights 'gone.pt', which are"),
        ({"[encoder]\nnetwork": "[encoder]\nwidth = 3\nnetwork"}, "width"),
        ({'"decoder"': '"unet"'}, "and .encoder. come together"),
        ({"[network_options]": 'int8 = "i.safetensors"\n[network_options]'}, "int8 are of a net"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, changes: dict[str, str], reason: str
) -> None:
    folder = decoder_bundle(tmp_path / "model", Maps())
    text = (folder / "model.toml").read_text("utf-8")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "model.toml").write_text(text, "utf-8")
    result = CliRunner().invoke(group, ["models", "check", str(folder)])
    assert result.exit_code == 1
    assert re.search(reason, " ".join(result.output.split()))


def test_tokens_of_another_number_are_refused_with_what_was_expected(tmp_path: Path) -> None:
    bundle = load_bundle(
        decoder_bundle(tmp_path / "model", Transformer(), options="prefix_tokens = 1")
    )
    with pytest.raises(BundleError, match=r"gives \(2, 21, 12\) .* or \(2, 17, 12\) of tokens"):
        run(build(bundle).module, random_patches(bundle, 2))


class Listed(Maps):
    """An encoder whose features are the first of a list."""

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        return [torch.tanh(self.embed(x)), x]


class Nested(Maps):
    """An encoder whose features are deeper down."""

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:  # type: ignore[override]
        return (self.embed(x), x), x


def test_features_come_first_in_lists_too_and_no_deeper(tmp_path: Path) -> None:
    folder = decoder_bundle(tmp_path / "model", Maps())
    bundle = load_bundle(folder)
    patches = random_patches(bundle, 2)
    expected = run(build(bundle).module, patches)["mask"]
    torch.jit.script(Listed()).save(folder / "encoder.pt")
    assert torch.equal(run(build(load_bundle(folder)).module, patches)["mask"], expected)
    torch.jit.script(Nested()).save(folder / "encoder.pt")
    result = CliRunner().invoke(group, ["models", "check", str(folder)])
    assert result.exit_code == 1
    assert "failed on a batch (1, 3, 64, 64): expected Tensor" in result.output


def test_an_encoder_on_the_hub_is_named_by_its_https_address(tmp_path: Path) -> None:
    folder = decoder_bundle(tmp_path / "model", Maps())
    text = (folder / "model.toml").read_text("utf-8")
    place = f'{{ url = "hf://owner/name/encoder.onnx", sha256 = "{"0" * 64}" }}'
    for weights, told in (
        ('"hf://owner/name/encoder.onnx"', "is a URL; expected { url = …, sha256 = … }"),
        (place, "of the Hub https://huggingface.co/…/resolve/…"),
    ):
        (folder / "model.toml").write_text(text.replace('"encoder.pt"', weights), "utf-8")
        with pytest.raises(BundleError, match=re.escape(told)):
            load_bundle(folder)


def test_the_encoder_is_part_of_what_a_bundle_is(tmp_path: Path) -> None:
    folder = decoder_bundle(tmp_path / "model", Maps())
    bundle = load_bundle(folder)
    assert load_bundle(shutil.copytree(folder, tmp_path / "same")).digest == bundle.digest
    (tmp_path / "same" / "model.toml").write_text(
        bundle_toml(bundle, weights="model.safetensors", encoder="encoder.pt"), "utf-8"
    )
    assert load_bundle(tmp_path / "same").digest == bundle.digest
    torch.jit.trace(Transformer(), torch.rand(1, 3, SIDE, SIDE)).save(folder / "encoder.pt")
    assert load_bundle(folder).digest != bundle.digest
    with pytest.raises(BundleError, match="has been replaced since this command began"):
        build(bundle)
    # Both weigh in what a run is said to take.
    small = model_bytes(load_bundle(tmp_path / "same")).weights
    size = (tmp_path / "same" / "encoder.pt").stat().st_size
    assert small > size > 0
    facts = json.loads(ok("models", "show", str(folder), "--json"))
    assert facts["encoder"]["sha256"] == load_bundle(folder).encoder.weights_sha256
    assert "torchscript, " in ok("models", "show", str(folder))


def test_an_encoder_of_code_is_not_run_where_it_was_fetched(tmp_path: Path) -> None:
    folder = decoder_bundle(tmp_path / "model", Maps())
    (folder / ORIGIN).write_text('{"url": "https://example.com/model.zip"}', "utf-8")
    with pytest.raises(
        BundleError, match=r"encoder\.pt, from .*model\.zip, is a program, and none"
    ):
        load_bundle(folder)
    text = (folder / "model.toml").read_text("utf-8")
    entry = f'{{ url = "https://example.com/e.pt", sha256 = "{"0" * 64}" }}'
    (folder / "model.toml").write_text(text.replace('"encoder.pt"', entry), "utf-8")
    with pytest.raises(
        BundleError, match=r"the file that it names, from .* is a program, and none"
    ):
        load_bundle(folder)


def test_models_add_keeps_the_encoder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = decoder_bundle(tmp_path / "kept", Maps())
    ok("models", "add", str(folder))
    assert load_bundle("test-kept").digest == load_bundle(folder).digest


def test_an_encoder_is_fetched_by_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = decoder_bundle(tmp_path / "model", Maps())
    digest = load_bundle(folder).digest
    (folder / "encoder.pt").rename(tmp_path / "elsewhere.pt")
    text, url = (folder / "model.toml").read_text("utf-8"), (tmp_path / "elsewhere.pt").as_uri()
    entry = f'{{ url = "{url}", sha256 = "{sha256_of(tmp_path / "elsewhere.pt")}" }}'
    (folder / "model.toml").write_text(text.replace('"encoder.pt"', entry), "utf-8")
    assert load_bundle(folder).digest == digest
    build(load_bundle(folder))


# -- training -----------------------------------------------------------------------------------

RECIPE = f"""
notices = "Encoder: ours, CC0."

[bundle]
name = "behind"
modality = "slide"
network = "decoder"
network_options = {{ features = {FEATURES}, stride = {STRIDE}, width = 16 }}

[bundle.encoder]
network = "torchscript"
weights = "../maps.pt"

[bundle.input]
mpp = 0.5
patch_size = [64, 64]
overlap = [16, 16]

[bundle.output]
activation = "sigmoid"
classes = {ONE}

[train]
steps = 150
batch_size = 4
crop = [64, 64]
crops = 10
learning_rate = 1e-2

[[data]]
patients = "^[A-Z]"
images = "*.png"
masks = "masks"
mpp = 0.5
classes = {{ Tumor = [1] }}
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder with three patients' discs, and a recipe; the encoder lies above it."""
    folder = tmp_path / "data"
    (folder / "masks").mkdir(parents=True)
    for number, name in enumerate("ABC"):
        size = 150 + 20 * number
        y, x = np.ogrid[:size, :size]
        disc = (y - 0.45 * size) ** 2 + (x - 0.55 * size) ** 2 < (0.3 * size) ** 2
        noise = np.random.default_rng(number).integers(0, 30, (size, size, 1))
        pixels = np.where(disc[..., None], (120, 60, 140), (235, 220, 230)) - noise
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}.png")
        Image.fromarray(disc.astype(np.uint8)).save(folder / "masks" / f"{name}.png")
    torch.jit.trace(Maps().eval(), torch.rand(1, 3, 64, 64)).save(tmp_path / "maps.pt")
    (folder / "recipe.toml").write_text(RECIPE, "utf-8")
    return folder


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by how many patches each pass of an encoder sees."""
    counts: list[int] = []
    encode = FrozenEncoder.encode

    def counted(self: FrozenEncoder, patches: Tensor) -> Tensor:
        counts.append(len(patches))
        return encode(self, patches)

    monkeypatch.setattr(FrozenEncoder, "encode", counted)
    return counts


@pytest.mark.slow
def test_features_are_computed_once_for_all_folds(
    data: Path, tmp_path: Path, shown: list[int]
) -> None:
    begun: dict[str, int] = {}
    output = tmp_path / "bundle"

    def progress(name: str, *_: object) -> None:
        begun.setdefault(name, sum(shown))

    scores = train(data / "recipe.toml", None, output, progress=progress)
    assert list(begun) == ["features", "without A", "without B", "without C", "all patients"]
    # Whole batches of crops of each patient; patches of 150, 170 and 190 px.
    patches = 3 * 3 + 4 * 4 + 4 * 4
    assert sum(shown) == 3 * 12 + patches
    assert {*begun.values()} - {begun["features"]} == {sum(shown)}
    assert min(scores[p]["Tumor"].dice for p in "ABC") > 0.8
    (card,) = output.glob("README.md")
    for told in ("behind the frozen encoder `maps.pt` (torchscript, sha256", "10 crops of each",
                 "behind the encoder, which is not counted", "Encoder: ours, CC0."):  # fmt: skip
        assert told in card.read_text("utf-8")
    with (output / "history.csv").open(encoding="utf-8", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)][-1] == "150"
    # What was begun goes on, without the encoder: a fold anew has the same weights.
    bundle, weights = load_bundle(output), (output / "model.safetensors").read_bytes()
    for folder in (output / ".training").glob("*-*"):
        shutil.rmtree(folder)
    again = train(data / "recipe.toml", None, output)
    assert sum(shown) == 3 * 12 + patches
    assert again == scores
    assert (output / "model.safetensors").read_bytes() == weights
    assert (
        bundle.encoder.weights_sha256
        == load_recipe(data / "recipe.toml").bundle.encoder.weights_sha256
    )
    ok("models", "check", str(output))
    ok(
        "segment",
        str(data / "A.png"),
        "--mpp",
        "0.5",
        "--model",
        str(output),
        "-o",
        str(tmp_path / "out"),
    )
    torch.jit.trace(Transformer(), torch.rand(1, 3, 64, 64)).save(tmp_path / "maps.pt")
    with pytest.raises(RecipeError, match="by another recipe, or on other data"):
        train(data / "recipe.toml", None, output)


def test_features_that_are_there_already_are_not_computed_again(
    data: Path, tmp_path: Path, shown: list[int]
) -> None:
    class Stopped(Exception):
        pass

    def stop(name: str, done: int, *_: object) -> None:
        if (name, done) == ("features", 4):
            raise Stopped

    with pytest.raises(Stopped):
        train(data / "recipe.toml", None, tmp_path / "bundle", folds=(), progress=stop)
    assert sum(shown) == 4 * 4
    train(data / "recipe.toml", None, tmp_path / "bundle", folds=())
    whole = sum(shown)
    train(data / "recipe.toml", None, tmp_path / "other", folds=())
    assert sum(shown) == 2 * whole
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("bundle", "other")]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "crop = [64, 64]",
            "crop = [48, 64]",
            r"of a frozen encoder have one size; write \[64, 64\]",
        ),
        ("crop = [64, 64]", "crop = [72, 72]", "decoder takes multiples of 16"),
        ("../maps.pt", "../gone.pt", "cannot read weights: .*No such file.*gone.pt"),
        ("stride = 16", "stride = 32", "the encoder gives"),
        ('network = "decoder"', 'network = "unet"', "come together"),
        ("crops = 10", 'encoder = "x.pth"', "Decoder has no encoder for it"),
    ],
)
def test_a_recipe_that_does_not_fit_its_encoder_is_refused(
    data: Path, tmp_path: Path, old: str, new: str, reason: str
) -> None:
    assert old in RECIPE
    (data / "recipe.toml").write_text(RECIPE.replace(old, new), "utf-8")
    with pytest.raises((RecipeError, BundleError), match=reason):
        train(data / "recipe.toml", None, tmp_path / "bundle", folds=())


def test_crops_without_an_encoder_are_refused(tmp_path: Path) -> None:
    text = RECIPE.replace('network = "decoder"', 'network = "unet"')
    head, _, tail = text.partition("[bundle.encoder]")
    (tmp_path / "recipe.toml").write_text(head + tail[tail.index("[bundle.input]") :], "utf-8")
    with pytest.raises(RecipeError, match="crops is for a decoder behind a frozen encoder"):
        load_recipe(tmp_path / "recipe.toml")
