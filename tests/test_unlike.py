"""Patches unlike the training tissue, from a network's features to the column of summary.csv."""

from __future__ import annotations

import csv
import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import pointwise_bundle, small_unet_bundle
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import load_file, save
from scipy.spatial.distance import mahalanobis

from wsi_pipeline import open_source, segment
from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.cli import group
from wsi_pipeline.errors import BundleError
from wsi_pipeline.inference.predictor import Predictor
from wsi_pipeline.inference.unlike import FALSE_ALARMS, SHRINKAGE, Familiar, load_familiar
from wsi_pipeline.networks import NETWORKS, build

PATIENTS = [
    np.random.default_rng(i).normal(0.2 * i, [1, 2, 3], (200 + 30 * i, 3)).astype(np.float32)
    for i in range(6)
]
SIDE = 32


def test_distances_are_those_of_mahalanobis_and_patients_left_out_are_rarely_unlike() -> None:
    familiar = Familiar.of(PATIENTS)
    assert familiar is not None
    patients = [p.astype(float) for p in PATIENTS]
    mean = np.mean([p.mean(0) for p in patients], axis=0)
    spread = np.mean([np.cov(p.T, bias=True) for p in patients], axis=0)
    spread += np.cov(np.stack([p.mean(0) for p in patients]).T, bias=True)
    around = SHRINKAGE * np.trace(spread) / 3 * np.eye(3)
    inverse = np.linalg.inv((1 - SHRINKAGE) * spread + around)
    expected = [mahalanobis(row, mean, inverse) ** 2 / 3 for row in patients[1]]
    np.testing.assert_allclose(
        familiar.distances(patients[1]) * familiar.threshold, expected, rtol=1e-6
    )
    shares = []
    for left, own in enumerate(PATIENTS):
        others = Familiar.of([p for i, p in enumerate(PATIENTS) if i != left])
        assert others is not None
        shares.append((others.distances(own) > 1).mean())
    assert np.mean(shares) == pytest.approx(FALSE_ALARMS, abs=0.03)
    assert (familiar.distances(PATIENTS[0] + 20) > 1).all()


def test_every_patient_counts_alike() -> None:
    often = [np.tile(PATIENTS[0], (50, 1)), *PATIENTS[1:]]
    once, many = Familiar.of(PATIENTS), Familiar.of(often)
    assert once is not None
    assert many is not None
    np.testing.assert_allclose(once.distances(PATIENTS[5]), many.distances(PATIENTS[5]), rtol=1e-4)


@pytest.mark.parametrize("patients", [[], PATIENTS[:1], [PATIENTS[0], PATIENTS[1][:0]]])
def test_of_one_patient_alone_nothing_is_said(patients: list[np.ndarray]) -> None:
    assert Familiar.of(patients) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"threshold": [0]}, "mean nothing"),
        ({"mean": [1, np.nan, 1]}, "mean nothing"),
        ({"whitening": [[1, 1, 1]]}, "odd shapes"),
        ({"threshold": [1, 1]}, "odd shapes"),
        ({"threshold": None}, "threshold"),
        (None, "cannot read features"),
    ],
)
def test_a_file_that_holds_no_features_is_refused(
    tmp_path: Path, change: dict[str, list[float] | None] | None, reason: str
) -> None:
    familiar = Familiar.of(PATIENTS)
    assert familiar is not None
    bundle = small_unet_bundle(tmp_path / "model")
    name_features(bundle)
    path = bundle / "features.safetensors"
    path.write_bytes(familiar.to_bytes())
    found = load_familiar(load_bundle(bundle))
    assert found is not None
    np.testing.assert_allclose(found.distances(PATIENTS[2]), familiar.distances(PATIENTS[2]), 1e-4)
    if change is None:
        path.write_bytes(path.read_bytes()[:60])
    else:
        arrays = load_file(path) | change
        kept = {n: np.array(a, np.float32) for n, a in arrays.items() if a is not None}
        path.write_bytes(save(kept))
    with pytest.raises(BundleError, match=reason):
        load_familiar(load_bundle(bundle))
    checked = CliRunner().invoke(group, ["models", "check", str(bundle)])
    assert checked.exit_code == 1
    assert "leave features out of model.toml" in checked.stderr


def test_features_of_another_network_fail_the_run_in_a_sentence(
    tmp_path: Path, slide: Path
) -> None:
    familiar = Familiar.of(PATIENTS)
    assert familiar is not None
    bundle = small_unet_bundle(tmp_path / "model")
    name_features(bundle)
    (bundle / "features.safetensors").write_bytes(familiar.to_bytes())
    (run,) = segment(slide, model=bundle, output=tmp_path / "out", device="cpu")
    assert run.status == "failed"
    assert "features are of 3 channels, the network has 16" in run.reason


def name_features(folder: Path, name: str = "features.safetensors") -> None:
    toml = folder / "model.toml"
    toml.write_text(f'features = "{name}"\n{toml.read_text("utf-8")}', "utf-8")


def test_a_bundle_names_features_that_are_there_and_of_its_own_network(tmp_path: Path) -> None:
    name_features(small_unet_bundle(tmp_path / "a"))
    with pytest.raises(BundleError, match=r"names features 'features\.safetensors', which are not"):
        load_bundle(tmp_path / "a")
    name_features(small_unet_bundle(tmp_path / "b"), "../a/model.toml")
    with pytest.raises(BundleError, match="lie outside the bundle"):
        load_bundle(tmp_path / "b")
    name_features(pointwise_bundle(tmp_path / "c", mpp=0.5), "program.pt")
    with pytest.raises(BundleError, match="not of a program"):
        load_bundle(tmp_path / "c")


