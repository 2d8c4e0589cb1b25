"""Ensembles: the means, or votes, of single runs, and where their members disagree."""

from __future__ import annotations

import csv
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import zarr
from bundles import lightmuseg_bundle, pointwise_bundle
from PIL import Image
from scans import Soft, scan_bundle

from wsi_pipeline import UsageError, segment
from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.errors import BundleError, WsiPipelineError
from wsi_pipeline.inference.ensemble import open_predictor
from wsi_pipeline.networks.ensemble import combined, write_ensemble
from wsi_pipeline.options import PredictOptions
from wsi_pipeline.run.again import export_again
from wsi_pipeline.run.probability import open_probability
from wsi_pipeline.run.verify import verify

OPTIONS = {"precision": "fp32", "tissue": "none", "mask_mpp": 1.0, "device": "cpu"}
ONE = 1 / 255


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("members")
    return [
        lightmuseg_bundle(folder / f"m{seed}", mpp=1.0, patch_size=64, overlap=0, seed=seed)
        for seed in range(3)
    ]


@pytest.fixture(scope="module")
def singles(
    tmp_path_factory: pytest.TempPathFactory, slide_path: Path, members: list[Path]
) -> npt.NDArray[np.float64]:
    """Return the probabilities (members, classes, y, x) of single runs, the background first."""
    folder = tmp_path_factory.mktemp("singles")
    found = []
    for member in members:
        segment(slide_path, model=member, output=folder / member.name, **OPTIONS)
        planes = open_probability(folder / member.name / slide_path.stem).levels[0][:] * ONE
        found.append(np.concatenate([1 - planes.sum(0, keepdims=True), planes]))
    return np.array(found)


@pytest.mark.parametrize("combine", ["mean", pytest.param("vote", marks=pytest.mark.slow)])
def test_it_is_the_mean_or_the_vote_of_single_runs(
    tmp_path: Path,
    slide_path: Path,
    members: list[Path],
    singles: npt.NDArray[np.float64],
    combine: str,
) -> None:
    out = tmp_path / "out"
    (run,) = segment(slide_path, model=members, combine=combine, output=out, **OPTIONS)
    folder = out / slide_path.stem
    assert (run.status, run.reason) == ("done", "")
    assert run.model["name"] == f"{combine} of test-m0, test-m1, test-m2"
    each = singles
    if combine == "vote":
        each = np.moveaxis(np.eye(singles.shape[1])[singles.argmax(1)], -1, 1)
    wanted = each.mean(0)
    found = open_probability(folder).levels[0][:] * ONE
    # Single runs are rounded to 8 bits; where two classes are nearly equal so are votes.
    top = np.sort(singles, axis=1)
    is_clear = (top[:, -1] - top[:, -2] > 4 * ONE).all(0) | (combine == "mean")
    assert np.abs(found - wanted[1:])[:, is_clear].max() <= 1.6 * ONE
    disputed = zarr.open_array(folder / "probability.ome.zarr" / "disagreement" / "0", mode="r")
    pairs = [np.abs(a - b).sum(0) / 2 for a, b in combinations(each, 2)]
    wanted_disputed = np.mean(pairs, axis=0)
    assert np.abs(disputed[0] * ONE - wanted_disputed)[is_clear].max() <= 4 * ONE
    assert wanted_disputed.std() > 0.05
    assert run.disagreement_percent == pytest.approx(100 * disputed[:].mean() * ONE, abs=0.5)
    (row,) = csv.DictReader((out / "summary.csv").read_text("utf-8").splitlines())
    assert float(row["disagreement_percent"]) == pytest.approx(run.disagreement_percent, abs=1e-3)
    mask = zarr.open_array(folder / "mask.ome.zarr" / "0", mode="r")[:]
    top = np.sort(wanted, axis=0)
    is_clear &= top[-1] - top[-2] > 4 * ONE
    assert (mask == wanted.argmax(0))[is_clear].all()
    assert verify(folder, share=1).different == ()
    # The same command finds it done.
    assert segment(slide_path, model=members, combine=combine, output=out, **OPTIONS) == [run]
    before = (folder / "annotations.geojson").read_bytes()
    (folder / "annotations.geojson").unlink()
    export_again(folder, {})
    assert (folder / "annotations.geojson").read_bytes() == before


def test_members_may_be_moved_between_runs(tmp_path: Path, slide_path: Path) -> None:
    for place in ("here", "there"):
        for name in ("a", "b"):
            pointwise_bundle(tmp_path / name, mpp=1.0, patch_size=64, overlap=0)
        models = [tmp_path / place / name for name in ("a", "b")]
        (tmp_path / place).mkdir()
        for model in models:
            (tmp_path / model.name).rename(model)
        if place == "there":
            (tmp_path / "here").rename(tmp_path / "gone")
        options = {**OPTIONS, "combine": "mean", "outputs": ("zarr",), "overwrite": True}
        (run,) = segment(slide_path, model=models, output=tmp_path / "out", **options)
        assert (run.status, run.reason) == ("done", "")
    assert len(list((tmp_path / "out" / ".models").iterdir())) == 1


