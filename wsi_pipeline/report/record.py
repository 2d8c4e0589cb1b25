"""What a run leaves for people and scripts: run.json and summary.csv."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Required, TypedDict

from msgspec import Meta

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.errors import StoreError
from wsi_pipeline.files.paths import as_path, name_of
from wsi_pipeline.files.records import read_json
from wsi_pipeline.files.remote import reaching, write_whole
from wsi_pipeline.files.schema import converted
from wsi_pipeline.geometry import Region
from wsi_pipeline.options import ExportOptions, Output

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
NOT_OF_ALL = (
    "rule", "area_px", "volume_ml", "lesions", "labels", "quality_mm2", "unlike_percent",
    "disagreement_percent", "certificate",
)  # fmt: skip
"""Fields that are left out where they are empty."""
GREY = (128, 128, 128)
"""Of a class whose colour a run does not say."""


RUN_VERSION = 2
"""Of the record; 1 had no `version` and no `kind`."""
Whole = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
Sizes = Annotated[list[Whole], Meta(min_length=2, max_length=3)]
Spacings = Annotated[list[Finite], Meta(min_length=2, max_length=3)]
Color = Annotated[list[Annotated[int, Meta(ge=0, le=255)]], Meta(max_length=3)]
"""Red, green and blue; none where the bundle does not say."""


class BoundsFacts(TypedDict):
    """A part of a slide, in level-0 pixels."""

    x: Whole
    y: Whole
    width: Whole
    height: Whole


def bounds_facts(bounds: Region | None) -> BoundsFacts | None:
    """Return what a run says of the part of a slide that holds its content."""
    if bounds is None:
        return None
    return {"x": bounds.x, "y": bounds.y, "width": bounds.width, "height": bounds.height}


class SourceFacts(TypedDict, total=False):
    """What is told of a slide, image or volume; of one that could not be opened name and path.

    Sizes and spacings count x first.
    """

    name: Required[str]
    path: str
    size: Sizes
    mpp: tuple[Finite, Finite]
    mpp_source: str
    spacing_mm: Spacings | None
    bounds: BoundsFacts | None
    backend: str
    fingerprint: str


class ModelFacts(TypedDict, total=False):
    """What is told of a model; `input` as its `model.toml` has it, `origin` if it was fetched."""

    name: str
    weights_sha256: str
    encoder_sha256: str
    input: dict[str, Any]
    limits: str
    origin: dict[str, str]


class Certificate(TypedDict):
    """What `verify` holds a mask against.

    `sha256` is of the hashes of all blocks, which have this `block_shape`; `bundle` is the path of
    the model, `model` the digest of all in it that masks depend on; `computed` says in which number
    format blocks were, on what, with what.
    """

    sha256: str
    block_shape: Sizes
    bundle: str
    model: str
    computed: list[str]


class LesionFacts(TypedDict):
    """What is told of the lesions of a class; the largest are listed."""

    count: Whole
    largest_mm: Finite | None
    listed: NotRequired[list[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One source's finished folder, as `run.json` holds it.

    Attributes:
        status: "done", or "failed" with the reason; "busy", never written down, where another
            process works in the folder.
        reason: one sentence for people; "" where all is well.
        slide: what was segmented, whatever its kind.
        settings: options of the run.
        versions: of the software.
        patches: how many the grid has, were kept as tissue, were predicted.
        seconds: per stage; "total" is wall time.
        area_mm2: per class, from the mask's pixels, in the mask's order.
        colors: (red, green, blue) per class, 0 to 255.
        background: name of class 0.
        tissue_mm2: where the model looked, from the thumbnail.
        regions: polygons per class.
        largest: area of the largest polygon per class, in the unit of `amounts`.
        frame: `for` which viewer polygons and TIFF are, and their `offset` (x, y) in level-0 px.
        rule: thresholds and least margin by which `export` has made polygons, areas and overlay,
            where they are not the mask's.
        bad_regions: parts of the slide that could not be read.
        warnings: where the result may differ from what was asked.
        files: SHA-256 of each file that was written, by name; those of zarrs have none.
        area_px: per class, of an image whose pixels have no known size, in place of `area_mm2`.
        volume_ml: per class, of a volume, likewise.
        lesions: of images and volumes, per class: how many, and the size of each.
        labels: probability of each, where the network classifies.
        quality_mm2: of each class, what of it is out of focus, under a pen and so on.
        unlike_percent: of the patches, those unlike the tissue that the model was trained for; None
            where the model says nothing of it.
        disagreement_percent: of an ensemble, by how much its members differ, of all pixels that it
            looked at the mean; None where there is one model.
        certificate: of the mask; older versions gave none.
    """

    version: Annotated[int, Meta(ge=1, le=RUN_VERSION)] = RUN_VERSION
    kind: Literal["slide", "image", "volume"]
    status: Literal["done", "failed", "busy"]
    reason: str = ""
    slide: SourceFacts
    model: ModelFacts
    settings: dict[str, Any]
    versions: dict[str, str]
    patches: dict[str, Whole] = field(default_factory=dict)
    seconds: dict[str, Finite] = field(default_factory=dict)
    area_mm2: dict[str, Finite] = field(default_factory=dict)
    colors: dict[str, Color] = field(default_factory=dict)
    background: str = "Background"
    tissue_mm2: Finite = 0.0
    regions: dict[str, Whole] = field(default_factory=dict)
    largest: dict[str, Finite] = field(default_factory=dict)
    frame: dict[str, Any] = field(default_factory=dict)
    rule: dict[str, Any] = field(default_factory=dict)
    bad_regions: list[Any] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    area_px: dict[str, Whole] = field(default_factory=dict)
    volume_ml: dict[str, Finite] = field(default_factory=dict)
    lesions: dict[str, LesionFacts] = field(default_factory=dict)
    labels: dict[str, Finite] = field(default_factory=dict)
    quality_mm2: dict[str, dict[str, Finite]] = field(default_factory=dict)
    unlike_percent: Finite | None = None
    disagreement_percent: Finite | None = None
    certificate: Certificate | None = None

    def __post_init__(self) -> None:
        """Check what types do not tell.

        Raises:
            ValueError: a colour of one or two numbers.
        """
        if odd := [name for name, color in self.colors.items() if len(color) not in (0, 3)]:
            raise ValueError(f"the colour of {odd[0]} is {self.colors[odd[0]]}; expected 3 numbers")

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """Return the classes in the mask's order, the background first."""
        named = self.colors.items()
        return (
            ClassInfo(name=self.background),
            *(ClassInfo(name=n, color=(c[0], c[1], c[2]) if c else None) for n, c in named),
        )

    @property
    def amounts(self) -> Mapping[str, float]:
        """Return how much there is of each class, in `unit`."""
        return self.area_mm2 or self.volume_ml or self.area_px

    @property
    def unit(self) -> str:
        """Return the unit of the amounts, as people write it."""
        return "ml" if self.volume_ml else "px" if self.area_px else "mm²"


