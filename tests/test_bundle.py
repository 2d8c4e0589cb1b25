from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from wsi_pipeline.bundle import RemoteFile, bundle_table, bundle_toml, load_bundle
from wsi_pipeline.errors import BundleError
from wsi_pipeline.files.atomic import sha256_of
from wsi_pipeline.files.download import download

MODEL = """
name = "test"
modality = "slide"
network = "lightmuseg"
weights = "model.safetensors"

[network_options]
classes = 3

[input]
mpp = 0.5
channels = 3
patch_size = [512, 512]
overlap = [128, 128]

[output]
activation = "softmax"
classes = [
    { name = "Background" },
    { name = "Tumor", color = [200, 0, 0] },
    { name = "Fat", color = [0, 200, 0] },
]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a bundle's folder with weights of ten bytes."""
    (tmp_path / "model.toml").write_text(MODEL, "utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"0123456789")
    return tmp_path


def change(folder: Path, old: str, new: str) -> None:
    assert old in MODEL
    (folder / "model.toml").write_text(MODEL.replace(old, new, 1), "utf-8")


def test_a_bundle_holds_what_its_file_says(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert (bundle.name, bundle.modality, bundle.network) == ("test", "slide", "lightmuseg")
    assert bundle.network_options == {"classes": 3}
    assert bundle.input.patch_size == (512, 512)
    assert bundle.input.mean == (0.485, 0.456, 0.406)
    assert [(c.name, c.color) for c in bundle.classes] == [
        ("Background", None),
        ("Tumor", (200, 0, 0)),
        ("Fat", (0, 200, 0)),
    ]
    assert bundle.weights_path == folder / "model.safetensors"
    assert bundle.weights_sha256 == hashlib.sha256(b"0123456789").hexdigest()


def test_the_file_itself_may_be_named(folder: Path) -> None:
    assert load_bundle(folder / "model.toml") == load_bundle(folder)


def test_qupaths_own_names_have_qupaths_own_colours(folder: Path) -> None:
    change(folder, "[200, 0, 0]", "[1, 2, 3]")
    assert load_bundle(folder).classes[1].color == (200, 0, 0)
    change(folder, ", color = [200, 0, 0]", "")
    assert load_bundle(folder).classes[1].color == (200, 0, 0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[input]", "[input", "not valid TOML"),
        ("mpp = 0.5", "", r"lacks input\.mpp"),
        ("mpp = 0.5", "mpp = -1", r"input\.mpp is -1; expected µm per pixel above 0"),
        ("mpp = 0.5", "mpp = inf", "above 0"),
        ("mpp = 0.5", 'mpp = "0.5"', "above 0"),
        ("mpp = 0.5", "mpp = true", "above 0"),
        ("mpp = 0.5", "mpp = nan", "above 0"),
        ("mpp = 0.5", "mpp = 0.5\nmean = [nan, 0.0, 0.0]", r"mean\[0\] is nan; expected a number"),
        ("mpp = 0.5", "mpp = 0.5\npatchsize = [8, 8]", r"patchsize \(did you mean patch_size\?\)"),
        ("[output]", "[[output]]", "output is .*; expected a table"),
        (
            'weights = "model.safetensors"',
            "weights = 5",
            "weights is 5; expected a file's name, or",
        ),
        ("[200, 0, 0]", "2001-01-01", "color is 2001-01-01; expected"),
        ("mpp = 0.5", "mpp = 0.5\nmagnification = 20", r"unknown input\.magnification"),
        ("[output]", "[train]\nx = 1\n[output]", "unknown train; there are name, modality"),
        ("[output]", "[output]\nthreshold = 0.4", r"unknown output\.threshold"),
        ('"Fat", color', '"Fat", colour', r"unknown output\.classes\[2\]\.colour"),
        ('network = "lightmuseg"', "", "lacks network"),
        ('network = "lightmuseg"', "network = 3", "network is 3; expected a word"),
        ("[network_options]\nclasses = 3", "network_options = 3", "expected a table"),
        ('modality = "slide"', 'modality = "scan"', "scan"),
        ('modality = "slide"', 'modality = "image"', r"input\.mpp is not for images"),
        ("mpp = 0.5", "mpp = 0.5\nfit = [256, 256]", r"input\.fit is not for slides"),
        ('activation = "softmax"', 'activation = "relu"', "relu"),
        ("channels = 3", "channels = 0", "a whole number above 0"),
        ("[512, 512]", "512", r"input\.patch_size is 512; expected \[y, x\]"),
        ("[512, 512]", "[512, 512, 512]", "expected 2, one an axis"),
        ("[512, 512]", "[512.5, 512]", r"patch_size\[0\] is 512.5; expected a whole number"),
        ("[512, 512]", "[0, 512]", "above 0"),
        ("overlap = [128, 128]", "overlap = [512, 512]", r"less than patch_size, \[512, 512\]"),
        (
            "overlap = [128, 128]",
            "overlap = [-1, 0]",
            r"overlap\[0\] is -1; expected a whole number from 0",
        ),
        ("overlap = [128, 128]", "overlap = [128]", "expected 2, one an axis"),
        ("mpp = 0.5", "mpp = 0.5\nmean = [0.5]", "expected 3, one a channel"),
        (
            "mpp = 0.5",
            "mpp = 0.5\nstd = [0.5, 0.5, 0.0]",
            r"std\[2\] is 0.0; expected a number above 0",
        ),
        (", color = [0, 200, 0]", "", "no color"),
        ("[200, 0, 0]", "[200, 0]", r"color is \[200, 0\]; expected \[red, green, blue\]"),
        ("[200, 0, 0]", "[200, 0, 256]", r"color\[2\] is 256; expected .* from 0 to 255"),
        ('"Tumor"', '"Background"', "same name"),
        ('"Tumor"', '"Tumor: invasive"', "':'"),
        ('"softmax"', '"sigmoid"', "sigmoid takes 2"),
        ("[output]", '[output]\nlabels = ["Benign"]', "two names or more"),
        ("[output]", "[output]\ntemperature = 0", "output.temperature is 0; expected a number"),
        ("[output]", '[output]\ntemperature = "hot"', 'output.temperature is "hot"; expected'),
        ("[output]", '[output]\nlabels = "Benign"', "two names or more"),
        ("[output]", '[output]\nlabels = ["Benign", "Benign"]', "same name"),
        ("[output]", '[output]\nlabels = ["Benign", ""]', r'labels\[1\] is ""; expected a name'),
        ('weights = "model.safetensors"', 'weights = "other.pt"', "not there"),
        ('weights = "model.safetensors"', 'weights = "../../etc/passwd"', "outside"),
        ('weights = "model.safetensors"', 'weights = { url = "https://x.org/w" }', "sha256"),
        ('weights = "model.safetensors"', 'weights = { path = "w" }', r"unknown weights\.path"),
        ('weights = "model.safetensors"', 'weights = "file:///w.pt"', r"is a URL; expected \{ url"),
        ('"slide"', '"image"', "input.mpp is not for images"),
        ("mpp = 0.5", "mpp = " + "[" * 5000, "is not valid TOML"),
        ("mpp = 0.5", "mpp = 0.5 #" + " " * (1 << 20), "has more than 1 MB"),
    ],
)
def test_a_wrong_bundle_is_refused_with_the_reason(
    folder: Path, old: str, new: str, message: str
) -> None:
    change(folder, old, new)
    with pytest.raises(BundleError, match=message):
        load_bundle(folder)


@pytest.mark.parametrize("fit", ["5", "true", "[]", "[[5, 5]]", "[5, 6]", '"55"', "{}"])
def test_a_fit_of_another_kind_is_refused_with_the_reason(folder: Path, fit: str) -> None:
    change(folder, '"slide"', '"image"')
    change(folder, "mpp = 0.5", f'fit = {fit}\npad = "square"')
    with pytest.raises(BundleError, match=r"input\.(fit|pad) is"):
        load_bundle(folder)


VOLUME = (
    ("mpp = 0.5", "spacing_mm = [2.0, 1.0, 1]"),
    ("channels = 3", "channels = 1\nmean = [0.0]\nstd = [1.0]"),
    ("[512, 512]", "[64, 128, 128]"),
    ("[128, 128]", "[0, 32, 32]"),
)


def change_all(folder: Path, changes: tuple[tuple[str, str], ...]) -> None:
    text = MODEL
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    (folder / "model.toml").write_text(text, "utf-8")


def test_images_say_the_size_that_they_are_brought_to(folder: Path) -> None:
    change_all(folder, (("slide", "image"), ("mpp = 0.5", "fit = [512, 384]")))
    bundle = load_bundle(folder)
    assert bundle.input.fit == (512, 384)
    assert (bundle.input.mpp, bundle.input.spacing_mm) == (None, None)
    with pytest.raises(BundleError, match="is for images and has no µm per pixel"):
        _ = bundle.mpp


def test_volumes_say_their_spacing_and_have_patches_of_three_axes(folder: Path) -> None:
    change_all(folder, (("slide", "volume"), *VOLUME))
    bundle = load_bundle(folder)
    assert bundle.input.spacing_mm == (2.0, 1.0, 1)
    assert bundle.input.patch_size == (64, 128, 128)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("spacing_mm = [2.0, 1.0, 1]", "spacing_mm = [1.0, 1.0]", r"\[z, y, x\] in mm above 0"),
        ("spacing_mm = [2.0, 1.0, 1]", "spacing_mm = 1.0", r"\[z, y, x\] in mm above 0"),
        ("spacing_mm = [2.0, 1.0, 1]", "spacing_mm = [1.0, 1.0, 0.0]", "above 0"),
        ("spacing_mm = [2.0, 1.0, 1]", "mpp = 0.5", r"input\.mpp is not for volumes"),
        ("[64, 128, 128]", "[128, 128]", r"patch_size\[0\] is 0; expected"),
        ("[0, 32, 32]", "[32, 32]", "expected 3, one an axis"),
    ],
)
def test_a_wrong_volume_is_refused(folder: Path, old: str, new: str, message: str) -> None:
    changes = tuple((a, b.replace(old, new)) for a, b in VOLUME)
    change_all(folder, (("slide", "volume"), *changes))
    with pytest.raises(BundleError, match=message):
        load_bundle(folder)


