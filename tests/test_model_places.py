"""Models by name: where they are looked for, and in which order."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import pointwise_bundle, small_unet_bundle
from click.testing import CliRunner, Result

from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.cli import group
from wsi_pipeline.errors import BundleError

ROOT = Path(__file__).parents[1]
DEMO = "lightmuseg-bcss-demo"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty current folder; the user's cache is beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def models(*arguments: object) -> Result:
    return CliRunner().invoke(group, ["models", *map(str, arguments)])


def test_a_name_is_looked_for_in_turn_and_listed_as_it_is_found(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, more = here.parent / "told", here.parent / "more"
    monkeypatch.setenv("WSI_PIPELINE_MODELS", os.pathsep.join(map(str, (told, "none", more))))
    kept = here.parent / "cache" / "wsi_pipeline" / "models"
    places = [here / "models", told, more, kept]
    for place in reversed(places):
        pointwise_bundle(place / "mine", mpp=0.5)
        pointwise_bundle(place / f"of-{place.name}", mpp=0.5)
        assert load_bundle("mine").path.resolve() == place / "mine"
        lines = models("list").stdout.splitlines()
        listed = [Path(line.split()[0]).resolve() for line in lines]
        assert place / "mine" in listed
        names = [path.name for path in listed]
        assert len({*names}) == len(names)
        assert all(load_bundle(path.name).path.resolve() == path for path in listed)
    assert {f"of-{place.name}" for place in places} <= {*names}


def test_a_folder_goes_before_a_name_unless_it_is_no_bundle(here: Path) -> None:
    pointwise_bundle(here / "models" / "mine", mpp=0.5)
    (here / "mine").mkdir()
    assert load_bundle("mine").mpp == 0.5
    pointwise_bundle(here / "mine", mpp=0.25)
    assert load_bundle("mine").mpp == 0.25


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("lightmuseg-bcs-dmo", DEMO), ("LightMuSeg", DEMO), ("models/nmtnet-mir", "nmtnet-mri")],
)
def test_a_wrong_name_suggests_the_right_one(here: Path, wrong: str, right: str) -> None:
    with pytest.raises(BundleError, match=rf"no bundle at {wrong}: .*did you mean .*{right}"):
        load_bundle(wrong)


def test_a_name_like_none_says_where_it_was_looked_for(here: Path) -> None:
    with pytest.raises(BundleError, match="`models list` lists the names") as told:
        load_bundle("xyzzy")
    assert str(ROOT / "models") in str(told.value)


def test_add_keeps_a_bundle_of_any_kind_under_its_name(here: Path) -> None:
    made = small_unet_bundle(here.parent / "made")
    (made / "README.md").write_text("card", "utf-8")
    (made / "notes.txt").write_text("not of the bundle", "utf-8")
    assert models("add", made).stdout == "test-made\n"
    shutil.rmtree(made)
    bundle = load_bundle("test-made")
    kept = here.parent / "cache" / "wsi_pipeline" / "models" / "test-made"
    assert bundle.path == kept
    assert sorted(p.name for p in kept.iterdir()) == [
        "README.md", "model.safetensors", "model.toml",
    ]  # fmt: skip
    assert bundle.read_weights()
    other = pointwise_bundle(here.parent / "other" / "made", mpp=0.25)
    refused = models("add", other)
    assert refused.exit_code == 1
    assert f"Error: {kept} is there already; add --overwrite" in refused.stderr
    assert load_bundle("test-made").network == "swish_unet"
    assert models("add", other, "--overwrite").exit_code == 0
    assert load_bundle("test-made").network == "torchscript"


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden"])
def test_add_keeps_nothing_outside_the_cache(here: Path, name: str) -> None:
    toml = pointwise_bundle(here.parent / "made", mpp=0.5) / "model.toml"
    toml.write_text(toml.read_text("utf-8").replace("test-made", name), "utf-8")
    refused = models("add", toml.parent)
    assert refused.exit_code == 1
    assert "is no name for a folder" in refused.stderr
    assert not (here.parent / "cache").exists()


@pytest.mark.slow
def test_the_shipped_bundle_comes_as_a_wheel_of_data(here: Path) -> None:
    # of a copy: setuptools would leave its own things among the bundles
    shutil.copytree(ROOT / "models", here.parent / "models")
    package = here.parent / "site" / "wsi_pipeline"
    shutil.copytree(ROOT / "wsi_pipeline", package)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    to = ["--no-build-isolation", "--target", str(package.parent), str(here.parent / "models")]
    subprocess.run([*pip, *to], check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    line = [sys.executable, "-m", "wsi_pipeline", "models", "show", DEMO]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(package.parent / "wsi_pipeline_models" / DEMO))
    made = {p.relative_to(package.parent) for p in package.parent.glob("wsi_pipeline_models/**/*")}
    shipped = {f"{DEMO}/{name}" for name in ("model.toml", "README.md", "model.safetensors")}
    assert {Path("wsi_pipeline_models", name) for name in shipped} <= made
