"""Shares of classes in spots: files in the columns of Space Ranger and Xenium, made up here."""

import json

import numpy as np
import pandas as pd
import pytest
import zarr
from bundles import pointwise_bundle
from click.testing import CliRunner
from test_geoparquet import segment, uneven_slide

from wsi_pipeline import AnnotationError, measure_spots
from wsi_pipeline.cli import group
from wsi_pipeline.errors import EvaluationError

UM = (0.25, 0.5)
"""(x, y) µm per pixel of the slide, which has an odd size."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with runs of a slide, in `out` as it is and in `coarse` of a coarser mask."""
    found = tmp_path_factory.mktemp("spots")
    uneven_slide(found / "s.tif", UM)
    pointwise_bundle(found / "model", mpp=0.5)
    outputs = ("--outputs", "zarr", "--tissue", "none")
    segment(found / "s.tif", found / "model", found / "out", *outputs)
    segment(found / "s.tif", found / "model", found / "coarse", *outputs, "--mask-mpp", 1)
    return found


def visium(folder, name, diameter, **more):
    """Write a folder as Space Ranger does; return its rows and columns of spots."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    # Some on the edge, and one beyond it.
    rows = np.append(rng.uniform(-20, 1060, 60), 3000.0)
    columns = np.append(rng.uniform(-20, 1300, 60), 40.0)
    table = pd.DataFrame({
        "barcode": [f"{i:04}ACGT-1" for i in range(61)], "in_tissue": 1, "array_row": 0,
        "array_col": range(61), "pxl_row_in_fullres": rows, "pxl_col_in_fullres": columns,
    })  # fmt: skip
    if name.endswith("parquet"):
        table.to_parquet(folder / name)
    else:
        table.to_csv(folder / name, index=False, header="list" not in name)
    told = {"spot_diameter_fullres": diameter, "tissue_hires_scalef": 0.17, **more}
    (folder / "scalefactors_json.json").write_text(json.dumps(told))
    return table["barcode"].tolist(), columns, rows


def expect(folder, downsample, columns, rows, radius, square=False):
    """Count pixels whose centre lies in shapes, by shapely."""
    mask = zarr.open_array(folder / "mask.ome.zarr" / "0", mode="r")[:]
    y, x = (np.indices(mask.shape) + 0.5) * np.reshape(downsample, (2, 1, 1))
    counts = []
    for at in zip(columns, rows, np.broadcast_to(radius, (len(rows), 2)), strict=True):
        (cx, cy), r = at[:2], at[2]
        u, v = (x - cx) / r[0], (y - cy) / r[1]
        inside = np.maximum(abs(u), abs(v)) <= 1 if square else u * u + v * v <= 1
        counts.append(np.bincount(mask[inside], minlength=3))
    return np.array(counts)


def check(found, counts, names):
    assert found.index.tolist() == names
    assert found.index.name == "spot"
    assert found["pixels"].tolist() == counts.sum(axis=1).tolist()
    shares = found[["share_Background", "share_Tumor", "share_Stroma"]].to_numpy()
    some = counts.sum(axis=1) > 0
    assert shares[some] == pytest.approx(counts[some] / counts[some].sum(axis=1, keepdims=True))
    assert np.isnan(shares[~some]).all()
    assert (shares[some] > 0).any(axis=0).all()


@pytest.mark.parametrize("kind", ["out", "coarse"])
@pytest.mark.parametrize(
    "name", ["tissue_positions.csv", "tissue_positions_list.csv", "tissue_positions.parquet"]
)
def test_spots_of_space_ranger_hold_what_one_counts(place, tmp_path, kind, name):
    names, columns, rows = visium(tmp_path / "spatial", name, 89.45)
    run = place / kind / "s"
    shape = zarr.open_array(run / "mask.ome.zarr" / "0", mode="r").shape
    downsample = (1, 1) if kind == "out" else (2, 4)
    assert shape == tuple(-(-n // d) for n, d in zip((1037, 1283), downsample, strict=True))
    found = measure_spots(run, tmp_path / "spatial")
    check(found, expect(run, downsample, columns, rows, 89.45 / 2), names)
    assert found["pixels"].iloc[-1] == 0


def test_bins_of_visium_hd_are_squares(place, tmp_path):
    more = {"bin_size_um": 8.0, "microns_per_pixel": 0.27}
    names, columns, rows = visium(tmp_path / "square", "tissue_positions.parquet", 29.3, **more)
    found = measure_spots(place / "out" / "s", tmp_path / "square")
    counts = expect(place / "out" / "s", (1, 1), columns, rows, 29.3 / 2, square=True)
    check(found, counts, names)


@pytest.mark.parametrize("name", ["cells.csv.gz", "cells.parquet"])
@pytest.mark.parametrize("is_aligned", [True, False])
def test_cells_of_xenium_are_circles_of_their_area(place, tmp_path, name, is_aligned):
    rng = np.random.default_rng(2)
    columns, rows = rng.uniform(0, 1283, 50), rng.uniform(0, 1037, 50)
    area = rng.uniform(20, 200, 50)
    matrix, pixel = np.array([[0.2, 1.9, 300.5], [-1.1, 0.1, 2000], [0, 0, 1]]), 0.2125
    if is_aligned:
        x, y = (matrix @ [columns, rows, np.ones(50)])[:2] * pixel
    else:
        x, y = columns * UM[0], rows * UM[1]
    cells = pd.DataFrame({
        "cell_id": [f"aaaa{i:04}-1" for i in range(50)], "x_centroid": x, "y_centroid": y,
        "transcript_counts": 1, "total_counts": 1, "cell_area": area, "nucleus_area": area / 3,
    })  # fmt: skip
    cells.to_parquet(tmp_path / name) if "parquet" in name else cells.to_csv(tmp_path / name)
    (tmp_path / "experiment.xenium").write_text(json.dumps({"pixel_size": pixel}))
    np.savetxt(tmp_path / "he_imagealignment.csv", matrix, delimiter=",")
    alignment = tmp_path / "he_imagealignment.csv" if is_aligned else None
    found = measure_spots(place / "out" / "s", tmp_path, alignment=alignment)
    assert found[["x", "y"]].to_numpy() == pytest.approx(np.transpose([columns, rows]))
    radius = np.sqrt(area / np.pi)[:, None] / UM
    check(found, expect(place / "out" / "s", (1, 1), columns, rows, radius), list(cells.cell_id))


def test_the_command_writes_a_row_for_each_spot(place, tmp_path):
    visium(tmp_path / "spatial", "tissue_positions.csv", 40)
    line = ["measure", str(place / "out" / "s"), "--spots", str(tmp_path / "spatial")]
    out = CliRunner().invoke(group, [*line, "--output", str(tmp_path / "spots.csv")])
    assert out.exit_code == 0, out.output
    found = pd.read_csv(tmp_path / "spots.csv", index_col="spot")
    pd.testing.assert_frame_equal(found, measure_spots(place / "out" / "s", tmp_path / "spatial"))
    assert CliRunner().invoke(group, line[:2]).exit_code == 2


@pytest.mark.parametrize("name", ["tissue_positions.csv", "cells.csv"])
def test_spots_are_rows_of_an_anndata(place, tmp_path, name):
    anndata = pytest.importorskip("anndata")
    spots, run = tmp_path / "spatial", place / "out" / "s"
    if name == "cells.csv":
        spots.mkdir()
        cells = {"cell_id": ["a-1", "b-1"], "x_centroid": [90, 1e4], "y_centroid": [250, 9]}
        pd.DataFrame({**cells, "cell_area": 80}).to_csv(spots / name)
    else:
        visium(spots, name, 40)
    line = ["measure", str(run), "--spots", str(spots), "--output", str(tmp_path / "s.h5ad")]
    out = CliRunner().invoke(group, line)
    assert out.exit_code == 0, out.output
    found, table = anndata.read_h5ad(tmp_path / "s.h5ad"), measure_spots(run, spots)
    assert found.obs_names.tolist() == table.index.tolist()
    assert found.var_names.tolist() == ["Background", "Tumor", "Stroma"]
    assert np.array_equal(found.X, table.filter(like="share_"), equal_nan=True)
    assert np.array_equal(found.obsm["spatial"], table[["x", "y"]])
    assert found.obs["pixels"].tolist() == table["pixels"].tolist()
    assert CliRunner().invoke(group, line).exit_code == 2
    within = [*line[:2], "--within", __file__, "--output", str(tmp_path / "w.h5ad")]
    assert "only --spots" in CliRunner().invoke(group, within).output


def test_what_is_no_such_folder_is_said(place, tmp_path):
    run = place / "out" / "s"
    with pytest.raises(AnnotationError, match=r"neither tissue_positions\.csv"):
        measure_spots(run, tmp_path)
    visium(tmp_path / "spatial", "tissue_positions.csv", 40)
    (tmp_path / "spatial" / "scalefactors_json.json").write_text("[]")
    with pytest.raises(AnnotationError, match="spatial"):
        measure_spots(run, tmp_path / "spatial")
    (tmp_path / "spatial" / "scalefactors_json.json").unlink()
    with pytest.raises(AnnotationError, match="scalefactors_json"):
        measure_spots(run, tmp_path / "spatial")
    visium(tmp_path / "far", "tissue_positions.csv", 0.001)
    with pytest.raises(AnnotationError, match="no spot lies on the slide of 1283 × 1037 px"):
        measure_spots(run, tmp_path / "far")
    with pytest.raises(EvaluationError):
        measure_spots(tmp_path, tmp_path / "far")
    with pytest.raises(AnnotationError, match="far is of Space Ranger; an alignment is for Xenium"):
        measure_spots(run, tmp_path / "far", alignment=__file__)
    line = ["measure", str(run), "--within", __file__, "--alignment", __file__]
    assert "--alignment is for --spots of Xenium" in CliRunner().invoke(group, line).output
