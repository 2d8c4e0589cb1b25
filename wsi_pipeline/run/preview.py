"""How much of each class slides hold, about, from one patch in a hundred."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
import torch

from wsi_pipeline.annotations import rasterise, read_region
from wsi_pipeline.errors import UsageError, WsiPipelineError
from wsi_pipeline.files.paths import Inputs
from wsi_pipeline.files.remote import write_whole
from wsi_pipeline.files.threads import map_in_threads
from wsi_pipeline.geometry import Region, Shape
from wsi_pipeline.inference.blend import Windows
from wsi_pipeline.inference.ensemble import open_predictor
from wsi_pipeline.inference.predictor import Predictor, number_format
from wsi_pipeline.report.record import PREVIEW_FILE
from wsi_pipeline.run.batch import Progress
from wsi_pipeline.run.estimate import passes_at_once
from wsi_pipeline.run.jobs import Job
from wsi_pipeline.run.main import Batch, bounded_memory, grouped, plan_batch
from wsi_pipeline.run.plan import Plan
from wsi_pipeline.run.previous import refuse_others
from wsi_pipeline.run.segment import fitting, kind_of, reason_of, settle_precision
from wsi_pipeline.run.slide_run import SlideRun
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.run.written import WrittenFiles
from wsi_pipeline.schedule.memory import cpu_count
from wsi_pipeline.sources import Slide
from wsi_pipeline.sources.pixels import Pixels
from wsi_pipeline.tissue.sampling import (
    PER_STRATUM,
    Indices,
    Table,
    draw,
    estimate,
    look,
    sample_size,
    stratify,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a few patches tell of a slide.

    Attributes:
        job: the slide and its folder.
        areas: mm² of each class but background: the estimate, and the ends of the 95 % interval.
        patches: how many were predicted.
        of: how many a run predicts.
        seconds: that it took.
        reason: why there is none; "" where all is well.
    """

    job: Job
    areas: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    patches: int = 0
    of: int = 0
    seconds: float = 0.0
    reason: str = ""


def preview(
    inputs: Inputs,
    *,
    model: str | Path | Sequence[str | Path],
    output: str | Path,
    work: str | Path | None = None,
    mpp_table: str | Path | None = None,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    progress: Callable[[Job, int, int], None] | None = None,
    ended: Callable[[Job, Preview], None] | None = None,
    **options: Any,
) -> list[Preview]:
    """Estimate the area of each class from a few patches of slides; return what they tell of each.

    `preview.json` in a slide's folder holds it. What `segment` does there, before or after, is not
    touched.

    Args:
        inputs: all but `ended` are those of `segment`.
        overwrite: preview where the run of another slide or model is, too.
        ended: told of each job and its preview.

    Raises:
        WsiPipelineError: nothing was found, the model or an option cannot be used.
        TypeError: an option that there is not.
    """
    batch = plan_batch(
        inputs,
        model=model,
        output=output,
        work=work,
        mpp_table=mpp_table,
        shard=shard,
        overwrite=overwrite,
        **grouped(options),
    )
    return preview_batch(batch, progress=progress, ended=ended)


def preview_batch(
    batch: Batch,
    *,
    progress: Callable[[Job, int, int], None] | None = None,
    ended: Callable[[Job, Preview], None] | None = None,
    too_large: Callable[[str], None] | None = None,
) -> list[Preview]:
    """Preview what was planned; return the preview of each job, of one that failed the reason.

    Args:
        too_large: see `run_batch`.

    Raises:
        UsageError: images or volumes, or workers elsewhere.
        WsiPipelineError: the process takes more memory than it may.
    """
    bundle, predict = batch.bundle, batch.settings.predict
    if kind_of(bundle) is not SlideRun:
        raise UsageError(f"--preview is for slides; {bundle.name} is for {bundle.modality}s")
    if len(batch.bundles) > 1:
        raise UsageError("--preview takes one model at a time")
    if batch.threads is None:
        raise UsageError("--preview works on this machine; leave --scheduler and --cluster out")
    found, told, max_ram = list[Preview](), list[str](), batch.schedule.max_ram
    passes = passes_at_once(bundle, batch.schedule.threads or cpu_count())

    def step(job: Job, done: int, of: int) -> None:
        if told:
            raise WsiPipelineError(told[0])
        if progress:
            progress(job, done, of)

    with (
        bounded_memory(max_ram, too_large or told.append, "lower --batch-size or raise the limit"),
        closing(open_predictor(bundle, predict, threads=passes)) as predictor,
    ):
        for job in batch.jobs:
            try:
                one = _preview(job, batch, predictor, partial(step, job))
            except Exception as error:
                if told:
                    # It is not the slide's fault.
                    raise
                # One bad slide must not end the night; of what is not ours a trace is kept.
                level = logging.DEBUG if isinstance(error, WsiPipelineError) else logging.ERROR
                logger.log(level, "%s failed", job.path, exc_info=True)
                one = Preview(job=job, reason=reason_of(job, error))
            found.append(one)
            if ended:
                ended(job, one)
    return found


