"""The choices and defaults of a run; the command line and the library take them from here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, TypeVar

from wsi_pipeline.errors import UsageError

T = TypeVar("T")

Blend = Literal["gaussian", "constant", "crop"]
Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
Output = Literal[
    "zarr", "tiff", "png", "nifti", "dicom", "geojson", "geoparquet", "anndata", "spatialdata",
    "overlay", "probability", "quality",
]  # fmt: skip
Flaw = Literal["out-of-focus", "pen", "fold", "bubble", "blood"]
Tta = Literal["none", "flip", "mirror", "d4"]
Frame = Literal["qupath", "openslide"]
Icc = Literal["ignore", "apply"]
Ngff = Literal["0.4", "0.5"]
TiffKind = Literal["ome", "asap"]
Combine = Literal["mean", "vote"]
Queue = Literal["slurm"]
ProgramFormat = Literal["onnx", "torch-export"]

Turn = tuple[bool, tuple[int, ...]]
"""How a patch is shown: whether its last two axes are exchanged, and which are reversed then."""
DEVICES = r"auto|cpu|mps|cuda(:\d{1,4})?"
"""Pattern of what a device may be called."""
MPP_TOLERANCE = 0.02
"""A resolution this close to a whole multiple of the slide's own is taken as that multiple."""
OUTPUTS: Mapping[str, tuple[Output, ...]] = {
    "slide": ("zarr", "tiff", "geojson", "overlay", "probability"),
    "image": ("png", "dicom", "geojson", "overlay", "probability"),
    "volume": ("nifti", "dicom", "overlay", "probability"),
}
"""What is written where nothing is named, by a model's modality."""
ON_REQUEST: Mapping[str, tuple[Output, ...]] = {
    "slide": ("dicom", "geoparquet", "anndata", "spatialdata", "quality"),
    "image": ("geoparquet", "anndata"),
    "volume": (),
}
"""What can be written besides."""
POLYGONS: frozenset[Output] = frozenset(["geojson", "geoparquet", "anndata", "spatialdata"])
"""What tells regions, each in its own way."""
NEEDED: Mapping[Output, tuple[str, ...]] = {
    "geoparquet": ("pyarrow",),
    "anndata": ("anndata",),
    "spatialdata": ("anndata", "pyarrow"),
}
"""Packages without which an output cannot be written; an extra of its name brings them."""
SLIDES, PLANAR, VOLUMES = ("slide",), ("slide", "image"), ("volume",)
LIMITED: Mapping[tuple[str, str], tuple[str, tuple[str, ...]]] = {
    ("select", "time_point"): ("--time-point", VOLUMES),
    ("select", "series"): ("--series", PLANAR),
    ("select", "mpp"): ("--mpp", SLIDES),
    ("select", "tissue"): ("--tissue", SLIDES),
    ("select", "icc"): ("--icc", SLIDES),
    ("select", "roi"): ("--roi", SLIDES),
    ("select", "frame"): ("--for", SLIDES),
    ("select", "any_resolution"): ("--any-resolution", SLIDES),
    ("predict", "mask_mpp"): ("--mask-mpp", SLIDES),
    ("predict", "skip"): ("--skip", SLIDES),
    ("export", "ngff"): ("--ngff", SLIDES),
    ("export", "tiff"): ("--tiff", SLIDES),
    ("export", "probability_mpp"): ("--probability-mpp", SLIDES),
    ("export", "simplify_um"): ("--simplify", SLIDES),
    ("export", "min_area_um2"): ("--min-area", SLIDES),
    ("export", "frame"): ("--for", SLIDES),
    ("export", "max_unreadable"): ("--max-unreadable", SLIDES),
}
"""Options that mean something for some modalities only, what the command calls them, and which."""


def turns(tta: str, patch_size: Sequence[int], spacing: Sequence[float] = ()) -> list[Turn]:
    """Return the ways in which test-time augmentation shows a patch, as it is first.

    Args:
        tta: "none"; "flip" reverses x; "mirror" each set of axes; "d4" exchanges y and x, too.
        spacing: of the pixels along each axis, where they may differ.

    Raises:
        ValueError: "d4", of patches or pixels that are not the same along y and x.

    Example:
        >>> turns("mirror", (64, 96))
        [(False, ()), (False, (-2,)), (False, (-1,)), (False, (-2, -1))]
    """
    sides = [tuple(given[-2:]) for given in (patch_size, spacing) if given]
    if tta == "d4" and (odd := [pair for pair in sides if pair[0] != pair[1]]):
        raise ValueError(
            f'tta "d4" turns patches by a right angle, and along y and x they have {odd[0]}; '
            'expected the same, or tta "mirror"'
        )
    # Of a patch that is a slice deep the depth has no other side.
    axes = [axis for axis in range(-len(patch_size), 0) if patch_size[axis] > 1]
    sets = [f for n in range(len(axes) + 1) for f in combinations(axes, n)]
    if tta in ("none", "flip"):
        return [(False, ()), (False, (-1,))][: 1 + (tta == "flip")]
    return [(exchanged, f) for exchanged in (False, True)[: 1 + (tta == "d4")] for f in sets]


