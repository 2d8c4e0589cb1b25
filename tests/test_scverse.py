"""Regions as AnnData, and whole slides as SpatialData, opened by their own readers."""

import os

import geopandas
import numpy as np
import pandas
import pytest
import zarr
from bundles import pointwise_bundle
from PIL import Image
from scans import scan_bundle
from test_geoparquet import call, segment, uneven_slide

from wsi_pipeline import open_run
from wsi_pipeline.export import ome_zarr
from wsi_pipeline.files.atomic import sha256_of
from wsi_pipeline.report.record import load_run

# Readers, and what they are made of, warn of each other.
pytestmark = pytest.mark.filterwarnings("ignore")
anndata = pytest.importorskip("anndata")
UM = (0.25, 0.5)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a model, and a slide of an odd size with pixels that are no squares."""
    found = tmp_path_factory.mktemp("scverse")
    uneven_slide(found / "s.tif", UM)
    pointwise_bundle(found / "model", mpp=0.5)
    return found


def check_table(table, folder, offset=(0, 0)):
    """Compare an AnnData with the table that is written for everybody."""
    with open_run(folder) as run:
        wanted, colors = run.regions().set_index("id"), run.record.colors
    wanted[["centroid_x", "centroid_y"]] -= offset
    assert len(table) == len(wanted) > 1
    assert table.obs_names.tolist() == wanted.index.tolist()
    assert table.obs["class"].astype(str).tolist() == wanted["class"].tolist()
    pandas.testing.assert_frame_equal(
        table.obs[wanted.columns[1:]], wanted[wanted.columns[1:]], check_dtype=False,
        check_names=False,
    )  # fmt: skip
    assert (table.obsm["spatial"] == table.obs[["centroid_x", "centroid_y"]]).all(axis=None)
    assert list(table.uns["class_colors"]) == [
        "#{:02x}{:02x}{:02x}".format(*colors[name]) for name in table.obs["class"].cat.categories
    ]


def test_regions_are_rows_of_an_anndata(place, bounded, tmp_path):
    outputs = ("--outputs", "zarr,geojson,anndata", "--tissue", "none")
    folder = segment(place / "s.tif", place / "model", tmp_path, *outputs)
    table = anndata.read_h5ad(folder / "regions.h5ad")
    check_table(table, folder)
    run = load_run(folder)
    assert table.uns["wsi_pipeline"]["run"] == run.settings["key"]
    assert table.uns["wsi_pipeline"]["um_per_pixel"] == pytest.approx(UM)
    assert run.files["regions.h5ad"] == sha256_of(folder / "regions.h5ad")
    folder = segment(bounded, place / "model", tmp_path, *outputs)
    offset = load_run(folder).frame["offset"]
    assert offset != [0, 0]
    check_table(anndata.read_h5ad(folder / "regions.h5ad"), folder, offset)
    before = (folder / "regions.h5ad").read_bytes()
    (folder / "regions.h5ad").unlink()
    call("export", folder)
    assert (folder / "regions.h5ad").read_bytes() == before
    call("export", folder, "--for", "openslide")
    check_table(anndata.read_h5ad(folder / "regions.h5ad"), folder)
    call("export", folder, "--min-area", 1e9)
    assert anndata.read_h5ad(folder / "regions.h5ad").shape == (0, 0)


def test_regions_of_an_image_are_in_its_pixels(tmp_path):
    pixels = np.zeros((97, 141), np.uint8)
    pixels[10:30, 20:50], pixels[60:90, 100:141] = 180, 180
    Image.fromarray(pixels).save(tmp_path / "i.png")
    model = scan_bundle(
        tmp_path / "model", modality="image", resolution="fit = [97, 141]", patch_size=(64, 64)
    )
    folder = segment(tmp_path / "i.png", model, tmp_path / "o", "--outputs", "png,geojson,anndata")
    table = anndata.read_h5ad(folder / "regions.h5ad")
    check_table(table, folder)
    assert "area_px2" in table.obs
    assert "um_per_pixel" not in table.uns["wsi_pipeline"]


@pytest.fixture(params=["0.4", "0.5"])
def whole(request, place, bounded, tmp_path):
    """Return the folders of two runs with SpatialData: uneven pixels, and bounds."""
    more = ("--ngff", request.param, "--outputs", "zarr,geojson,spatialdata", "--tissue", "none")
    return [
        segment(place / "s.tif", place / "model", tmp_path, *more, "--mask-mpp", 0.5),
        segment(bounded, place / "model", tmp_path, *more),
    ]


def test_the_mask_is_there_once_by_chunks_and_all_is_made_again(whole):
    for folder in whole:
        made, levels = folder / "spatialdata.zarr", ome_zarr.open_levels(folder / "mask.ome.zarr")
        for i, level in enumerate(levels):
            array = zarr.open_array(made / "labels" / "mask" / str(i), mode="r", zarr_format=3)
            assert (array[:] == level[:]).all()
        chunks = [
            p
            for p in (folder / "mask.ome.zarr" / "0").rglob("*")
            if p.name.isdigit() and p.is_file()
        ]
        assert chunks
        assert {os.stat(p).st_nlink for p in chunks} == {3}
        assert "spatialdata.zarr" not in load_run(folder).files
        before = {p.relative_to(made): p.read_bytes() for p in made.rglob("*") if p.is_file()}
        (made / "zarr.json").write_text("{}")
        call("export", folder, "--min-area", 1e9)
        call("export", folder, "--min-area", 100)
        again = {p.relative_to(made): p.read_bytes() for p in made.rglob("*") if p.is_file()}
        assert again == before
        assert not [p for p in folder.iterdir() if p.name.endswith((".old", ".partial"))]


def test_spatialdata_reads_labels_shapes_and_table(whole):
    spatialdata = pytest.importorskip("spatialdata")
    from spatialdata.transformations import get_transformation

    for folder in whole:
        found = spatialdata.read_zarr(folder / "spatialdata.zarr")
        run = load_run(folder)
        um, offset = np.array(run.slide["mpp"]), np.array(run.frame["offset"])
        mask = ome_zarr.open_levels(folder / "mask.ome.zarr")
        labels = found.labels["mask"]
        assert len(labels) == len(mask)
        for i, level in enumerate(mask):
            assert (labels[f"scale{i}"]["image"].to_numpy() == level[:]).all()
        shapes = found.shapes["regions"]
        # Whatever frame the other files have.
        call("export", folder, "--for", "openslide")
        with open_run(folder) as opened:
            polygons, ratio = opened.polygons(), np.array(opened.mask.mpp[::-1]) / um
        assert shapes.geometry.geom_equals_exact(polygons.geometry, 1e-6).all()
        check_table(found.tables["measures"], folder)
        for system, unit in (("global", 1), ("microns", um)):
            axes = {"input_axes": ("x", "y"), "output_axes": ("x", "y")}
            to = [
                get_transformation(element, system).to_affine_matrix(**axes)
                for element in (labels, shapes)
            ]
            assert np.diag(to[0])[:2] == pytest.approx(ratio * unit)
            assert np.diag(to[1])[:2] == pytest.approx(np.ones(2) * unit)
        joined, table = spatialdata.join_spatialelement_table(
            sdata=found, spatial_element_names="regions", table_name="measures"
        )
        assert len(joined["regions"]) == len(table) == len(shapes)
        assert (joined["regions"]["id"] == table.obs_names).all()
        assert found.attrs["wsi_pipeline"]["classes"][0] == "Background"
        assert offset.any() == (folder.name == "bounded")
        assert isinstance(shapes, geopandas.GeoDataFrame)