def test_labels_are_names(folder: Path) -> None:
    assert load_bundle(folder).labels == ()
    change(folder, "[output]", '[output]\nlabels = ["Benign", "Malignant"]')
    assert load_bundle(folder).labels == ("Benign", "Malignant")


@pytest.mark.parametrize("told", ["{", "[1]", '{"url": 3}'])
def test_a_damaged_origin_is_told(folder: Path, told: str) -> None:
    (folder / ".origin.json").write_text(told, "utf-8")
    with pytest.raises(BundleError):
        load_bundle(folder)


def test_augmentation_is_read_written_and_part_of_the_digest(folder: Path) -> None:
    plain = load_bundle(folder)
    assert (plain.tta, "tta" in bundle_toml(plain, weights="model.safetensors")) == ("none", False)
    change(folder, "[network_options]", 'tta = "d4"\n[network_options]')
    bundle = load_bundle(folder)
    assert bundle.tta == "d4"
    assert bundle.digest != plain.digest
    (folder / "model.toml").write_text(bundle_toml(bundle, weights="model.safetensors"), "utf-8")
    assert load_bundle(folder) == bundle
    text = (folder / "model.toml").read_text("utf-8")
    (folder / "model.toml").write_text(text.replace("[512, 512]", "[512, 256]"), "utf-8")
    with pytest.raises(BundleError, match=r"along y and x they have \(512, 256\)"):
        load_bundle(folder)
    change(folder, "[network_options]", 'tta = "all"\n[network_options]')
    with pytest.raises(BundleError, match='tta is "all"; expected one of'):
        load_bundle(folder)