def write_run_json(path: Path, run: Run) -> None:
    """Write a run as strict JSON; the file appears when it is complete."""
    facts = {k: v for k, v in asdict(run).items() if v not in ({}, None) or k not in NOT_OF_ALL}
    text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def load_run(path: str | Path) -> Run:
    """Read a `run.json`, or that of a run's folder; return the run.

    Raises:
        StoreError: the file cannot be read, or holds no run.
    """
    path = as_path(path)
    if name_of(path) != RUN_FILE and path.is_dir():
        path /= RUN_FILE
    try:
        found = read_json(path)
        if isinstance(found, dict) and "kind" not in found:
            found |= {"kind": _kind_of(found)}
        return converted(found, Run)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"{path} is not a run of this version ({error}); remove it or use --overwrite"
        ) from error


def run_in(folder: Path) -> Run | None:
    """Return the run that a folder holds, here or behind a URL, None where none can be read."""
    with suppress(StoreError), reaching(folder):
        return load_run(folder / RUN_FILE)
    return None


def _kind_of(found: dict[str, Any]) -> str:
    """Return what a run of version 1 segmented, as far as that could be opened."""
    slide = found.get("slide")
    if not isinstance(slide, dict) or "spacing_mm" not in slide:
        return "slide"
    return "image" if len(slide.get("size", ())) == 2 else "volume"


def run_files(output_dir: Path) -> list[Path]:
    """Return the records of the runs below an output folder, sorted.

    They lie in its folders, or in those of a folder that is of one of several models.
    """
    found = list[Path]()
    for folder in output_dir.glob("*/"):
        if (folder / RUN_FILE).is_file():
            found.append(folder / RUN_FILE)
        elif not folder.name.startswith("."):
            found += folder.glob(f"*/{RUN_FILE}")
    return sorted(found)


def find_runs(output_dir: Path) -> dict[Path, Run]:
    """Return all runs below an output folder by their folder, sorted; unreadable ones are logged.

    So that a summary holds what earlier calls and other machines have done as well.
    """
    runs = {}
    for path in run_files(output_dir):
        try:
            runs[path.parent] = load_run(path)
        except StoreError as error:
            logger.warning("left out of the summary: %s", error)
    return runs


def write_text(path: Path, text: str) -> None:
    """Write a text; the file appears when it is complete."""
    # file names that are no UTF-8 come with lone surrogates, which no encoding takes as they are
    write_whole(path, text.encode("utf-8", "backslashreplace"))


FILES: dict[Output, str] = {
    "zarr": "mask.ome.zarr",
    "overlay": "overlay.png",
    "geojson": "annotations.geojson",
    "geoparquet": "annotations.parquet",
    "anndata": "regions.h5ad",
    "spatialdata": "spatialdata.zarr",
    "tiff": "mask.ome.tif",
    "png": "mask.png",
    "nifti": "mask.nii.gz",
    "dicom": "mask.dcm",
    "probability": "probability.ome.zarr",
    "quality": "quality.ome.zarr",
}
"""The file of each output, in the order in which people want to see them."""
MASKS: tuple[Output, ...] = ("zarr", "png", "nifti")
"""Of which the others can be made again."""
ASAP_FILE = "mask.asap.tif"
REGIONS_FILE = "regions.csv"
PREVIEW_FILE = "preview.json"
DICOM_FILES = (
    *(f"mask-{level}.dcm" for level in range(1, 11)), "probability.dcm", "annotations.dcm",
)  # fmt: skip
"""What may lie beside a slide's `mask.dcm`; the largest slide has ten reduced levels."""
OUTPUT_FILES = (*FILES.values(), ASAP_FILE, REGIONS_FILE, *DICOM_FILES, PREVIEW_FILE)
"""All that a run may write beside `run.json`."""


def files_of(options: ExportOptions, written: Iterable[str] = ()) -> dict[Output, list[str]]:
    """Return the files of each output that is asked for.

    Args:
        written: names of the files that a run has written: it knows how many DICOM files it has.
    """
    found = {output: [FILES[output]] for output in options.outputs}
    if "dicom" in found:
        found["dicom"] += [name for name in written if name.endswith(".dcm")]
    if "geojson" in found:
        found["geojson"].append(REGIONS_FILE)
    if "tiff" in found and options.tiff == "asap":
        found["tiff"].append(ASAP_FILE)
    return found


UNREADABLE = ClassInfo(name="Unreadable", color=(255, 0, 255))
"""Class, after the bundle's own, of what patches cover and nothing can read."""
