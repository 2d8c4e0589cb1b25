"""Runs as objects: what they hold is what lies in the files, in one frame and unit."""

import json
import logging
import shutil
import sys
from pathlib import Path

import dicoms
import nibabel
import numpy as np
import pandas
import pytest
import shapely
import zarr
from bundles import pointwise_bundle
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader
from PIL import Image
from scans import blobs, scan_bundle

from wsi_pipeline import SourceError, StoreError, open_run, open_runs, segment

NAMES = ["Background", "Tumor", "Stroma"]
CORNER = (301, 257)
"""Of the bounds of the slide that has some: what the positions in its GeoJSON count from."""


@pytest.fixture(scope="module")
def output(tmp_path_factory, slide_path, bounded):
    """Return an output folder of two slides, one with bounds and a coarser mask, and two scans."""
    place = tmp_path_factory.mktemp("opened")
    common = {"output": place / "out", "precision": "fp32", "device": "cpu"}
    shutil.copyfile(slide_path, place / "plain.tif")
    model = pointwise_bundle(place / "model", mpp=0.25)
    exact = {"model": model, "tissue": "none", "simplify_um": 0, "min_area_um2": 0}
    segment(place / "plain.tif", **exact, **common)
    segment(bounded, mask_mpp=0.5, **exact, **common)
    grey = (blobs((1033, 701)) // 4).astype(np.uint8)
    dicoms.write(place / "image.dcm", grey, PixelSpacing=[0.2, 0.1])
    image_model = scan_bundle(
        place / "images", modality="image", resolution="fit = [1033, 701]", patch_size=(256, 256)
    )
    segment(place / "image.dcm", model=image_model, **common)
    affine = np.diag([0.9, 1.1, 2.5, 1.0])
    nibabel.save(nibabel.Nifti1Image(blobs((19, 43, 37)).T, affine), place / "volume.nii.gz")
    volume_model = scan_bundle(
        place / "volumes", resolution="spacing_mm = [2.5, 1.1, 0.9]", keys="scale = [0.0, 1024.0]"
    )
    segment(place / "volume.nii.gz", model=volume_model, **common)
    return place / "out"


@pytest.fixture
def folder(tmp_path, output):
    """Return a copy of the run of the plain slide."""
    return Path(shutil.copytree(output / "plain", tmp_path / "out" / "plain"))


def test_the_mask_of_a_slide_is_its_file_with_its_micrometres(output):
    with open_run(output / "bounded") as run:
        stored = zarr.open_group(output / "bounded" / "mask.ome.zarr", mode="r")
        assert run.mask.shape == (744, 966)
        assert run.mask.mpp == (0.5, 0.5)
        assert [level.shape for level in run.mask.levels] == [(744, 966)]
        assert np.array_equal(np.asarray(run.mask), stored["0"][:])
        assert np.array_equal(run.mask[100:500:2, 300], stored["0"][100:500:2, 300])
        assert [c.name for c in run.classes] == NAMES
        assert [c.color for c in run.classes] == [None, (200, 0, 0), (150, 200, 150)]
        areas = np.bincount(np.asarray(run.mask).ravel()) * 0.25e-6
        assert run.record.area_mm2 == pytest.approx(dict(zip(NAMES[1:], areas[1:], strict=True)))
        assert run.slide.size == (1931, 1487)
    with open_run(output / "plain" / "run.json") as run:
        assert [level.shape for level in run.mask.levels] == [(1487, 1931), (744, 966)]
        assert np.array_equal(run.mask.levels[1][:], run.mask[::2, ::2])


def test_nobody_changes_a_mask_by_way_of_a_run(folder):
    before = np.asarray(open_run(folder).mask)
    with pytest.raises(ValueError, match="read-only"):
        open_run(folder).mask.levels[0][:10] = 1
    assert np.array_equal(open_run(folder).mask, before)


@pytest.mark.parametrize("name", ["plain", "bounded", "image"])
@pytest.mark.parametrize("has_geopandas", [True, False])
def test_polygons_lie_on_the_whole_slide(output, name, has_geopandas, monkeypatch):
    run = open_run(output / name)
    written = json.loads((output / name / "annotations.geojson").read_text("utf-8"))["features"]
    if has_geopandas:
        pytest.importorskip("geopandas")
        table = run.polygons()
        shapes, classes, ids = table.geometry.to_list(), table["class"].to_list(), list(table["id"])
        assert [*table.columns[:3], table.columns[-1]] == ["id", "class", "name", "geometry"]
        measured = [row.dropna().to_dict() for _, row in table.iloc[:, 3:-1].iterrows()]
        assert measured == [f["properties"]["measurements"] for f in written]
        assert table.crs is None
    else:
        monkeypatch.setitem(sys.modules, "geopandas", None)
        features = run.polygons()
        assert json.loads(json.dumps(features[0]))["type"] == "Feature"
        assert [f.properties for f in features] == [f["properties"] for f in written]
        shapes = [shapely.geometry.shape(f.geometry) for f in features]
        classes = [f.properties["classification"]["name"] for f in features]
        ids = [f.id for f in features]
    assert ids == [f["id"] for f in written]
    x, y = CORNER if name == "bounded" else (0, 0)
    regions = run.regions()
    assert regions["id"].to_list() == ids
    assert regions["class"].to_list() == classes
    middles = [shape.centroid.coords[0] for shape in shapes]
    assert np.allclose(regions[["centroid_x", "centroid_y"]], middles, atol=0.01)
    for shape, feature in zip(shapes, written, strict=True):
        ring = np.add(feature["geometry"]["coordinates"][0], (x, y))
        assert np.allclose(shape.exterior.coords, ring)
    # Class of the polygon around the middle of a pixel, and of that pixel of the mask.
    factor = 2 if name == "bounded" else 1
    height, width = run.mask.shape
    rows, columns = np.random.default_rng(0).integers(0, (height, width), (300, 2)).T
    if name == "bounded":
        is_inside = (columns > 151) & (columns < 750) & (rows > 129) & (rows < 628)
        rows, columns = rows[is_inside], columns[is_inside]
    found = np.zeros(len(rows), int)
    for shape, of in zip(shapes, classes, strict=True):
        inside = shapely.contains_xy(shape, (columns + 0.5) * factor, (rows + 0.5) * factor)
        found[inside] = [c.name for c in run.classes].index(of)
    assert len(set(found)) == 3
    assert np.array_equal(found, np.asarray(run.mask)[rows, columns])


def test_polygons_that_a_person_has_edited_are_taken(folder, caplog):
    path = folder / "annotations.geojson"
    square = [[[0, 0], [4, 0], [4, 4], [0, 4], [0, 0]]]
    odd = [{"type": "MultiPolygon", "coordinates": [square, [[[9, 9], [8, 9], [8, 8], [9, 9]]]]}]
    odd += [{"type": "Point", "coordinates": [1, 1]}, {"type": "Polygon", "coordinates": "x"}]
    properties = {"classification": {"name": "Mine"}, "measurements": {"name": 1.0, "geometry": 2}}
    features = [{"type": "Feature", "geometry": g, "properties": properties} for g in odd]
    path.write_text(json.dumps(features), "utf-8")
    with caplog.at_level(logging.WARNING):
        polygons = open_run(folder).polygons()
    assert len(polygons) == 2
    assert "left out 1 feature" in caplog.text
    path.write_text('{"type": "FeatureCollection", "features": []}', "utf-8")
    assert len(open_run(folder).polygons()) == 0


def test_an_image_has_halves_and_a_volume_the_axes_of_its_scan(output, tmp_path):
    with open_run(output / "image") as run:
        classes = np.asarray(Image.open(output / "image" / "mask.png"))
        assert run.mask.mpp == pytest.approx((200, 100))
        assert [level.shape for level in run.mask.levels] == [(1033, 701), (517, 351)]
        assert np.array_equal(run.mask, classes)
        assert np.array_equal(run.mask.levels[1], classes[::2, ::2])
        assert run.slide.shape == classes.shape
        with Image.open(output / "image" / "overlay.png") as picture:
            assert np.array_equal(run.overlay(), picture)
    with open_run(output / "volume") as run:
        voxels = np.asarray(nibabel.load(output / "volume" / "mask.nii.gz").dataobj).T
        assert run.mask.mpp == pytest.approx((2500, 1100, 900))
        assert np.array_equal(run.mask, voxels)
        assert np.array_equal(run.mask[7], voxels[7])
        assert run.slide.shape == voxels.shape
        with pytest.raises(StoreError, match=r"no annotations\.geojson; if the volume can have it"):
            run.polygons()
    # corrected elsewhere, its axes in another order
    corrected = Path(shutil.copytree(output / "volume", tmp_path / "volume"))
    turned = nibabel.load(corrected / "mask.nii.gz").as_reoriented([[2, 1], [0, -1], [1, 1]])
    nibabel.save(turned, corrected / "mask.nii.gz")
    assert np.array_equal(open_run(corrected, slide=output.parent / "volume.nii.gz").mask, voxels)


def test_what_is_not_there_is_said(folder, output, tmp_path, slide_pixels, make_slide):
    moved = shutil.copyfile(output.parent / "plain.tif", tmp_path / "moved.tif")
    record = json.loads((folder / "run.json").read_text("utf-8"))
    record["slide"]["path"] = str(tmp_path / "gone.tif")
    (folder / "run.json").write_text(json.dumps(record), "utf-8")
    with pytest.raises(SourceError, match=r"not found at .*gone\.tif"):
        _ = open_run(folder).slide
    with open_run(folder, slide=moved) as run:
        assert run.slide.size == (1931, 1487)
    other = make_slide(tmp_path / "other.tif", slide_pixels[::-1], 0.25)
    with pytest.raises(SourceError, match="not the slide that was segmented"):
        _ = open_run(folder, slide=other).slide
    for name in ("annotations.geojson", "overlay.png"):
        (folder / name).unlink()
    shutil.rmtree(folder / "mask.ome.zarr")
    run = open_run(folder)
    with pytest.raises(StoreError, match=r"no mask\.ome\.zarr"):
        _ = run.mask
    with pytest.raises(
        StoreError, match=r"no annotations\.geojson; if the slide can have it, name it"
    ):
        run.polygons()
    with pytest.raises(StoreError, match=r"no overlay\.png; if the slide can have it"):
        run.overlay()
    (folder / "overlay.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(StoreError, match="cannot be read as a picture"):
        run.overlay()
    with pytest.raises(StoreError, match="behind a URL"):
        open_run("memory://out/slide")


def test_regions_are_a_table_in_the_frame_and_words_of_polygons(tmp_path, output):
    folder = Path(shutil.copytree(output / "bounded", tmp_path / "bounded"))
    path = folder / "regions.csv"
    head = "id,class,area_um2,centroid_x,centroid_y,probability_mean\r\n"
    path.write_text(head + "7,NA,1.5,10,20.5,\r\n8,'-ve,2,0,0,0.5\r\n9,'s,1,1,1,1\r\n", "utf-8")
    table = open_run(folder).regions()
    assert isinstance(table, pandas.DataFrame)
    assert table["id"].to_list() == ["7", "8", "9"]
    assert table["class"].to_list() == ["NA", "-ve", "'s"]
    assert table["area_um2"].sum() == 4.5
    assert table["probability_mean"].isna().to_list() == [True, False, False]
    assert table["centroid_x"].to_list() == [CORNER[0] + 10, CORNER[0], CORNER[0] + 1]
    assert table["centroid_y"].to_list() == [CORNER[1] + 20.5, CORNER[1], CORNER[1] + 1]
    path.write_text(head, "utf-8")
    assert len(open_run(folder).regions()) == 0
    for damaged in (b"", b"\xff\xfe,\n1", b"a,b\n1,2\n", head.encode() + b"7,NA,1.5,x,y,\n"):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match="cannot be read as a table"):
            open_run(folder).regions()
    path.unlink()
    with pytest.raises(StoreError, match=r"no regions\.csv"):
        open_run(folder).regions()


@pytest.mark.parametrize("name", ["plain", "bounded"])
def test_probabilities_tell_the_mask(output, name):
    run = open_run(output / name)
    stored = zarr.open_group(output / name / "probability.ome.zarr", mode="r")["0"]
    assert np.array_equal(run.probability, stored[:])
    assert run.probability.shape == (2, 1487, 1931)
    assert run.probability.mpp == pytest.approx((0.25, 0.25))
    assert run.probability.classes == NAMES[1:]
    of_classes = run.probability.read((100, 200), (700, 900))
    every = np.concatenate([1 - of_classes.sum(0, keepdims=True), of_classes])
    margin = np.diff(np.sort(every, axis=0)[-2:], axis=0)[0]
    differs = every.argmax(0) != run.mask[100:700, 200:900]
    assert (margin > 0.02).mean() > 0.9
    assert margin[differs].max(initial=0) < 0.02


@pytest.mark.parametrize(("name", "mpp"), [("image", (200, 100)), ("volume", None)])
def test_probabilities_of_images_and_volumes_tell_their_masks(output, tmp_path, name, mpp):
    with open_run(output / name) as run:
        planes, mask, layer = run.probability[:], run.mask[:], run.probability
    assert layer.mpp == pytest.approx(mpp or run.mask.mpp)
    assert planes.shape == (2, *mask.shape)
    # `Steps` is sure of all.
    assert (planes == 255 * (mask == np.arange(1, 3).reshape(2, *[1] * mask.ndim))).all()
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(output / name / "run.json", folder)
    with pytest.raises(StoreError, match=rf"no probability\.ome\.zarr; if the {name} can"):
        _ = open_run(folder).probability


@pytest.mark.parametrize("name", ["plain", "bounded"])
def test_ome_zarr_py_sees_what_a_run_holds(output, name):
    run = open_run(output / name)
    image, _, labels = Reader(parse_url(output / name / "mask.ome.zarr"))()
    (probability,) = Reader(parse_url(output / name / "probability.ome.zarr"))()
    for node, layer in ((image, run.mask), (labels, run.mask), (probability, run.probability)):
        scales = [of[0]["scale"][-2:] for of in node.metadata["coordinateTransformations"]]
        assert scales == [[mpp * 2**n for mpp in layer.mpp] for n in range(len(layer.levels))]
        assert [d.shape for d in node.data] == [level.shape for level in layer.levels]
        assert [(a["name"], a["unit"]) for a in node.metadata["axes"][-2:]] == [
            ("y", "micrometer"), ("x", "micrometer"),
        ]  # fmt: skip
        assert np.array_equal(np.asarray(node.data[0]), layer)
    assert [p["class"] for p in labels.metadata["properties"].values()] == NAMES
    colors = [np.multiply(c, 255).round().tolist() for c in labels.metadata["color"].values()]
    assert colors == [[*(c.color or (0, 0, 0)), 255 if c.color else 0] for c in run.classes]
    assert probability.metadata["channel_names"] == NAMES[1:]
    brightest = [np.multiply(c[1], 255).round().tolist() for c in probability.metadata["colormap"]]
    assert brightest == [[*c.color] for c in run.classes[1:]]


def test_all_runs_below_a_folder_come_in_order(output, tmp_path, caplog):
    assert [run.folder.name for run in open_runs(output)] == ["bounded", "image", "plain", "volume"]
    for name in ("b/x", "a/z", "a/y", "a/damaged"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copyfile(output / "plain" / "run.json", tmp_path / name / "run.json")
    (tmp_path / "a/damaged/run.json").write_text("{}")
    (tmp_path / "a/y/mask.ome.zarr").mkdir()
    shutil.copyfile(output / "plain" / "run.json", tmp_path / "a/y/mask.ome.zarr/run.json")
    found = [run.folder.relative_to(tmp_path).as_posix() for run in open_runs(tmp_path)]
    assert found == ["a/y", "a/z", "b/x"]
    assert "left out of the list" in caplog.text
    assert [run.folder for run in open_runs(output / "plain")] == [output / "plain"]
    for empty in (tmp_path / "a/y/mask.ome.zarr/0", tmp_path / "nowhere"):
        with pytest.raises(StoreError, match="no run below"):
            open_runs(empty)


def test_a_run_that_failed_says_so(tmp_path, output):
    (tmp_path / "broken.tif").write_bytes(b"II*\0 no slide")
    segment(tmp_path / "broken.tif", model=output.parent / "model", output=tmp_path / "out")
    (run,) = open_runs(tmp_path / "out")
    assert run.record.status == "failed"
    for name in ("slide", "mask"):
        with pytest.raises((StoreError, SourceError), match="broken") as found:
            getattr(run, name)
        assert "version" not in str(found.value)
