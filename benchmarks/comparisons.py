"""What is compared with what: the claims, the runs that each needs, the figures taken of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Facts = Mapping[str, Mapping[str, Any]]
"""Of one round: label of a job → what it took."""

SMALL, MIDDLE, LARGE = (8192, 8192), (16384, 16384), (40960, 32768)
EVERYTHING = ("zarr", "tiff", "geojson", "overlay")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process to measure.

    Attributes:
        who: whose program; "unsynced" is ours without asking the disk to keep anything, "before"
            that of another checkout.
        size: (width, height) of the slide, half of it tissue.
        network: of programs.py.
        tissue: "mask" gives the slide's own tissue, the same to everybody; "auto" lets the program
            find it; "none" is the whole slide.
        outputs: what we write; peers write what they write.
        overlap: px between patches.
        mpp: µm per px of the slide.
        precision: number format of ours.
        old: the processor is told to be one with AVX2 and nothing newer.
    """

    who: Literal["ours", "unsynced", "before", "tiatoolbox", "fast", "floor", "stages"]
    size: tuple[int, int]
    network: str
    tissue: Literal["mask", "auto", "none"] = "mask"
    outputs: tuple[str, ...] = ("zarr",)
    overlap: int = 0
    mpp: float = 0.5
    precision: Literal["auto", "fp32", "int8"] = "auto"
    old: bool = False


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of a comparison, taken in each round.

    Attributes:
        text: what it is.
        of: computes it from a round.
        low: what it should at least be; None = whatever.
        high: what it should at most be.
    """

    text: str
    of: Callable[[Facts], float]
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Jobs that take turns, and what is read off them.

    Attributes:
        text: what it shows.
        jobs: by label, in the order of a round.
        figures: to take.
    """

    text: str
    jobs: Mapping[str, Job]
    figures: tuple[Figure, ...]


def ratio(key: str, of: str, to: str) -> Callable[[Facts], float]:
    """Return what divides a fact of one job by that of another, in the same round."""
    return lambda facts: facts[of][key] / facts[to][key]


def fact(label: str, key: str) -> Callable[[Facts], float]:
    """Return what takes a fact of one job."""
    return lambda facts: facts[label][key]


def _shipped(job: Job) -> Job:
    return replace(job, network="shipped", overlap=64)


def _against(
    peer: Literal["tiatoolbox", "fast"], job: Job, *, times: float, text: str
) -> Comparison:
    name = {"tiatoolbox": "TIAToolbox", "fast": "FAST"}[peer]
    jobs: dict[str, Job] = {"ours": job, peer: replace(job, who=peer)}
    figures: tuple[Figure, ...] = ()
    if peer == "tiatoolbox" and job.network != "null":
        # It computes in fp32, whatever the processor has.
        jobs = {"fp32": replace(job, precision="fp32"), **jobs}
        in_fp32 = Figure(
            text=f"{name}'s time ÷ ours in fp32, as it computes", of=ratio("seconds", peer, "fp32")
        )
        figures = (in_fp32,)
    return Comparison(
        text=text,
        jobs=jobs,
        figures=(
            Figure(text=f"{name}'s time ÷ ours", of=ratio("seconds", peer, "ours"), low=times),
            *figures,
            Figure(
                text=f"the same without start-up: {name}'s job ÷ ours",
                of=ratio("job_seconds", peer, "ours"),
            ),
            Figure(text=f"{name}'s processor time ÷ ours", of=ratio("cpu_seconds", peer, "ours")),
            Figure(text=f"{name}'s peak memory ÷ ours", of=ratio("peak_gb", peer, "ours")),
            Figure(text="pixels in which both masks agree", of=fact(peer, "agreement")),
        ),
    )


def _since(jobs: Mapping[str, Job], text: str, high: float | None = None) -> Comparison:
    """Compare each job with the same by another checkout, which has " before" to its label.

    That knows no int8, and takes the best that it has.
    """
    both: dict[str, Job] = {}
    figures: list[Figure] = []
    for label, job in jobs.items():
        old = f"{label} before"
        # Torch finds bf16 even where oneDNN is told to have no arithmetic for it.
        plain = "fp32" if job.old else "auto"
        same = plain if job.precision == "int8" else job.precision
        both |= {label: job, old: replace(job, who="before", precision=same)}
        figures += [
            Figure(text=f"{label}: time ÷ before", of=ratio("seconds", label, old), high=high),
            Figure(text=f"{label}: processor time ÷ before", of=ratio("cpu_seconds", label, old)),
        ]
    return Comparison(text=text, jobs=both, figures=tuple(figures))