def _preview(job: Job, batch: Batch, predictor: Predictor, progress: Progress) -> Preview:
    """Preview one slide, and write down what was found; return it."""
    start, bundle = time.perf_counter(), batch.bundle
    settings = replace(batch.settings, select=job.select(batch.settings.select))
    store = RunStore(folder=job.folder.absolute())
    with SlideRun(job.path, bundle, fitting(settings, bundle)) as run, store.claim():
        if not batch.overwrite:
            refuse_others(job, run.source.fingerprint, bundle)
        precision = number_format(settings.predict, bundle)
        settle_precision(run, job, precision, overwrite=batch.overwrite)
        # Nothing is kept: what an interrupted run has left here goes on as if this had not been.
        plan = run.lay_out(store, cpu_count(), keep=False)
        every = len(plan.grid)
        chosen = np.arange(every)
        strata = np.zeros(every, np.int64)
        if (size := sample_size(every)) < every:
            strata = stratify(look(run.stored), size // PER_STRATUM)
            chosen = draw(strata, size, np.random.default_rng(0))
        with closing(Cells(plan, run.source, predictor)) as cells:
            found = estimate(cells.measure(chosen, progress), strata, chosen, cells.whole)
        # Of background nothing is said, nor, in the last row, of what cannot be read.
        areas = {
            info.name: (mm2, low, high)
            for info, (mm2, low, high) in zip(bundle.classes[1:], found[1:].tolist(), strict=False)
        }
        facts = [
            {
                "class": name, "mm2": mm2, "low": low, "high": high, "patches": size,
                "of": every, "model": bundle.name, "run": run.key,
            }
            for name, (mm2, low, high) in areas.items()
        ]  # fmt: skip
        files = WrittenFiles(store)
        with files.staged() as stage:
            text = json.dumps(facts, indent=2, ensure_ascii=False)
            (stage / PREVIEW_FILE).write_text(text + "\n", "utf-8")
        if job.target:
            (name,) = files.placed
            there = WrittenFiles(store, job.target).free(PREVIEW_FILE)
            write_whole(job.target / there, (store.folder / name).read_bytes())
    seconds = time.perf_counter() - start
    return Preview(job=job, areas=areas, patches=size, of=every, seconds=seconds)


class Cells:
    """The parts of a slide for which its patches stand, and what a model finds in each.

    A pixel is in the cell of the patch whose middle is nearest, which weighs most there when a run
    blends: cells do not overlap, and together they are all that the run looks at.

    Attributes:
        whole: mm² of all cells together.
    """

    def __init__(self, plan: Plan, slide: Slide, predictor: Predictor) -> None:
        self._plan, self._predictor = plan, predictor
        # (y, x), as arrays are.
        self._size, self._mpp = slide.size[::-1], slide.mpp[::-1]
        self._windows = Windows(plan.grid, plan.predict.blend, torch.device("cpu"))
        self._roi = None if plan.roi is None else read_region(plan.roi, offset=plan.roi_offset)
        self._pixels = plan.pixels.open()
        spans = [self._windows.owned(self._start(patch)) for patch in range(len(plan.grid))]
        ends = np.array([[(part.start, part.stop) for part in span] for span in spans])
        ends = (ends.reshape(-1, 2, 2) + plan.grid.origins[:, :, None]).transpose(2, 0, 1)
        (y0, x0), (y1, x1) = np.minimum(ends * plan.downsample, self._size).transpose(0, 2, 1)
        covered = shapely.union_all(shapely.box(x0, y0, x1, y1))
        if self._roi is not None:
            covered = covered.intersection(shapely.union_all(self._roi))
        self.whole = covered.area * self._mpp[0] * self._mpp[1] * 1e-6

    def close(self) -> None:
        """Close the slide."""
        self._pixels.close()

    def measure(self, patches: Indices, progress: Progress | None = None) -> Table:
        """Predict patches; return (n, K + 1) mm² of each class, and of what cannot be read.

        Args:
            patches: (n,) indices in the grid.
        """
        predictor, size = self._predictor, self._plan.grid.patch_size
        lost, areas = len(predictor.bundle.classes), list[npt.NDArray[Any]]()

        def read(patch: int) -> tuple[int, Pixels, list[Region]]:
            bad: list[Region] = []
            return patch, self._pixels.reader(self._start(patch), size, bad), bad

        every = map_in_threads(read, patches.tolist())
        # Side by side in one region, so that the predictor has several to do at once.
        while some := list(itertools.islice(every, predictor.patches_at_once)):
            region = predictor.upload(np.concatenate([pixels for _, pixels, _ in some]))
            origins = np.array([(i * size[0], 0) for i in range(len(some))])
            answers = predictor.predict(region, origins)
            for (patch, _, bad), answer in zip(some, answers, strict=True):
                mm2, is_bad = self._cell(patch, bad)
                found = answer[:lost].argmax(0) if len(answer) > 1 else answer[0] > 0.5
                classes = np.where(is_bad, lost, found.cpu().numpy())
                areas.append(np.bincount(classes.ravel(), mm2.ravel(), minlength=lost + 1))
            if progress:
                progress(len(areas), len(patches))
        return np.array(areas).reshape(-1, lost + 1)

    def _start(self, patch: int) -> Shape:
        return tuple(self._plan.grid.origins[patch].tolist())

    def _cell(self, patch: int, bad: list[Region]) -> tuple[Table, npt.NDArray[np.bool_]]:
        """Return the mm² of each of a patch's pixels in its cell, and which cannot be read."""
        start, shape, scale = self._start(patch), self._plan.grid.patch_size, self._plan.downsample
        # The last pixels of the grid may reach over the slide's edge.
        sides = [
            np.diff(np.minimum((first + np.arange(count + 1)) * step, length)) * mpp
            for first, count, step, length, mpp in zip(
                start, shape, scale, self._size, self._mpp, strict=True
            )
        ]
        mm2 = np.outer(*sides) * self._owned(patch) * 1e-6
        (fy, fx), (rows, columns) = scale, mm2.shape
        burnt = partial(
            rasterise, shape=(rows, columns), origin=(start[0] * fy, start[1] * fx),
            downsample=(fy, fx),
        )  # fmt: skip
        if self._roi is not None:
            mm2 *= burnt(self._roi)
        return mm2, burnt([shapely.box(r.x, r.y, r.x + r.width, r.y + r.height) for r in bad])

    def _owned(self, patch: int) -> npt.NDArray[np.bool_]:
        """Return which pixels of a patch are in its cell, bool (*patch)."""
        origins, size = self._plan.grid.origins, np.array(self._plan.grid.patch_size)
        owned = np.zeros(size, bool)
        if self._windows.exclusive:
            owned[self._windows.owned(self._start(patch))] = True
            return owned
        near = self._plan.grid.touching(tuple(origins[patch]), tuple(origins[patch] + size))
        squares = []
        for axis, length in enumerate(size):
            middles = (origins[near, axis] - origins[patch, axis])[:, None] + (length - 1) / 2
            offset = np.abs(np.arange(length) - middles) / length
            squares.append(np.where(offset < 0.5, offset**2, np.inf).astype(np.float32))
        nearest = (squares[0][:, :, None] + squares[1][:, None]).argmin(axis=0)
        return np.asarray(near[nearest] == patch)