@pytest.mark.parametrize("changes", [(), (("slide", "volume"), *VOLUME)], ids=["slide", "volume"])
def test_what_is_written_reads_back_the_same(
    folder: Path, changes: tuple[tuple[str, str], ...]
) -> None:
    told = '[output]\ntemperature = 1.25\nlabels = ["No", "Yes, \\"maybe\\""]'
    change_all(folder, (*changes, ("[output]", told)))
    bundle = load_bundle(folder)
    assert bundle.temperature == 1.25
    (folder / "model.toml").write_text(bundle_toml(bundle, weights="model.safetensors"), "utf-8")
    assert load_bundle(folder) == bundle
    (folder / "model.toml").write_text(bundle_toml(bundle, weights=None), "utf-8")
    assert load_bundle(folder).weights_path is None
    # run.json, which is compared with it, holds lists
    assert bundle_table(bundle) == json.loads(json.dumps(bundle_table(bundle)))


def test_a_missing_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="expected a folder with a model"):
        load_bundle(tmp_path / "nothing")


def test_a_bundle_may_have_no_weights(folder: Path) -> None:
    change(folder, 'weights = "model.safetensors"', "")
    bundle = load_bundle(folder)
    assert bundle.weights_path is None
    assert bundle.weights_sha256 == ""


# the user's cache is found through XDG_CACHE_HOME; a file: URL needs no network
@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def with_url(folder: Path, source: Path, sha256: str) -> None:
    entry = f'weights = {{ url = "{source.as_uri()}", sha256 = "{sha256}" }}'
    change(folder, 'weights = "model.safetensors"', entry)


def test_weights_are_fetched_once_and_checked(folder: Path, cache: Path) -> None:
    source = folder / "far.safetensors"
    source.write_bytes(b"weights")
    with_url(folder, source, hashlib.sha256(b"weights").hexdigest())
    first = load_bundle(folder).weights_path
    assert first is not None
    assert first.read_bytes() == b"weights"
    assert cache in first.parents
    source.unlink()
    assert load_bundle(folder).weights_path == first


def test_weights_elsewhere_are_left_there_where_nobody_needs_them(
    folder: Path, cache: Path
) -> None:
    source = folder / "far.safetensors"
    source.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    with_url(folder, source, digest)
    bundle = load_bundle(folder, fetch=False)
    assert bundle.weights_path is None
    assert bundle.weights_origin == RemoteFile(url=source.as_uri(), sha256=digest)
    assert not cache.exists()
    load_bundle(folder)
    assert load_bundle(folder, fetch=False).weights_path is not None