@dataclass(frozen=True, kw_only=True)
class SelectOptions:
    """Where on the slide to predict.

    Attributes:
        mpp: the slide's µm per pixel at level 0 where the file does not say; else None.
        series: which image of a file with several, from 0; None = the largest of RGB, or the frame
            that the file names.
        icc: "apply" brings the slide's colours to sRGB by its ICC profile.
        time_point: which volume of a file or series with several, from 0; None = there is one.
        tissue: "auto", "none", or the path of a mask image or GeoJSON of tissue.
        roi: GeoJSON polygons to which the mask is limited.
        frame: origin of GeoJSON that is read, where the slide has bounds.
        any_resolution: take slides that are too coarse for the model, too.
    """

    mpp: float | None = None
    series: int | None = None
    icc: Icc = "ignore"
    time_point: int | None = None
    tissue: Literal["auto", "none"] | Path = "auto"
    roi: Path | None = None
    frame: Frame = "qupath"
    any_resolution: bool = False

    def __post_init__(self) -> None:
        if self.tissue not in ("auto", "none"):
            object.__setattr__(self, "tissue", Path(self.tissue))
        if self.roi is not None:
            object.__setattr__(self, "roi", Path(self.roi))


@dataclass(frozen=True, kw_only=True)
class Rule:
    """By what a pixel gets its class, in place of the largest probability.

    Attributes:
        thresholds: probability by class, above 0 and at most 1; see `PredictOptions`.
        min_margin: see there.
    """

    thresholds: Mapping[str, float] = field(default_factory=dict)
    min_margin: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.thresholds or self.min_margin)

    def __str__(self) -> str:
        """Return the rule as the command line has it.

        Example:
            >>> str(Rule(thresholds={"Tumor": 0.7}))
            '--threshold Tumor=0.7'
        """
        told = [f"--threshold {name}={p:g}" for name, p in self.thresholds.items()]
        return " ".join(told + [f"--min-margin {self.min_margin:g}"] * (self.min_margin > 0))

    def of(self, classes: Sequence[str]) -> list[float | None]:
        """Return the threshold of each class but the background; None = it has none.

        Raises:
            UsageError: a class that is not among them, or a number that is no such probability.
        """
        if unknown := [name for name in self.thresholds if name not in classes]:
            raise UsageError(f"--threshold {unknown[0]}: the classes are {', '.join(classes)}")
        if wrong := [(n, p) for n, p in self.thresholds.items() if not 0 < p <= 1]:
            name, p = wrong[0]
            raise UsageError(f"--threshold {name}={p:g}: expected above 0, and at most 1")
        if not 0 <= self.min_margin <= 1:
            raise UsageError(f"--min-margin {self.min_margin:g}: expected a number from 0 to 1")
        return [self.thresholds.get(name) for name in classes]


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """How patches are predicted and blended; what changes the mask.

    Attributes:
        overlap: px between neighbouring patches at the model's resolution; None = the bundle's.
        blend: weights of overlapping predictions.
        device: "auto", "cpu", "cuda", "cuda:N", or "mps" of a Mac, which is untried.
        precision: "auto" picks the fastest floating-point format that the device has.
        batch_size: patches in one forward pass; None = chosen for the device.
        block_size: side of a block in mask pixels, a multiple of the mask's chunk; None = 2,048,
            or 4,096, the side of a shard, with OME-Zarr 0.5; 256 in volumes.
        mask_mpp: µm per pixel of the mask; None = the slide's level 0.
        thresholds: probability by class from which on a pixel may get it; a class without one must
            be the likeliest of all, the background among them.
        min_margin: by how much the likeliest must lead; pixels below are background.
        tta: how patches are shown, see `turns`; None = the bundle's. The mean counts.
        skip: what tissue is not to be; where it is, the mask is background.
    """

    overlap: int | None = None
    blend: Blend = "gaussian"
    device: str = "auto"
    precision: Precision = "auto"
    batch_size: int | None = None
    block_size: int | None = None
    mask_mpp: float | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    min_margin: float = 0.0
    tta: Tta | None = None
    skip: tuple[Flaw, ...] = ()

    @property
    def rule(self) -> Rule:
        """Return by what pixels get their class."""
        return Rule(thresholds=self.thresholds, min_margin=self.min_margin)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is written from a finished mask, and how.

    Attributes:
        outputs: which files to write; none named = all of `OUTPUTS`.
        ngff: version of the OME-Zarr mask and probabilities.
        tiff: "ome" for QuPath; "asap" writes ASAP's kind beside it.
        probability_mpp: µm per pixel of the probabilities, brought to a whole multiple of the
            model's; None = the model's own.
        simplify_um: root of the largest triangle that simplification may cut off, in µm; 0 = exact.
        min_area_um2: regions and holes below this area get no polygon, in µm².
        frame: origin of polygons and TIFF where the slide has bounds.
        max_unreadable: share of the patches' area that may be unreadable; beyond, a slide fails.
    """

    outputs: tuple[Output, ...] = ()
    ngff: Ngff = "0.4"
    tiff: TiffKind = "ome"
    probability_mpp: float | None = None
    simplify_um: float = 1.0
    min_area_um2: float = 100.0
    frame: Frame = "qupath"
    max_unreadable: float = 0.05


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Where blocks run.

    Attributes:
        workers: of this process, or jobs of `cluster`; ignored with `scheduler`.
        scheduler: address or scheduler file of a running dask scheduler.
        cluster: a queue to which workers are submitted as jobs, as dask's configuration says.
        gpus: numbers of this machine's GPUs; with more than one, each gets a process.
        blocks_in_hand: of a worker of this machine: while one is predicted, the others are read,
            written or traced. A GPU needs more of them to be kept busy.
        max_ram: bytes that the process may take; None = no limit. Workers elsewhere have limits
            of their own.
        threads: CPUs to keep busy with the network; None = all that this process may use.
    """

    workers: int = 1
    scheduler: str | None = None
    cluster: Queue | None = None
    gpus: tuple[int, ...] = ()
    blocks_in_hand: int = 2
    max_ram: int | None = None
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All options that a run's outputs depend on.

    Attributes:
        select: where to look.
        predict: how.
        export: what to write.
        named: what of `export` was asked for by name: where the same is asked for again, a finished
            run keeps what `export_again` has made of it. None = all that is not the default.
    """

    select: SelectOptions = field(default_factory=SelectOptions)
    predict: PredictOptions = field(default_factory=PredictOptions)
    export: ExportOptions = field(default_factory=ExportOptions)
    named: Mapping[str, Any] | None = None

    def as_plain(self) -> dict[str, dict[str, Any]]:
        """Return the options by group, as JSON holds them."""
        groups = {name: as_plain(getattr(self, name)) for name in ("select", "predict", "export")}
        usual = as_plain(ExportOptions())
        changed = {k: v for k, v in groups["export"].items() if v != usual[k]}
        return {**groups, "named": changed if self.named is None else dict(self.named)}

    def why_not(self, modality: str) -> str:
        """Return what of the options does not fit a model's modality, "" where all do.

        Args:
            modality: "slide", "image" or "volume".

        Example:
            >>> Settings(predict=PredictOptions(mask_mpp=1.0)).why_not("volume")
            '--mask-mpp is for slides'

        Raises:
            UsageError: a package that an output needs is not here.
        """
        fitting = OUTPUTS[modality] + ON_REQUEST[modality]
        if wrong := [name for name in self.export.outputs if name not in fitting]:
            return f"{wrong[0]} is no output for {modality}s, which have {', '.join(fitting)}"
        for output in self.export.outputs:
            if lacking := [p for p in NEEDED.get(output, ()) if find_spec(p) is None]:
                needs = f'{" and ".join(lacking)}: pip install "wsi-pipeline[{output}]"'
                raise UsageError(f"--outputs {output} needs {needs}")
        usual = Settings()
        for (group, name), (flag, kinds) in LIMITED.items():
            given, default = (getattr(getattr(of, group), name) for of in (self, usual))
            is_named = group == "export" and name in (self.named or ())
            if modality not in kinds and (is_named or given != default):
                return f"{flag} is for {' and '.join(f'{kind}s' for kind in kinds)}"
        return ""


ABOVE_0 = ("mpp", "batch_size", "block_size", "mask_mpp", "probability_mpp", "workers",
           "blocks_in_hand", "threads")  # fmt: skip
"""Options of which 0 and less mean nothing."""


def chosen(kind: Callable[..., T], options: Mapping[str, Any]) -> T:
    """Return a group of options with what is given of it.

    Args:
        kind: `SelectOptions` or another of the groups.

    Raises:
        UsageError: a number that means nothing.
    """
    names = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    for name in names.intersection(ABOVE_0):
        if (given := options.get(name)) is not None and not 0 < given < math.inf:
            raise UsageError(f"{name} is {given!r}; expected a number above 0")
    return kind(**{name: value for name, value in options.items() if name in names})


def as_plain(options: Any) -> dict[str, Any]:
    """Return a dataclass of options as JSON holds it.

    Example:
        >>> as_plain(ScheduleOptions(gpus=(0, 1)))["gpus"]
        [0, 1]
    """
    return {
        key: list(value)
        if isinstance(value, tuple)
        else str(value)
        if isinstance(value, Path)
        else value
        for key, value in asdict(options).items()
    }
