"""Refitting a model to what people have corrected of its runs."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import shapely
import zarr
from click.testing import CliRunner
from msgspec import structs
from safetensors.numpy import load_file

from wsi_pipeline import load_bundle, load_run, segment
from wsi_pipeline.cli import group
from wsi_pipeline.errors import RecipeError
from wsi_pipeline.training import corrections
from wsi_pipeline.training.corrections import corrected_recipe
from wsi_pipeline.training.samples import IGNORE, load_samples

DEMO = Path(__file__).parents[1] / "models" / "lightmuseg-bcss-demo"
REGION, TUMOR = shapely.box(200, 300, 1200, 1100), shapely.box(400, 500, 800, 700)


@pytest.fixture(scope="module")
def output(tmp_path_factory, slide_path):
    """Return the folder of a run by a copy of the demo model, with a corrected region."""
    folder = tmp_path_factory.mktemp("corrected")
    shutil.copytree(DEMO, folder / "model")
    out = folder / "out"
    outputs = ("geojson", "zarr", "probability")
    segment(slide_path, model=folder / "model", output=out, tissue="none", outputs=outputs)
    (out / "corrections").mkdir()
    features = [
        {
            "type": "Feature",
            "geometry": shapely.geometry.mapping(area),
            "properties": {"classification": {"name": name, "color": [0, 0, 0]}},
        }
        for area, name in ((REGION, "Region*"), (TUMOR, "Tumor"))
    ]
    text = json.dumps({"type": "FeatureCollection", "features": features})
    (out / "corrections" / f"{slide_path.stem}.geojson").write_text(text, "utf-8")
    return out


def command(*arguments):
    return CliRunner().invoke(group, [*map(str, arguments)])


def train(*arguments):
    return command("train", *arguments)


def test_corrections_are_in_the_mask_of_a_new_run_and_nothing_else_differs(
    output, slide_path, tmp_path
):
    home = output / slide_path.stem
    file = output / "corrections" / f"{slide_path.stem}.geojson"
    done = command("export", home, "--corrections", file, "--output", tmp_path / "new")
    assert done.exit_code == 0, done.output
    old, new = (
        np.asarray(zarr.open_array(folder / "mask.ome.zarr" / "0", mode="r"))
        for folder in (home, tmp_path / "new" / slide_path.stem)
    )
    expected = old.copy()
    expected[300:1100, 200:1200] = 0
    expected[500:700, 400:800] = 1
    assert (expected != old).any()
    assert np.array_equal(new, expected)
    run = load_run(tmp_path / "new" / slide_path.stem)
    assert "corrected by hand" in " ".join(run.warnings)
    assert run.area_mm2["Tumor"] == pytest.approx((expected == 1).sum() * 0.25**2 * 1e-6)
    # polygons are of the corrected mask
    features = json.loads((tmp_path / "new" / home.name / "annotations.geojson").read_text())
    region = shapely.union_all(
        [shapely.geometry.shape(f["geometry"]) for f in features["features"]]
    ).intersection(REGION)
    assert region.symmetric_difference(TUMOR).area < 0.01 * TUMOR.area
    alone = command("export", home, "--corrections", file)
    assert alone.exit_code == 2


def test_in_the_region_all_that_is_not_drawn_is_background(output):
    recipe, root = corrected_recipe(output, "next")
    with ExitStack() as closing:
        (sample,) = load_samples(recipe, root, closing)
        truth = sample.read_all()[1].numpy()
    # the network sees 1 µm, the slide has 0.25: one of 16 pixels
    counts = {value: int((truth == value).sum()) for value in np.unique(truth)}
    tumor, region = TUMOR.area / 16, REGION.area / 16
    assert counts == {
        0: pytest.approx(region - tumor, rel=0.03),
        1: pytest.approx(tumor, rel=0.03),
        IGNORE: pytest.approx(truth.size - region, rel=0.03),
    }


def test_the_encoder_stays_and_the_rest_learns_into_a_new_bundle(
    output, slide_path, tmp_path, monkeypatch
):
    few = structs.replace(corrections.REFIT, steps=2, batch_size=2)
    monkeypatch.setattr(corrections, "REFIT", few)
    before = {path: path.read_bytes() for path in (output.parent / "model").rglob("*.*")}
    done = train("--from-corrections", output, "-o", tmp_path / "next")
    assert done.exit_code == 0, done.output
    assert before == {path: path.read_bytes() for path in before}
    old, new = load_bundle(output.parent / "model"), load_bundle(tmp_path / "next")
    assert (new.name, new.limits) == ("next", old.limits)
    assert (new.classes, new.temperature) == (old.classes, old.temperature)
    assert new.features_path.read_bytes() == old.features_path.read_bytes()
    was, now = (load_file(bundle.weights_path) for bundle in (old, new))
    assert was.keys() == now.keys()
    moved = {name for name in now if not np.array_equal(was[name], now[name])}
    assert moved
    assert not any(name.startswith("encoder.") for name in moved)
    card = (tmp_path / "next" / "README.md").read_text("utf-8")
    assert f"from `{old.name}`" in card
    # and there it can be used
    (run,) = segment(slide_path, model=tmp_path / "next", output=tmp_path / "out", tissue="none")
    assert run.status == "done"


def test_what_cannot_be_refitted_is_refused(output, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"corrections/<slide>\.geojson"):
        corrected_recipe(tmp_path / "empty", "next")
    onto = train("--from-corrections", output, "-o", output.parent / "model", "--overwrite")
    assert onto.exit_code == 1
    assert "is the bundle to begin with" in str(onto.exception) + onto.output
    other = tmp_path / "other"
    shutil.copytree(DEMO, other)
    onto = train("--from-corrections", output, "-o", other)
    assert "was not trained there" in str(onto.exception) + onto.output
    both = train("recipe.toml", "--from-corrections", output, "-o", tmp_path / "x")
    assert both.exit_code == 2