@pytest.mark.slow
def test_an_ensemble_is_a_bundle_on_the_disk(
    tmp_path: Path, slide_path: Path, members: list[Path]
) -> None:
    segment(slide_path, model=members, combine="mean", output=tmp_path / "out", **OPTIONS)
    (path,) = (tmp_path / "out" / ".models").iterdir()
    bundle = load_bundle(path)
    assert [member.path for member in bundle.members] == members
    (run,) = segment(slide_path, model=path, output=tmp_path / "other", **OPTIONS)
    assert run.certificate["model"] == bundle.digest
    text = (path / "model.toml").read_text("utf-8")
    (path / "model.toml").write_text(text.replace('members = ["', 'members = [3, "'), "utf-8")
    with pytest.raises(WsiPipelineError, match="expected"):
        segment(slide_path, model=path, output=tmp_path / "third", **OPTIONS)


def test_members_that_do_not_fit_are_refused(
    tmp_path: Path, slide_path: Path, members: list[Path]
) -> None:
    coarse = pointwise_bundle(tmp_path / "coarse", mpp=2.0, patch_size=64)
    large = pointwise_bundle(tmp_path / "large", mpp=1.0, patch_size=128)
    for other, reason in (
        (coarse, r"test-m0 and test-coarse .*: input.mpp is 1.0 and 2.0; leave --combine out"),
        (large, r"input.patch_size is \[64, 64\] and \[128, 128\]"),
        ("lightmuseg-bcss-demo", "classes is .*Stroma.* and .*Tumor"),
    ):
        with pytest.raises(UsageError, match=reason):
            segment(slide_path, model=[members[0], other], combine="mean", output=tmp_path / "out")
    with pytest.raises(UsageError, match="two members or more"):
        segment(slide_path, model=members[0], combine="vote", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Otherwise(torch.nn.Module):
    """`Soft`, the other way round."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = 1 - x[:, :1]
        return torch.cat([0.45 - first, 0.1 - (first - 0.5).abs(), first - 0.55], dim=1) * 5


def test_each_member_prepares_an_image_by_its_own_figures(tmp_path: Path) -> None:
    """Pixels of images are numbers already: one member's preparation must not be the next one's."""
    values = np.random.default_rng(0).integers(0, 256, (60, 70)).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    models = []
    for number, program in enumerate((Soft, Otherwise, Soft)):
        folder = scan_bundle(
            tmp_path / f"m{number}",
            modality="image",
            resolution="fit = [60, 70]",
            patch_size=(32, 32),
            program=program,
        )
        text = (folder / "model.toml").read_text("utf-8")
        own = text.replace("mean = [0.0]", f"mean = [{number / 10}]").replace(
            "std = [1.0]", f"std = [{1 - number / 5}]"
        )
        (folder / "model.toml").write_text(own, "utf-8")
        models.append(folder)
    options = {"precision": "fp32", "device": "cpu"}
    each = []
    for model in models:
        segment(tmp_path / "a.png", model=model, output=tmp_path / f"o{model.name}", **options)
        each.append(open_probability(tmp_path / f"o{model.name}" / "a").levels[0][:] * ONE)
    segment(tmp_path / "a.png", model=models, combine="mean", output=tmp_path / "o", **options)
    found = open_probability(tmp_path / "o" / "a").levels[0][:] * ONE
    assert np.abs(found - np.mean(each, axis=0)).max() <= 1.1 * ONE
    assert np.std(each, axis=0).max() > 0.05


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('combine = "mean"', 'combine = "median"', "combine is 'median'; expected mean or vote"),
        ('combine = "mean"', "", "combine is None; expected mean or vote"),
        ("mpp = 1.0", "mpp = 0.5", r"test-m0 and mean of .*: input\.mpp is 1\.0 and 0\.5"),
        ('network = "ensemble"', 'network = "unet"', "members come together"),
        ("members = [", "others = [", "members come together"),
    ],
)
def test_an_ensemble_whose_file_was_changed_is_refused(
    tmp_path: Path, slide_path: Path, members: list[Path], old: str, new: str, reason: str
) -> None:
    bundle = combined([load_bundle(m) for m in members[:2]], "mean", tmp_path)
    write_ensemble(bundle)
    text = (bundle.path / "model.toml").read_text("utf-8")
    assert old in text
    (bundle.path / "model.toml").write_text(text.replace(old, new), "utf-8")
    with pytest.raises(WsiPipelineError, match=reason):
        open_predictor(load_bundle(bundle.path), PredictOptions(device="cpu"), threads=1)


def test_ensembles_of_ensembles_are_refused(tmp_path: Path, members: list[Path]) -> None:
    inner = combined([load_bundle(m) for m in members[:2]], "mean", tmp_path)
    with pytest.raises(BundleError, match=r"mean of .* is an ensemble itself; name its members"):
        combined([inner, load_bundle(members[2])], "mean", tmp_path)


@pytest.mark.parametrize("first", [0, 1])
def test_members_that_scale_images_otherwise_are_refused(tmp_path: Path, first: int) -> None:
    models = [
        load_bundle(
            scan_bundle(
                tmp_path / f"m{number}",
                modality="image",
                resolution="fit = [60, 70]",
                patch_size=(32, 32),
                keys=keys,
            )
        )
        for number, keys in enumerate(('scale = "minmax"', ""))
    ]
    with pytest.raises(BundleError, match=r"input\.scale is "):
        combined([models[first], models[1 - first]], "mean", tmp_path)
