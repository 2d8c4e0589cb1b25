"""Classifiers of whole patches: heat maps that equal a plain loop over the patches."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import openslide
import pytest
import torch
import zarr
from bundles import Pointwise, small_unet_bundle
from click.testing import CliRunner
from PIL import Image

from wsi_pipeline.bundle import bundle_toml, load_bundle
from wsi_pipeline.cli import group
from wsi_pipeline.errors import BundleError
from wsi_pipeline.networks import build
from wsi_pipeline.networks.check import random_patches

SIDE = 90
NAMES = ["Other", "Tumor", "Glass"]
MEAN, STD = [0.7, 0.6, 0.5], [0.2, 0.25, 0.3]


class Colour(torch.nn.Module):
    """Three logits of a patch, by its mean colour and how much the corner differs from it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        red, green = x[:, 0].mean((1, 2)), x[:, 1].mean((1, 2))
        corner = x[:, 2, :9, :9].mean((1, 2)) - x[:, 2].mean((1, 2))
        return torch.stack([2 * red - green, -3 * green, green + corner], 1)


class One(Colour):
    """One logit."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -3 * x[:, 1].mean((1, 2))[:, None]


def zoo_folder(folder: Path, *, size: int = SIDE, **changes: object) -> Path:
    """Write a model as WSInfer's zoo has them; return its folder."""
    folder.mkdir(parents=True)
    program = One() if changes.get("class_names") == ["Tumor"] else Colour()
    torch.jit.script(program).save(folder / "torchscript_model.pt")
    told = {
        "spec_version": "1.0",
        "architecture": "resnet34",
        "num_classes": 3,
        "class_names": NAMES,
        "patch_size_pixels": SIDE,
        "spacing_um_px": 0.25,
        "transform": [
            {"name": "Resize", "arguments": {"size": size}},
            {"name": "ToTensor"},
            {"name": "Normalize", "arguments": {"mean": MEAN, "std": STD}},
        ],
    } | changes
    (folder / "config.json").write_text(json.dumps(told), "utf-8")
    return folder


def imported(folder: Path, tmp_path: Path) -> Path:
    target = tmp_path / f"{folder.name}-bundle"
    result = CliRunner().invoke(group, ["models", "import", str(folder), "-o", str(target)])
    assert result.exit_code == 0, result.output
    return target


def said_of(pixels: np.ndarray, *, size: int, program: torch.nn.Module) -> np.ndarray:
    """Return the logits of one patch (h, w, 3), prepared as torchvision would."""
    resized = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))
    values = (resized.astype(np.float32) / 255 - np.array(MEAN)) / np.array(STD)
    with torch.inference_mode():
        return program(torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None])[
            0
        ].numpy()


