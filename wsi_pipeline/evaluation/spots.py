"""measure_spots(): the share of each class in spots of spatial transcriptomics."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from wsi_pipeline.errors import AnnotationError, EvaluationError, raised_as
from wsi_pipeline.evaluation.inputs import PART, place
from wsi_pipeline.evaluation.within import open_shown
from wsi_pipeline.files.atomic import written_beside
from wsi_pipeline.files.records import read_json

if TYPE_CHECKING:
    import pandas as pd

POSITIONS = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
"""Of Space Ranger: Visium HD, 2.0 and later, and before."""
VISIUM = (
    "barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres",
)  # fmt: skip
CELLS = ("cells.parquet", "cells.csv.gz", "cells.csv")
"""Of Xenium."""
UNREADABLE = (ImportError, OSError, LookupError, TypeError, ValueError)


class Spots(NamedTuple):
    """Where spots lie, x before y, in level-0 pixels.

    Attributes:
        names: of each.
        xy: (n, 2) their centres.
        radius: (n, 2), half of their extent.
        is_square: whether they are squares in place of circles.
    """

    names: list[str]
    xy: npt.NDArray[np.float64]
    radius: npt.NDArray[np.float64]
    is_square: bool


def measure_spots(
    run: str | Path, spots: str | Path, *, alignment: str | Path | None = None
) -> pd.DataFrame:
    """Measure the share of each class in each spot, 0 to 1; return a row for each by its name.

    Columns are the centre, `x` and `y` in level-0 pixels, `pixels`, the mask's pixels whose centre
    lies in the spot, and `share_<class>`, background included; NaN where there are no pixels.

    Args:
        run: folder of the run of a slide or image, of the very image that Space Ranger was given.
        spots: folder with Space Ranger's `tissue_positions` and `scalefactors_json.json`, or with
            Xenium's `cells`, each of which is a circle of the cell's area.
        alignment: CSV of Xenium Explorer, which takes pixels of the slide to those of Xenium; None
            = µm of Xenium are those of the slide.

    Raises:
        EvaluationError: no finished mask, or pixels whose size nobody knows.
        AnnotationError: the spots cannot be read, or none lies on the slide.
    """
    import pandas as pd

    run, spots = Path(run), Path(spots)
    with ExitStack() as closing:
        told, mask, slide = open_shown(run, closing)
        with raised_as(AnnotationError, UNREADABLE, spots):
            found = read_spots(spots, slide.mpp, alignment)
        scale = np.array(place(mask, slide, "openslide").downsample[::-1])
        centres, radii = found.xy / scale, found.radius / scale
        classes, size = [told.background, *told.colors], np.array(mask.pixels.shape[::-1])
        counts = np.zeros((len(centres), len(classes)), np.int64)
        first = np.ceil(centres - radii - 0.5).clip(0).astype(int)
        stop = np.minimum(np.floor(centres + radii - 0.5) + 1, size).astype(int)
        on_slide = (first < stop).all(axis=1)
        if not on_slide.any():
            raise AnnotationError(
                f"{spots}: no spot lies on the slide of {' × '.join(map(str, slide.size))} px; is "
                "it the image that they were found on?"
            )
        here = np.flatnonzero(on_slide)
        # Each part of the mask is read once, as far as the spots that begin in it reach.
        for group in pd.DataFrame(first[here] // PART).groupby([0, 1]).indices.values():
            mine = here[group]
            (left, top), (right, bottom) = first[mine].min(axis=0), stop[mine].max(axis=0)
            values = mask.read((slice(top, bottom), slice(left, right)))
            if (most := values.max()) >= len(classes):
                raise EvaluationError(
                    f"{mask.path} holds {most}, beyond its {len(classes)} classes"
                )
            for i in mine:
                low, high = first[i] - (left, top), stop[i] - (left, top)
                inside = values[low[1] : high[1], low[0] : high[0]]
                if not found.is_square:
                    x, y = (
                        (np.arange(first[i, k], stop[i, k]) + 0.5 - centres[i, k]) / radii[i, k]
                        for k in (0, 1)
                    )
                    inside = inside[x**2 + (y**2)[:, None] <= 1]
                counts[i] = np.bincount(inside.ravel(), minlength=len(classes))
    pixels = counts.sum(axis=1)
    with np.errstate(invalid="ignore"):
        shares = counts / pixels[:, None]
    columns = {"x": found.xy[:, 0], "y": found.xy[:, 1], "pixels": pixels}
    columns |= {f"share_{name}": share for name, share in zip(classes, shares.T, strict=True)}
    return pd.DataFrame(columns, index=pd.Index(found.names, name="spot"))


def write_spots(path: Path, spots: pd.DataFrame) -> None:
    """Write what `measure_spots` returned as AnnData, which squidpy opens; return nothing.

    `X` holds the shares, a row for each spot and a column for each class by its name; `obs` the
    pixels, and `obsm["spatial"]` the centres, (x, y) in level-0 pixels.

    Raises:
        EvaluationError: anndata is not installed.
    """
    with raised_as(EvaluationError, ImportError, "pip install 'wsi-pipeline[anndata]'"):
        from anndata import AnnData
    shares = spots.filter(regex="^share_").rename(columns=lambda name: name[len("share_") :])
    xy = spots[["x", "y"]].to_numpy()
    found = AnnData(shares, obs=spots[["pixels"]], obsm={"spatial": xy})
    with written_beside(path) as beside:
        found.write_h5ad(beside)


def read_spots(
    folder: Path, mpp: tuple[float, float] | None, alignment: str | Path | None = None
) -> Spots:
    """Read where spots of Space Ranger or cells of Xenium lie; return it.

    Args:
        mpp: (x, y) µm per pixel of the slide, which Xenium needs.

    Raises:
        AnnotationError: there are neither.
        EvaluationError: nobody knows how large the slide's pixels are.
        Exception: one of `UNREADABLE`, of a file that is another.
    """
    import pandas as pd

    there = [name for name in (*POSITIONS, *CELLS) if (folder / name).is_file()]
    if not there:
        expected = f"{POSITIONS[1]} of Space Ranger nor {CELLS[0]} of Xenium"
        raise AnnotationError(f"{folder} holds neither {expected}")
    if (name := there[0]) in POSITIONS:
        if alignment is not None:
            raise AnnotationError(f"{folder} is of Space Ranger; an alignment is for Xenium")
        told = read_json(folder / "scalefactors_json.json")
        if name == POSITIONS[2]:
            # Before Space Ranger 2.0 there was no head.
            found = pd.read_csv(folder / name, header=None, names=VISIUM)
        else:
            found = _table(folder / name)
        xy = found[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(float)
        radius = np.full_like(xy, float(told["spot_diameter_fullres"]) / 2)
        # Bins of Visium HD are squares, of which that is the side.
        return Spots(found["barcode"].astype(str).tolist(), xy, radius, "bin_size_um" in told)
    if mpp is None:
        raise EvaluationError("nobody knows how large the slide's pixels are; give segment --mpp")
    found = _table(folder / name)
    xy = found[["x_centroid", "y_centroid"]].to_numpy(float)
    radius = np.sqrt(found[["cell_area"]].to_numpy(float) / np.pi) / mpp
    if alignment is None:
        xy = xy / mpp
    else:
        matrix = np.linalg.inv(np.loadtxt(alignment, delimiter=",").reshape(3, 3))
        pixels = xy / read_json(folder / "experiment.xenium")["pixel_size"]
        xy = pixels @ matrix[:2, :2].T + matrix[:2, 2]
    return Spots(found["cell_id"].astype(str).tolist(), xy, radius, False)


def _table(path: Path) -> pd.DataFrame:
    import pandas as pd

    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
