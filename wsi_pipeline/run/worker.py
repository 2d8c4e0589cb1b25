"""What a worker does with one block: read once, predict, blend, write its mask, trace it.

All of it is the same in two dimensions and in three, for slides, images and volumes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from wsi_pipeline.annotations import rasterise, read_region
from wsi_pipeline.bundle import load_bundle
from wsi_pipeline.errors import BundleError, SourceError, raised_as
from wsi_pipeline.export.ome_zarr import open_mask, write_block
from wsi_pipeline.export.polygons.components import PROBABILITY_ONE, find_components
from wsi_pipeline.files.clock import Clock
from wsi_pipeline.files.locks import writing
from wsi_pipeline.files.paths import is_remote
from wsi_pipeline.geometry import Block, Region, Shape, box_slices, clear_outside
from wsi_pipeline.inference.blend import (
    Means,
    Pieces,
    Windows,
    iter_blended_rows,
    iter_owned,
    iter_sampled_rows,
)
from wsi_pipeline.inference.classes import best_class, every_class
from wsi_pipeline.inference.ensemble import kept_predictor
from wsi_pipeline.inference.patch_cache import PatchCache
from wsi_pipeline.inference.patch_queue import use_one_core
from wsi_pipeline.inference.predictor import NO_NUMBERS, Predictor, choose_device, telling_of
from wsi_pipeline.inference.unlike import load_familiar
from wsi_pipeline.run.plan import Plan
from wsi_pipeline.run.probability import choose, keep_planes
from wsi_pipeline.run.quality import crossed, judge, judged_box, leave_out
from wsi_pipeline.run.store import hash_block, settle
from wsi_pipeline.schedule.memory import free_memory, map_large_arrays
from wsi_pipeline.schedule.worker_state import WorkerCache
from wsi_pipeline.sources.pixels import Pixels

LEAST_KEPT, MOST_KEPT = 256 * 2**20, 768 * 2**20
"""Bytes of predictions of patches that straddle blocks, which each worker may keep in any case, and
at the most where memory is there: 0.5 GB serve five classes of a slide 100,000 px wide.
"""
NO_PATCH = 100.0
"""Logit of the background where no patch lies."""
STAGES = ("read", "predict", "write", "polygons")
"""Whose seconds the ledger holds for each block."""


class Prediction(NamedTuple):
    """What the network says of a block, before anything is written.

    Attributes:
        mask: class at each mask pixel.
        probability: of that class, in 1/65535; None where no outlines are wanted.
        patches: indices of those that were predicted for it.
        cells: what is wrong with each, an index in `QUALITIES`.
        labels: (L,) of each of the patches, where the network classifies.
        features: (C,) of each of them.
        means: of the probabilities, where they are kept.
        apart: how far an ensemble disagrees at each mask pixel.
    """

    mask: npt.NDArray[np.uint8]
    probability: npt.NDArray[np.uint16] | None
    patches: npt.NDArray[np.int64]
    cells: npt.NDArray[np.uint8]
    labels: list[torch.Tensor]
    features: list[torch.Tensor]
    means: Means | None
    apart: npt.NDArray[np.float32]


class BlockWorker:
    """A worker's tools for the blocks of one mask: open source, predictor, what is predicted.

    Args:
        threads: of the CPU for forward passes; None = as the plan says.
        beside: digests of the models by which the same source is segmented here at this time: it
            is shared with them.
        kept_bytes: of predictions that later blocks need, at the most; None = a quarter of what
            is free here. On a GPU it is a quarter of what is free there.

    Raises:
        BundleError: the model was replaced since, or cannot be loaded.
        SourceError: the source was replaced since, or cannot be read.
    """

    def __init__(
        self,
        plan: Plan,
        keep: WorkerCache,
        *,
        threads: int | None = None,
        kept_bytes: int | None = None,
        beside: Collection[str] = (),
    ) -> None:
        bundle = load_bundle(plan.bundle_path)
        if bundle.digest != plan.model:
            raise BundleError(
                f"the model in {plan.bundle_path} has been replaced since this command began: "
                "give it again"
            )
        if len(plan.mask_shape) > 2:
            map_large_arrays()
        self._plan = plan
        self._stamp = _stamp(plan.pixels.path)
        self._classes, self._is_ensemble = len(bundle.classes), bool(bundle.members)
        self._thresholds = plan.predict.rule.of([c.name for c in bundle.classes[1:]])
        self._familiar = load_familiar(bundle)
        self._device = device = choose_device(plan.predict.device)
        self._windows = Windows(plan.grid, plan.predict.blend, device)
        if device.type == "cuda":
            kept_bytes = torch.cuda.mem_get_info(device)[0] // 4
        elif kept_bytes is None:
            kept_bytes = min(free_memory() // 4, MOST_KEPT)
        pending = plan.store.pending(plan.blocks())
        self._cache = PatchCache(
            {block: plan.patches(block) for block in pending},
            plan.part,
            max_bytes=max(kept_bytes, LEAST_KEPT),
        )
        self._mask = open_mask(plan.store.mask_path)
        self._roi = None if plan.roi is None else read_region(plan.roi, offset=plan.roi_offset)
        self._pixels = plan.pixels.open(shared=bool(beside))
        plan.check_fingerprint(self._pixels.fingerprint)
        # The first blocks are read while the network is built.
        building = ThreadPoolExecutor(1, "network", use_one_core)
        self._built = building.submit(
            kept_predictor, bundle, plan.predict, threads or plan.threads, keep, beside
        )
        building.shutdown(wait=False)

    @property
    def _predictor(self) -> Predictor:
        return self._built.result()

    def close(self) -> None:
        """Close the source; the predictor is kept for the next."""
        wait([self._built])
        self._pixels.close()

    def __call__(self, block: Block) -> int:
        """Do one block: read, predict, blend, write its mask and trace it; return new patches."""
        use_one_core()
        no_room = "a block does not fit into the memory beside the model; lower --block-size"
        # the first blocks are read while the network is built
        in_hand = self._predictor.queue.in_hand() if self._built.done() else nullcontext()
        short = raised_as(BundleError, (torch.OutOfMemoryError, MemoryError), no_room)
        with in_hand, short, telling_of(self._device):
            return self._do(block)

    def _do(self, block: Block) -> int:
        """Do one block; return new patches."""
        plan, clock = self._plan, Clock()
        said = self._predict(block, clock)
        mask, probability = said.mask, said.probability
        if plan.is_mirrored:
            # Predicted as the model wants to see it, written as the image lies.
            mask = np.ascontiguousarray(mask[..., ::-1])
            if probability is not None:
                probability = np.ascontiguousarray(probability[..., ::-1])
        if plan.look:
            leave_out(mask, said.cells, plan.look.cell, plan.predict.skip)
        if plan.crop is not None:
            clear_outside(mask, block.start, plan.crop)
        bad, seen = self._mark_unreadable(mask, probability, block), self._seen(block)
        if self._roi is not None:
            (y, x), (fy, fx) = block.start, plan.mask_downsample
            # By the mask's own pixels: patches reach beyond the ROI.
            inside = rasterise(self._roi, mask.shape, origin=(y * fy, x * fx), downsample=(fy, fx))
            mask *= inside
            seen &= inside
        with writing(plan.store.mask_path):
            write_block(self._mask, block, mask)
            chunks = settle(self._mask, block)
        if said.means is not None:
            planes = self._in_roi(said.means.as_bytes(), block)
            keep_planes(plan, block, planes[..., ::-1] if plan.is_mirrored else planes)
        clock.lap("write")
        # Before the ledger knows of the block: no mask is to be made of two files.
        self._check_source()
        counts = torch.bincount(torch.from_numpy(mask).flatten(), minlength=self._classes + 1)
        arrays: dict[str, npt.NDArray[Any]] = {
            "chunks": chunks,
            "predicted": np.array(len(said.patches)),
            "bad": np.array([astuple(region) for region in bad], np.int64).reshape(-1, 4),
            "counts": counts.numpy(),
            "sha256": np.array(hash_block(mask)),
            "computed": np.array(self._predictor.how),
        }
        if plan.look:
            found = crossed(mask, said.cells, plan.look.cell, self._classes + 1)
            arrays |= {"quality": said.cells, "crossed": found}
        if self._is_ensemble:
            arrays["disputed"] = np.array([said.apart[seen].sum(), np.count_nonzero(seen)])
        if said.labels:
            labels = torch.stack(said.labels).cpu().numpy()
            arrays |= {"labelled": said.patches, "labels": labels}
        if self._familiar and said.features:
            far = self._familiar.distances(torch.stack(said.features).cpu().numpy())
            arrays |= {"unlike": said.patches[far > 1], "like": said.patches[far <= 1]}
        if probability is not None:
            pieces = find_components(mask, probability, (block.start[0], block.start[1]))
            arrays |= pieces.as_arrays()
            clock.lap("polygons")
        arrays |= {f"seconds_{stage}": np.array(s) for stage, s in clock.seconds.items()}
        plan.store.finish_block(block, arrays)
        return len(said.patches)

    def _check_source(self) -> None:
        """Refuse a source that was replaced before the last pixels were read.

        Raises:
            SourceError: it was.
        """
        stamp = _stamp(self._plan.pixels.path)
        if stamp != self._stamp:
            now = self._plan.pixels.open()
            try:
                self._plan.check_fingerprint(now.fingerprint)
            finally:
                now.close()
            self._stamp = stamp

    def _predict(self, block: Block, clock: Clock) -> Prediction:
        """Read a block and ask the network; return what it says, as the model wants to see it."""
        plan, means = self._plan, None
        if plan.cell:
            count = self._classes - 1 + self._is_ensemble
            means = Means(*plan.cells(block), cell=plan.cell, shape=plan.grid.shape, classes=count)
        labels, features = list[torch.Tensor](), list[torch.Tensor]()
        apart = np.zeros(block.shape if self._is_ensemble else 0, np.float32)
        wanted = plan.patches(block)
        with self._cache.claim(block, wanted) as claim:
            pixels, corner = self._read(claim.mine, block)
            cells = judge(plan, block, pixels, corner)
            clock.lap("read")
            predictor = self._predictor
            clock.skip()
            region = predictor.upload(pixels)
            clock.lap("read")
            origins, queue = plan.grid.origins[claim.mine] - corner, predictor.queue
            with queue.in_hand():
                fresh = predictor.predict(region, origins, labels=labels, features=features)
                starts = map(tuple, plan.grid.origins[wanted].tolist())
                answers = (claim.result(patch, fresh, queue.wait) for patch in wanted)
                pieces = self._pieces(zip(starts, answers, strict=True), block, means)
                if self._is_ensemble:
                    pieces = _set_apart(pieces, apart)
                mask, probability = self._classify(pieces, block)
                clock.lap("predict")
                clock.seconds["predict"] += queue.seconds
        return Prediction(mask, probability, claim.mine, cells, labels, features, means, apart)

    def _read(
        self, patches: npt.NDArray[np.int64], block: Block
    ) -> tuple[Pixels, npt.NDArray[np.int64]]:
        """Read the pixels of patches, and what is judged, at one go; return them and the first."""
        grid = self._plan.grid
        axes = len(grid.shape)
        origins = grid.origins[patches]
        corners = [origins, origins + np.array(grid.patch_size), judged_box(self._plan, block)]
        every = np.concatenate(corners)
        if len(every) == 0:
            return np.zeros((0,) * axes + (1,), np.uint8), np.zeros(axes, np.int64)
        low, high = every.min(axis=0), every.max(axis=0)
        return self._pixels.read(tuple(low.tolist()), tuple((high - low).tolist())), low

    def _pieces(self, predictions: Pieces, block: Block, means: Means | None) -> Pieces:
        """Yield the first pixel and the probabilities (C, *part) of parts of a block's mask."""
        plan, seen = self._plan, self._plan.seen(block)
        start, stop = plan.box(block)
        # Cells may reach beyond the block's own pixels.
        is_own = (start, stop) == (seen.start, seen.stop) and not plan.crop
        if self._windows.exclusive and is_own and all(r == 1.0 for r in plan.ratio):
            for first, part in iter_owned(predictions, start, stop, windows=self._windows):
                part = self._predictor.activated(part)
                if means:
                    means.add(first, part)
                yield tuple(a - low for a, low in zip(first, start, strict=True)), part
            return
        bands = iter_blended_rows(
            predictions,
            start,
            stop,
            windows=self._windows,
            patch_rows=plan.grid.patch_size[0],
            channels=self._predictor.channels,
            device=self._predictor.device,
            nothing=NO_PATCH if self._predictor.gives_logits else 1.0,
        )
        if means:
            bands = _added(bands, start[1:], means, self._predictor)
        rows = iter_sampled_rows(
            bands,
            start[1:],
            start=seen.start,
            stop=seen.stop,
            ratio=plan.ratio,
            shape=plan.grid.shape,
            offset=plan.offset,
            nearest=plan.nearest,
        )
        for row, sampled in rows:
            yield (row, *(0 for _ in start[1:])), self._predictor.activated(sampled)

    def _in_roi(self, planes: npt.NDArray[np.uint8], block: Block) -> npt.NDArray[np.uint8]:
        """Return a block's planes, 0 where no pixel of the ROI depends on them."""
        if self._roi is None:
            return planes
        step = tuple(d * self._plan.cell for d in self._plan.downsample)
        (y, x), _ = self._plan.cells(block)
        # A mask pixel is interpolated between the centres of four cells.
        reach = [polygon.buffer(1.5 * max(step)) for polygon in self._roi]
        origin, fine = (y * step[0], x * step[1]), (step[0], step[1])
        return planes * rasterise(reach, planes.shape[1:], origin=origin, downsample=fine)

    @torch.inference_mode()
    def _classify(
        self, pieces: Pieces, block: Block
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16] | None]:
        """Return class and probability (in 1/65535) at each mask pixel of a block."""
        mask, rule = np.zeros(block.shape, np.uint8), self._plan.predict.rule
        probability = np.zeros(block.shape, np.uint16) if self._plan.outlines else None
        odd = torch.tensor(False, device=self._device)
        # A CPU has looked at each patch, but for what becomes of logits.
        is_sure = self._device.type == "cpu" and not self._predictor.gives_logits
        for first, probabilities in pieces:
            if not is_sure:
                odd |= probabilities.sum().isnan()
            # a GPU is waited for in the end
            if self._device.type == "cpu" and odd:
                break
            every = every_class(probabilities)
            if rule:
                best, chosen = choose(every.cpu().numpy(), self._thresholds, rule.min_margin)
                fixed = np.rint(best * PROBABILITY_ONE).astype(np.uint16)
            else:
                fixed, chosen = best_class(every, with_probability=probability is not None)
            part = box_slices(first, chosen.shape)
            mask[part] = chosen
            if probability is not None:
                probability[part] = fixed
        if odd:
            raise BundleError(f"{self._predictor.bundle.name} {NO_NUMBERS}")
        return mask, probability

    def _seen(self, block: Block) -> npt.NDArray[np.bool_]:
        """Return which mask pixels of a block patches cover, as the model wants to see it."""
        plan, box = self._plan, self._plan.seen(block)
        covered, scale = np.zeros(block.shape, bool), 1 / np.array(plan.ratio)
        for origin in plan.grid.origins[plan.patches(block)] if self._is_ensemble else ():
            ends = np.rint(np.stack([origin, origin + plan.grid.patch_size]) * scale)
            low, high = np.maximum(ends.astype(np.int64) - box.start, 0)
            covered[tuple(map(slice, low, high))] = True
        return covered

    def _mark_unreadable(
        self, mask: npt.NDArray[np.uint8], probability: npt.NDArray[np.uint16] | None, block: Block
    ) -> list[Region]:
        """Give what could not be read its own class, as far as patches cover it; return where.

        Whoever read a patch of the block has done so before the block was predicted.
        """
        plan, found = self._plan, []
        if not (bad := self._pixels.unreadable()):
            return []
        origins = plan.grid.origins[plan.patches(block)]
        # Mask pixels per grid pixel, along each axis.
        scale = np.array(plan.downsample) / plan.mask_downsample
        for region in bad:
            low = np.array([region.y, region.x]) / plan.mask_downsample
            high = low + np.array([region.height, region.width]) / plan.mask_downsample
            first = np.maximum(np.floor(np.maximum(low, origins * scale)), block.start)
            ends = (origins + np.array(plan.grid.patch_size)) * scale
            last = np.minimum(np.ceil(np.minimum(high, ends)), block.stop)
            parts = np.stack([first, last], axis=1).astype(np.int64)[np.all(first < last, axis=1)]
            for (y0, x0), (y1, x1) in parts - np.array(block.start):
                mask[y0:y1, x0:x1] = self._classes
                if probability is not None:
                    probability[y0:y1, x0:x1] = 0
            if len(parts):
                found.append(region)
        return found


def _added(
    bands: Iterator[tuple[int, torch.Tensor]], left: Shape, means: Means, predictor: Predictor
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield bands of probabilities that are added to means on their way."""
    for row, band in bands:
        means.add((row, *left), predictor.activated(band))
        yield row, band


def _set_apart(pieces: Pieces, disputed: npt.NDArray[np.float32]) -> Pieces:
    """Yield pieces without their last channel, which is how far an ensemble disagrees."""
    for first, planes in pieces:
        disputed[box_slices(first, planes.shape[1:])] = planes[-1].cpu().numpy()
        yield first, planes[:-1]


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what is another where a file or folder of this machine was replaced or written."""
    if is_remote(path):
        return ()
    try:
        status = path.stat()
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from error
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