_NULL = Job(who="ours", size=MIDDLE, network="null")
_LIGHT = Job(who="ours", size=MIDDLE, network="lightmuseg")
_VERSUS_TIATOOLBOX = _against(
    "tiatoolbox", _NULL, times=10, text="Null network, half tissue, zarr only, against TIAToolbox"
)
_LINEAR = Figure(
    text="time per tissue megapixel, large slide ÷ small",
    of=ratio("seconds_per_tissue_megapixel", "large", "small"),
    high=1.1,
)
_SINCE = (
    "The bundle of another checkout, end to end with tissue detection and all outputs, against "
    "the program of that checkout"
)
_BEFORE = Job(
    who="ours", size=MIDDLE, network="before", tissue="auto", outputs=EVERYTHING, overlap=64
)
_RATES = {
    f"{classes}, {mpp} µm/px, overlap {overlap}": Job(
        who="ours", size=SMALL, network=network, outputs=EVERYTHING, overlap=overlap, mpp=mpp
    )
    for classes, network in (("one class", "lightmuseg-one"), ("five", "lightmuseg"))
    for mpp in (0.5, 0.25)
    for overlap in (0, 128)
}
_TO_THE_FLOOR: Mapping[str, Job] = {
    "ours": replace(_LIGHT, tissue="auto", outputs=EVERYTHING),
    "floor": replace(_LIGHT, who="floor", tissue="auto"),
    "stages": replace(_LIGHT, who="stages", tissue="auto"),
}
_FLOOR_FIGURES = (
    Figure(
        text="our time ÷ the floor",
        of=lambda facts: facts["ours"]["seconds"] / facts["floor"]["floor_seconds"],
        high=1.3,
    ),
    Figure(
        text="the same without start-up",
        of=lambda facts: facts["ours"]["job_seconds"] / facts["floor"]["floor_seconds"],
    ),
    Figure(text="polygons", of=fact("ours", "regions")),
)

COMPARISONS: Mapping[str, Comparison] = {
    "null": replace(
        _VERSUS_TIATOOLBOX,
        figures=(
            *_VERSUS_TIATOOLBOX.figures,
            Figure(text="our peak memory, GB", of=fact("ours", "peak_gb"), high=1.5),
        ),
    ),
    "memory": Comparison(
        text="Null network, half tissue, zarr only: peak memory of a slide five times as large",
        jobs={"small": _NULL, "large": replace(_NULL, size=LARGE)},
        figures=(
            Figure(
                text="peak memory, large slide ÷ small",
                of=ratio("peak_gb", "large", "small"),
                low=0.85,
                high=1.15,
            ),
            Figure(text="peak memory of the large slide, GB", of=fact("large", "peak_gb")),
        ),
    ),
    "fast-null": _against(
        "fast",
        replace(_NULL, tissue="none", outputs=("tiff",)),
        times=2,
        text="Null network, whole slide, TIFF only, against FAST",
    ),
    "fast-lightmuseg": _against(
        "fast",
        replace(_LIGHT, size=SMALL, tissue="none", outputs=("tiff",)),
        times=1.4,
        text="LightMuSeg, whole slide, TIFF only, against FAST",
    ),
    "lightmuseg-8192": _against(
        "tiatoolbox",
        replace(_LIGHT, size=SMALL),
        times=8,
        text="LightMuSeg, half tissue, zarr only, against TIAToolbox",
    ),
    "lightmuseg-16384": _against(
        "tiatoolbox", _LIGHT, times=8, text="LightMuSeg, half tissue, zarr only, against TIAToolbox"
    ),
    "floor": Comparison(
        text="LightMuSeg, end to end with tissue detection and all outputs, against the floor",
        jobs=_TO_THE_FLOOR,
        figures=_FLOOR_FIGURES,
    ),
    "floor-shipped": Comparison(
        text="The shipped bundle (trained; 256 px, overlap 64 px), end to end with tissue "
        "detection and all outputs, against the floor",
        jobs={label: _shipped(job) for label, job in _TO_THE_FLOOR.items()},
        figures=_FLOOR_FIGURES,
    ),
    "since": _since({"ours": _BEFORE}, _SINCE, high=0.8),
    "since-avx2": _since(
        {"ours": replace(_BEFORE, precision="fp32", old=True)},
        f"{_SINCE}: fp32 on a processor with AVX2 and nothing newer",
        high=0.6,
    ),
    "since-int8": _since(
        {
            "ours": replace(_BEFORE, precision="int8"),
            "ours, AVX2": replace(_BEFORE, precision="int8", old=True),
        },
        f"{_SINCE}: int8, which that has not",
        high=0.55,
    ),
    "rates": _since(
        _RATES, "LightMuSeg, all outputs: megapixels a second of every stage, against before"
    ),
    "durable": Comparison(
        text="Null network, half tissue, all outputs: what it costs that the disk has all of it",
        jobs={
            "ours": replace(_NULL, outputs=EVERYTHING),
            "unsynced": replace(_NULL, who="unsynced", outputs=EVERYTHING),
        },
        figures=(
            Figure(
                text="our time ÷ the same without fsync",
                of=ratio("seconds", "ours", "unsynced"),
                high=1.03,
            ),
        ),
    ),
    "patches": Comparison(
        text="Null network, overlap of 128 px, zarr only: patches predicted on one worker",
        jobs={"ours": replace(_NULL, overlap=128)},
        figures=(
            Figure(
                text="patches predicted ÷ patches in the grid",
                of=lambda facts: facts["ours"]["predicted"] / facts["ours"]["patches"],
                high=1.02,
            ),
        ),
    ),
    "linear": Comparison(
        text="Null network, half tissue, zarr and TIFF: does the time grow with the tissue?",
        jobs={
            "small": replace(_NULL, size=SMALL, outputs=("zarr", "tiff")),
            "large": replace(_NULL, size=LARGE, outputs=("zarr", "tiff")),
        },
        figures=(_LINEAR,),
    ),
    "linear-lightmuseg": Comparison(
        text="LightMuSeg, half tissue, all outputs: does the time grow with the tissue?",
        jobs={
            "small": replace(_LIGHT, size=SMALL, outputs=EVERYTHING),
            "large": replace(_LIGHT, size=LARGE, outputs=EVERYTHING),
        },
        figures=(_LINEAR,),
    ),
}
