"""Where two runs of one slide differ, by two models, versions or precisions: no truth is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.errors import EvaluationError, UsageError, WsiPipelineError
from wsi_pipeline.evaluation.compare import BLOCK
from wsi_pipeline.evaluation.confusion import Counts, Mask, count_block
from wsi_pipeline.evaluation.inputs import Reader, finished_run, open_side, reader_of, settle_slide
from wsi_pipeline.evaluation.masks import Pair
from wsi_pipeline.evaluation.meaning import BACKGROUND, LabelMap
from wsi_pipeline.export.features import FeatureOptions
from wsi_pipeline.export.geojson import write_geojson
from wsi_pipeline.export.polygons.trace import find_outlines, trace_mask
from wsi_pipeline.files.atomic import make_folders, written_beside
from wsi_pipeline.files.locks import make_folder, writing
from wsi_pipeline.files.tables import as_csv
from wsi_pipeline.files.threads import map_in_threads
from wsi_pipeline.geometry import Block, iter_blocks
from wsi_pipeline.options import ExportOptions
from wsi_pipeline.report.record import RUN_FILE
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.run.written import WrittenFiles

USUAL = ExportOptions()
MOST_CHANGES = 255
"""Pairs of classes that the values of a mask can tell apart."""
FIGURES = ("difference", "gained", "lost", "a", "b")
COLUMNS = ("slide", "class", *(f"{name}_{unit}" for unit in ("mm2", "px") for name in FIGURES))


@dataclass(frozen=True, kw_only=True, eq=False)
class Difference:
    """What two runs of one slide differ in.

    Attributes:
        slide: the name of the run's folder.
        reason: why they cannot be compared, in one sentence; "" where they were.
        classes: names of the classes of both, the background first.
        pixels: (K, K) how many have which class in A, by row, and in B, by column; not counted are
            those that either could not read.
        pixel_mm2: area of one; None = it is not known.
        regions: polygons that were written.
    """

    slide: str
    reason: str = ""
    classes: tuple[str, ...] = (BACKGROUND,)
    pixels: Counts
    pixel_mm2: float | None = None
    regions: int = 0

    @property
    def is_equal(self) -> bool:
        """Return whether no pixel has another class."""
        return not self.reason and self.pixels.sum() == np.trace(self.pixels)

    def rows(self) -> list[dict[str, Any]]:
        """Return what `diff.csv` says of each class but the background."""
        kept, before, after = np.diagonal(self.pixels), self.pixels.sum(1), self.pixels.sum(0)
        columns = np.stack([after - before, after - kept, before - kept, before, after], 1)
        rows = []
        for name, counts in zip(self.classes[1:], columns[1:].tolist(), strict=True):
            mm2 = [n * self.pixel_mm2 if self.pixel_mm2 else "" for n in counts]
            rows.append(dict(zip(COLUMNS, (self.slide, name, *mm2, *counts), strict=True)))
        return rows


def diff(
    run_a: str | Path,
    run_b: str | Path,
    *,
    output: str | Path,
    simplify_um: float = USUAL.simplify_um,
    min_area_um2: float = USUAL.min_area_um2,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Difference]:
    """Find where two runs of the same slides differ; return it for each slide, in their order.

    `diff.csv` is written, and `diff.geojson`, of several slides each in a folder of its own:
    polygons with both classes, largest first. Pixels are those of the finer
    mask. Slides that cannot be compared are among them, with their reason, and cost no other.

    Args:
        run_a: the folder of one run, or an output folder with many; so is `run_b`, and slides are
            paired by their folders' names.
        output: folder for the files; what a person has changed there stays.
        simplify_um: see `ExportOptions`; the table counts pixels.
        min_area_um2: see there.
        progress: told the slide, its blocks done and in all.

    Raises:
        UsageError: one run and a folder of many, or no run at all.
        StoreError: the output cannot be written.
    """
    a, b, output = Path(run_a), Path(run_b), Path(output)
    is_one = [(folder / RUN_FILE).is_file() for folder in (a, b)]
    if is_one[0] != is_one[1]:
        raise UsageError(f"{a} and {b}: give two runs, or two folders of runs")
    names = sorted({path.parent.name for side in (a, b) for path in side.glob(f"*/{RUN_FILE}")})
    pairs = {a.resolve().name: (a, b)} if is_one[0] else {n: (a / n, b / n) for n in names}
    if not pairs:
        raise UsageError(f"no runs in {a} and {b}")
    make_folder(output)
    found = []
    for name, pair in pairs.items():
        folder = output if is_one[0] else output / name
        try:
            found.append(_compare(name, pair, folder, simplify_um, min_area_um2, progress))
        except WsiPipelineError as error:
            found.append(Difference(slide=name, reason=str(error), pixels=np.zeros((1, 1), int)))
    rows = (list(row.values()) for difference in found for row in difference.rows())
    with _staged(output) as stage:
        # names of files may be no UTF-8
        text = as_csv([COLUMNS, *rows]).encode("utf-8", "backslashreplace")
        (stage / "diff.csv").write_bytes(text)
    return found


class Changes:
    """Two masks as one to slice: 0 where both have the same class, else the number of the change.

    Args:
        readers: of both.
        numbers: (256, 256) number of each change, by the class before and the one after.
        shape: (y, x).
        downsample: (y, x) level-0 pixels per pixel.
    """

    def __init__(
        self, readers: Sequence[Reader], numbers: Mask, shape: tuple[int, ...], downsample: Pair
    ) -> None:
        self.shape = shape
        self.numbers, self._readers, self._downsample = numbers, readers, downsample

    def both(self, key: tuple[slice, ...]) -> list[Mask]:
        """Return the classes of both in two slices."""
        start, shape = tuple(s.start for s in key), tuple(s.stop - s.start for s in key)
        return [reader.read(start, shape, self._downsample) for reader in self._readers]

    def __getitem__(self, key: Any, /) -> Mask:
        before, after = self.both(key)
        return self.numbers[before, after]


def _compare(
    name: str,
    folders: tuple[Path, Path],
    output: Path,
    simplify_um: float,
    min_area_um2: float,
    progress: Callable[[str, int, int], None] | None,
) -> Difference:
    """Count where two runs differ, and write the polygons of it; return the counts."""
    a, b = runs = [finished_run(folder) for folder in folders]
    if a.kind == "volume":
        raise EvaluationError("volumes have no polygons; compare them with `evaluate`")
    for fact in ("fingerprint", "size", "mpp", "spacing_mm"):
        if (one := a.slide.get(fact)) != (other := b.slide.get(fact)):
            raise EvaluationError(f"the runs are not of the same pixels: {fact} {one} and {other}")
    with ExitStack() as closing:
        how: dict[str, Any] = {"values": LabelMap(), "renamed": {}, "slide": None}
        sides = [open_side(f, **how, frame="openslide", closing=closing) for f in folders]
        classes = (BACKGROUND, *dict.fromkeys(n for side in sides for n in side.names))
        indices = {name: i for i, name in enumerate(classes) if i > 0}
        slide = settle_slide(sides, None, None)
        readers = [reader_of(side, slide, indices, "openslide") for side in sides]
        # the finer of both, so that no pixel of either is lost
        steps = zip(*(reader.downsample or (1.0, 1.0) for reader in readers), strict=True)
        y, x = (min(step) for step in steps)
        width, height = slide.size
        shape = math.ceil(height / y - 1e-6), math.ceil(width / x - 1e-6)
        changes = Changes(readers, np.zeros((256, 256), np.uint8), shape, (y, x))
        blocks = list(iter_blocks(shape, (BLOCK, BLOCK)))

        def count(block: Block) -> Counts:
            before, after = changes.both(block.slices)
            return count_block(after, before, len(classes), tolerance_px=None).matrix

        pixels, changed = np.zeros((len(classes),) * 2, np.int64), list[Block]()
        for done, counted in enumerate(map_in_threads(count, blocks), 1):
            pixels += counted
            if counted.sum() > np.trace(counted):
                changed.append(blocks[done - 1])
            if progress:
                progress(name, done, len(blocks))
        kinds = np.argwhere((pixels > 0) & ~np.eye(len(pixels), dtype=bool))
        if len(kinds) > MOST_CHANGES:
            raise EvaluationError(f"{len(kinds)} pairs of classes; at most {MOST_CHANGES} are told")
        for number, (before, after) in enumerate(kinds.tolist(), 1):
            changes.numbers[before, after] = number
        named = {f"{classes[i]} → {classes[j]}": (classes[i], classes[j]) for i, j in kinds}
        colors = {c.name: c.color for run in runs for c in run.classes if c.color}
        # in the colour of what came, or in grey where nothing did
        infos = [ClassInfo(name=k, color=colors.get(after)) for k, (_, after) in named.items()]
        options = FeatureOptions(
            classes=(ClassInfo(name="same"), *infos),
            downsample=(y, x),
            mpp=(slide.mpp[1], slide.mpp[0]) if slide.mpp else (1000, 1000),
            crop=slide.bounds if a.frame.get("for") == "qupath" else None,
            simplify_um=simplify_um if slide.mpp else 0,
            min_area_um2=min_area_um2 if slide.mpp else 0,
            namespace="/".join(run.settings["key"] for run in runs),
            unit="mm^2" if slide.mpp else "px^2",
            # How far apart changes are tells nothing.
            is_compared=False,
        )
        outlines = find_outlines(
            changes,
            trace_mask(changes, changed),
            block_size=BLOCK,
            tolerance=options.tolerance,
            min_pixels=options.min_pixels,
        )
        with _staged(output) as stage:
            path = stage / "diff.geojson"
            table = stage / "regions.csv"
            written = write_geojson(path, table, outlines, options)
            table.unlink()
            _rank(path, f"Area {options.unit}", named)
    return Difference(
        slide=name,
        classes=classes,
        pixels=pixels,
        pixel_mm2=options.pixel_mm2 if slide.mpp else None,
        regions=sum(written.regions.values()),
    )


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Yield a folder whose files get their places in another one, beside what people changed."""
    store = RunStore(folder=folder)
    with writing(folder):
        make_folders(store.path)
        with WrittenFiles(store).staged() as stage:
            yield stage