def features_of(bundle: Path, patches: np.ndarray) -> np.ndarray:
    """Return what the network's own stage gives for (n, y, x, 3) patches, without the predictor."""
    network = build(load_bundle(bundle)).module
    with torch.inference_mode():
        x = torch.from_numpy(patches).permute(0, 3, 1, 2).float() / 255
        return network.down1(network.inc(x)).mean((2, 3)).numpy()


@pytest.mark.parametrize(("batch_size", "threads"), [(1, 1), (3, 1), (2, 4)])
def test_the_predictor_hands_out_features_beside_the_mask(
    tmp_path: Path, batch_size: int, threads: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    origins = np.array([[0, 0], [3, 38], [58, 1], [20, 20], [5, 6], [40, 7], [41, 30]])
    bundle = small_unet_bundle(tmp_path)
    predictor = Predictor(
        load_bundle(bundle), device="cpu", precision="fp32", batch_size=batch_size, threads=threads
    )
    found: list[torch.Tensor] = []
    with closing(predictor):
        masks = list(predictor.predict(torch.from_numpy(pixels), origins, features=found))
        assert len(masks) == len(found) == len(origins)
        (one,) = predictor.predict(torch.from_numpy(pixels), origins[3:4])
    torch.testing.assert_close(one, masks[3])
    patches = np.stack([pixels[y : y + SIDE, x : x + SIDE] for y, x in origins])
    np.testing.assert_allclose(torch.stack(found), features_of(bundle, patches), atol=1e-5)


@pytest.fixture
def slide(tmp_path: Path, make_slide) -> Path:
    """Return a slide at 0.5 µm/px: glass, but for tissue, noisy and, at the right, plain."""
    rng = np.random.default_rng(3)
    pixels = np.full((13 * SIDE, 40 * SIDE, 3), 242, np.uint8)
    pixels[64:320, 64:1216] = rng.integers(90, 130, (256, 1152, 3))
    pixels[64:320, 896:1216] = (200, 120, 190)
    return make_slide(tmp_path / "two.tif", pixels, 0.5)


def test_a_run_tells_what_share_of_its_patches_is_unlike(tmp_path: Path, slide: Path) -> None:
    bundle = small_unet_bundle(tmp_path / "model", patch_size=SIDE)
    rng = np.random.default_rng(4)
    known = rng.integers(90, 130, (40, SIDE, SIDE, 3)).astype(np.uint8)
    familiar = Familiar.of([features_of(bundle, known[:20]), features_of(bundle, known[20:])])
    assert familiar is not None
    # the colours are much further apart than two made-up patients
    familiar.threshold[:] *= 50
    shutil.copytree(bundle, tmp_path / "plain")
    name_features(bundle)
    (bundle / "features.safetensors").write_bytes(familiar.to_bytes())
    tissue = tmp_path / "tissue.png"
    with open_source(slide) as opened:
        pixels = np.array(opened.at(0.5, tolerance=0.01).read((0, 0), (13 * SIDE, 40 * SIDE)))
    covered = np.zeros(pixels.shape[:2], bool)
    covered[64:320, 64:1216] = True
    # a patch is kept for its corner of tissue, and not judged
    covered[330:335, 64:1216] = True
    Image.fromarray(covered.astype(np.uint8) * 255).save(tissue)
    options = {"tissue": tissue, "device": "cpu", "precision": "fp32"}
    (run,) = segment(slide, model=bundle, output=tmp_path / "out", **options)
    blocks = (
        pixels.reshape(13, SIDE, 40, SIDE, 3).swapaxes(1, 2)[2:10, 2:38].reshape(-1, SIDE, SIDE, 3)
    )
    far = familiar.distances(features_of(bundle, blocks)) > 1
    assert 20 < 100 * far.mean() < 45
    assert run.unlike_percent == pytest.approx(100 * far.mean())
    assert run.patches["kept"] == len(blocks) + 36
    assert not any("unlike" in text for text in run.warnings)
    told = json.loads((tmp_path / "out" / "two" / "run.json").read_text("utf-8"))
    assert told["unlike_percent"] == run.unlike_percent
    with (tmp_path / "out" / "summary.csv").open(encoding="utf-8", newline="") as file:
        assert float(next(csv.DictReader(file))["unlike_percent"]) == round(run.unlike_percent, 2)
    assert f"{run.unlike_percent:.1f} % of the patches" in (
        tmp_path / "out" / "report.html"
    ).read_text("utf-8")
    # all of it is unlike: the run warns; and the file is part of the model
    familiar.threshold[:] /= 1e6
    (bundle / "features.safetensors").write_bytes(familiar.to_bytes())
    (other,) = segment(slide, model=bundle, output=tmp_path / "all", **options)
    assert other.unlike_percent == 100
    assert "100 % of the patches are unlike the tissue" in " ".join(other.warnings)
    assert load_bundle(bundle).digest != load_bundle(tmp_path / "plain").digest
    (plain,) = segment(slide, model=tmp_path / "plain", output=tmp_path / "plain-out", **options)
    assert plain.unlike_percent is None
    assert "unlike" not in (tmp_path / "plain-out" / "summary.csv").read_text("utf-8")
    assert "unlike" not in (tmp_path / "plain-out" / "two" / "run.json").read_text("utf-8")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_passes_the_stage_that_tells_what_a_patch_looks_like(name: str) -> None:
    network = NETWORKS[name]().eval()
    seen: list[tuple[int, ...]] = []
    stage = network.get_submodule(network.looks_at)
    stage.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    with torch.inference_mode():
        network(torch.rand(1, network.channels, *(max(32, n) for n in network.multiples)))
    ((count, channels, *_),) = seen
    assert count == 1
    assert channels >= 64