@pytest.mark.parametrize("size", [SIDE, 40])
def test_each_cell_has_the_probabilities_of_a_plain_loop(
    tmp_path: Path, slide_path: Path, size: int
) -> None:
    model = imported(zoo_folder(tmp_path / "zoo", size=size), tmp_path)
    arguments = ["segment", str(slide_path), "--model", str(model), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(group, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    (home,) = [path.parent for path in (tmp_path / "out").glob("*/run.json")]
    planes = zarr.open_group(home / "probability.ome.zarr", mode="r")["0"][:]
    mask = zarr.open_group(home / "mask.ome.zarr", mode="r")["0"][:]
    program, seen = Colour(), set()
    with openslide.OpenSlide(slide_path) as slide:
        columns, rows = (n // SIDE for n in slide.dimensions)
        assert planes.shape == (3, rows + 1, columns + 1)
        # Patches at the far ends reach back into the cells before them.
        for y in range(rows - 1):
            for x in range(columns - 1):
                place = (x * SIDE, y * SIDE)
                patch = np.asarray(slide.read_region(place, 0, (SIDE, SIDE)))[..., :3]
                logits = said_of(patch, size=size, program=program)
                expected = np.exp(logits) / np.exp(logits).sum()
                here = mask[y * SIDE : (y + 1) * SIDE, x * SIDE : (x + 1) * SIDE]
                if not planes[:, y, x].any():
                    assert not here.any()
                    continue
                # A byte holds half a 255th; a resized pixel was rounded before.
                error = np.abs(planes[:, y, x] / 255 - expected).max()
                assert error <= 0.5 / 255 + (1e-5 if size == SIDE else 0.004)
                (value,) = np.unique(here).tolist()
                assert planes[value - 1, y, x] == planes[:, y, x].max()
                seen.add(value)
    assert seen == {1, 2, 3}
    (row,) = csv.DictReader((tmp_path / "out" / "summary.csv").read_text("utf-8").splitlines())
    pixels = np.bincount(mask.ravel(), minlength=4)[1:] * 0.25**2 / 1e6
    for name, area in zip(NAMES, pixels, strict=True):
        assert float(row[f"{name}_mm2"]) == pytest.approx(area, abs=1e-4)
    features = json.loads((home / "annotations.geojson").read_text("utf-8"))["features"]
    named = {feature["properties"]["classification"]["name"] for feature in features}
    assert named == set(NAMES)
    # Patches of one class that touch are one polygon.
    assert len(features) < len(planes[0][planes[0] > 0]) / 3


def test_a_bundle_of_labels_alone_reads_back_as_it_is(tmp_path: Path) -> None:
    bundle = load_bundle(imported(zoo_folder(tmp_path / "zoo", size=40), tmp_path))
    assert bundle.is_patchwise
    assert [c.name for c in bundle.classes] == ["Background", *NAMES]
    assert bundle.labels == ()
    again = tmp_path / "again"
    again.mkdir()
    (again / "program.pt").write_bytes(bundle.read_weights())
    (again / "model.toml").write_text(bundle_toml(bundle, weights="program.pt"), "utf-8")
    assert load_bundle(again).digest == bundle.digest
    assert "classes" not in (again / "model.toml").read_text("utf-8")
    for command in ("show", "check"):
        result = CliRunner().invoke(group, ["models", command, str(again)])
        assert result.exit_code == 0, result.output


def test_one_label_is_there_or_not(tmp_path: Path) -> None:
    folder = zoo_folder(tmp_path / "zoo", class_names=["Tumor"], num_classes=1)
    bundle = load_bundle(imported(folder, tmp_path))
    assert bundle.activation == "sigmoid"
    patches = random_patches(bundle, 2)
    logits = build(bundle).module(patches)
    assert logits.shape == (2, 1, SIDE, SIDE)
    expected = One()(patches)[:, :, None, None].expand(logits.shape)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_a_label_may_be_called_background(tmp_path: Path) -> None:
    folder = zoo_folder(tmp_path / "zoo", class_names=["Background", "Tumor", "Glass"])
    classes = load_bundle(imported(folder, tmp_path)).classes
    assert [c.name for c in classes] == ["No patch", "Background", "Tumor", "Glass"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"transform": [{"name": "CenterCrop"}]}, "its transform has CenterCrop"),
        ({"transform": 3}, "config.json lacks or misuses"),
        ({"class_names": ["A", "B"]}, r"answers with mask \(1, 4, 90, 90\)"),
        ({"spacing_um_px": -1}, "input.mpp is -1"),
    ],
)
def test_what_is_no_model_of_the_zoo_is_refused(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    folder = zoo_folder(tmp_path / "zoo", **changes)
    arguments = ["models", "import", str(folder), "-o", str(tmp_path / "m")]
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 1
    assert not (tmp_path / "m").exists()
    assert re.search(reason, result.output), result.output


def test_what_only_classifiers_have_is_refused_elsewhere(tmp_path: Path) -> None:
    ours = small_unet_bundle(tmp_path / "ours")
    toml = (ours / "model.toml").read_text("utf-8")
    head = toml[: toml.index("classes = [")]
    (ours / "model.toml").write_text(f'{head}labels = ["A", "B"]\n', "utf-8")
    with pytest.raises(BundleError, match=r"lacks output\.classes: swish_unet gives a mask"):
        load_bundle(ours)
    classifier = imported(zoo_folder(tmp_path / "zoo", size=40), tmp_path)
    toml = (classifier / "model.toml").read_text("utf-8")
    for old, new, reason in [
        ("resize = ", "resized = ", r"network_options\.resized; expected precision or resize"),
        ("[40, 40]", "[40, 40, 40]", "3 sizes for patches of 2 axes"),
        ("[40, 40]", '"small"', "resize is 'small'"),
        ("softmax", "sigmoid", "sigmoid takes one of labels"),
    ]:
        (classifier / "model.toml").write_text(toml.replace(old, new), "utf-8")
        with pytest.raises(BundleError, match=reason):
            build(load_bundle(classifier))
    masks = toml[: toml.index("labels = [")] + "classes = [" + ", ".join(
        f'{{ name = "{name}", color = [1, 2, 3] }}' for name in NAMES
    ) + "]\n"  # fmt: skip
    (classifier / "model.toml").write_text(masks, "utf-8")
    torch.jit.script(Pointwise()).save(classifier / "program.pt")
    with pytest.raises(BundleError, match="resize is for classifiers"):
        build(load_bundle(classifier))