def test_weights_of_another_digest_are_refused_and_removed(folder: Path, cache: Path) -> None:
    source = folder / "far.safetensors"
    source.write_bytes(b"other")
    with_url(folder, source, hashlib.sha256(b"weights").hexdigest())
    with pytest.raises(BundleError, match=r"expected [0-9a-f]{64}"):
        load_bundle(folder)
    assert not [p for p in cache.rglob("*") if p.is_file()]


def test_a_part_of_a_digest_is_enough_for_a_download_but_not_for_a_bundle(
    folder: Path, cache: Path
) -> None:
    source = folder / "far.safetensors"
    source.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert download(source.as_uri(), digest[:8]).read_bytes() == b"weights"
    with pytest.raises(BundleError, match="8 to 64 hex digits"):
        download(source.as_uri(), digest[:7])
    with_url(folder, source, digest[:8])
    with pytest.raises(BundleError, match="expected 64 hex digits"):
        load_bundle(folder)


def test_weights_that_cannot_be_fetched_are_refused(folder: Path, cache: Path) -> None:
    with_url(folder, folder / "nowhere.bin", "0" * 64)
    with pytest.raises(BundleError, match="cannot fetch"):
        load_bundle(folder)


def test_digests_are_of_the_whole_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"x" * 3_000_000).hexdigest()


IMAGES = MODEL.replace('"slide"', '"image"').replace(
    "mpp = 0.5", 'fit = [512, 512]\nscale = "minmax"\norient = "left"\npad = "square"'
)


def test_preparation_is_read_and_written(folder: Path) -> None:
    (folder / "model.toml").write_text(IMAGES, "utf-8")
    bundle = load_bundle(folder)
    assert (bundle.input.scale, bundle.input.orient, bundle.input.pad) == (
        "minmax",
        "left",
        "square",
    )
    assert bundle.input.interpolation == "linear"
    text = bundle_toml(bundle, weights="model.safetensors")
    assert "interpolation" not in text
    (folder / "model.toml").write_text(text, "utf-8")
    assert load_bundle(folder) == bundle


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            'scale = "minmax"',
            'scale = "most"',
            'input.scale is "most"; expected one of "minmax", "range", "zscore", or [low',
        ),
        (
            'scale = "minmax"',
            "scale = [1, 1]",
            "input.scale is [1.0, 1.0]; expected [low, high], rising",
        ),
        ('scale = "minmax"', "scale = [1]", "input.scale is [1]; expected"),
        ('orient = "left"', 'orient = "right"', 'input.orient is "right"; expected "left"'),
        ("fit = [512, 512]", "fit = [512, 256]", 'input.pad is "square"; expected a fit of equal'),
        (
            'pad = "square"',
            'interpolation = "best"',
            'input.interpolation is "best"; expected one of "cubic", "linear"',
        ),
    ],
)
def test_preparation_that_means_nothing_is_refused(
    folder: Path, old: str, new: str, told: str
) -> None:
    (folder / "model.toml").write_text(IMAGES.replace(old, new), "utf-8")
    with pytest.raises(BundleError, match=re.escape(told)):
        load_bundle(folder)


@pytest.mark.parametrize("key", ['scale = "range"', 'interpolation = "cubic"'])
def test_preparation_is_not_for_slides(folder: Path, key: str) -> None:
    change(folder, "mpp = 0.5", f"mpp = 0.5\n{key}")
    with pytest.raises(BundleError, match="is not for slides"):
        load_bundle(folder)


def test_limits_are_one_paragraph_and_no_part_of_what_masks_depend_on(folder: Path) -> None:
    before = load_bundle(folder)
    change(
        folder,
        "[network_options]",
        'limits = """\n- Four patients.\n- No "fat".\n"""\n[network_options]',
    )
    bundle = load_bundle(folder)
    assert bundle.limits == 'Four patients. No "fat".'
    assert bundle.digest == before.digest
    (folder / "model.toml").write_text(bundle_toml(bundle, weights="model.safetensors"), "utf-8")
    assert load_bundle(folder) == bundle
    change(folder, "[network_options]", "limits = 3\n[network_options]")
    with pytest.raises(BundleError, match="limits is 3; expected a paragraph"):
        load_bundle(folder)


def test_the_digest_is_of_the_bytes_that_are_loaded(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert bundle.read_weights() == b"0123456789"
    (folder / "model.safetensors").write_bytes(b"9876543210")
    assert bundle.weights_sha256 == hashlib.sha256(b"0123456789").hexdigest()
    with pytest.raises(BundleError, match=r"model\.safetensors has been replaced since"):
        bundle.read_weights()