def _rank(path: Path, area: str, named: Mapping[str, tuple[str, str]]) -> None:
    """Put features in the order of their areas, largest first, with their rank and both classes.

    Args:
        area: name of the measurement.
        named: both classes, by the name of the change.
    """

    def read(line: bytes) -> dict[str, Any]:
        feature: dict[str, Any] = orjson.loads(line.rstrip(b",\n"))
        return feature

    # one feature a line, of which only the places are held
    with written_beside(path) as beside, path.open("rb") as old, beside.open("wb") as new:
        new.write(old.readline())
        places, place = list[tuple[float, int]](), old.tell()
        while (line := old.readline()).startswith(b'{"type":"Feature"'):
            places.append((-read(line)["properties"]["measurements"][area], place))
            place = old.tell()
        for rank, (_, place) in enumerate(sorted(places), 1):
            old.seek(place)
            feature = read(old.readline())
            properties = feature["properties"]
            before, after = named[properties["classification"]["name"]]
            properties["name"] = f"{rank}: {properties['classification']['name']}"
            properties["measurements"] = {area: properties["measurements"][area], "Rank": rank}
            properties["metadata"] = {"from": before, "to": after}
            new.write(b",\n" * (rank > 1) + orjson.dumps(feature))
        new.write(b"\n]}\n")
