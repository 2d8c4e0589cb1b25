"""Is a mask the one that was computed, and does computing it again give the same?"""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from filecmp import cmp
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import zarr

from wsi_pipeline.errors import BundleError, SourceError, StoreError
from wsi_pipeline.export import MaskLike, ome_zarr
from wsi_pipeline.files.arrays import chunk_files
from wsi_pipeline.files.threads import map_in_threads
from wsi_pipeline.geometry import Block, box_slices, iter_blocks
from wsi_pipeline.inference.blend import Pieces
from wsi_pipeline.inference.classes import every_class
from wsi_pipeline.networks.nnunet_folder import load_model
from wsi_pipeline.options import Precision, PredictOptions, SelectOptions, Settings
from wsi_pipeline.report.record import FILES, RUN_FILE, Certificate, Run, load_run
from wsi_pipeline.run.again import held_blocks
from wsi_pipeline.run.estimate import passes_at_once
from wsi_pipeline.run.facts import options_of
from wsi_pipeline.run.finished import MASK_FILES, of_this_version, open_mask_of, source_path
from wsi_pipeline.run.plan import Plan
from wsi_pipeline.run.segment import open_source_run
from wsi_pipeline.run.store import RunStore, hash_block, open_run_store, root_of
from wsi_pipeline.run.worker import BlockWorker
from wsi_pipeline.schedule.memory import cpu_count

ROUNDING = {"fp32": 2.0**-24, "tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""Unit roundoff of number formats: what a product is off by at the most, relatively."""
GROWTH = 128
"""Unit roundoffs by which a network's margins may be off: twice the most that was measured."""
IN_HAND = 2
"""Blocks at a time: one is read while the other is predicted."""


@dataclass(frozen=True, kw_only=True)
class Different:
    """A block of a mask that is not what it should be.

    Attributes:
        block: its row and column; "" where none can be told.
        why: a sentence for people.
        pixels: how many came out as another class.
        margin: the largest of theirs, the first probability less the second; with thresholds how
            near the nearest decision was, on the same scale.
    """

    block: str
    why: str
    pixels: int = 0
    margin: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found of a run's mask.

    Attributes:
        seed: with which the same blocks are computed again.
        blocks: how many hold a class, or are where the model looks.
        again: names of those computed again; none where the mask on the disk is another.
        different: those that are not on the disk as they were computed, or came out otherwise.
        rounded: those that came out otherwise by rounding, elsewhere or in another format.
        epsilon: margin below which rounding may make another class; 0 = nothing rounds otherwise.
    """

    seed: int
    blocks: int
    again: tuple[str, ...] = ()
    different: tuple[Different, ...] = ()
    rounded: tuple[Different, ...] = ()
    epsilon: float = 0.0


def verify(
    folder: str | Path,
    *,
    share: float = 0.01,
    seed: int | None = None,
    model: str | Path | None = None,
    slide: str | Path | None = None,
    device: str | None = None,
    precision: Precision | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Hold a run's mask against its hashes, and some of its blocks against themselves made again.

    Args:
        folder: of one run, with its mask.
        share: of the blocks to compute again, from 0 to 1; above 0 at least one is.
        seed: of their choice; None = another each time.
        model: where the bundle is now; None = where it was.
        slide: where the slide, image or volume is now; None = where it was.
        device: to compute on; None = as the run was told, as with `precision`.
        progress: told of blocks computed, and of all that are to be.

    Returns:
        What was found.

    Raises:
        StoreError: no run, no mask, one without hashes, or another ROI or tissue file now.
        SourceError: the slide, image or volume is gone, or another one is there.
        BundleError: the model is gone, or another one is there.
    """
    folder = Path(folder)
    run = load_run(folder / RUN_FILE)
    if (certificate := run.certificate) is None:
        why = run.reason or "the version that made it took none"
        if "made_of" in run.settings:
            raise StoreError(
                f"{folder}: `export` made its mask, by thresholds, of another run's probabilities; "
                "verify that run"
            )
        raise StoreError(f"{folder} has no hashes of its mask: {why}; segment again")
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
    with ExitStack() as closing:
        mask, hashes, different = _look(folder, run, certificate, closing)
        if different or not share:
            return Verdict(seed=seed, blocks=len(hashes), different=tuple(different))
        plan, touched = _plan_again(folder, run, certificate, model, slide, closing)
        if plan.mask_shape != tuple(mask.shape):
            raise StoreError(f"{folder}: a mask of {mask.shape} px; expected {plan.mask_shape}")
        told = plan.predict
        predict = replace(told, device=device or told.device, precision=precision or told.precision)
        blocks = sorted({*touched, *hashes}, key=lambda block: block.index)
        order = np.random.default_rng(seed).permutation(len(blocks))
        drawn = [blocks[i] for i in sorted(order[: math.ceil(share * len(blocks))])]
        checker = Checker(replace(plan, predict=predict), mask)
        closing.callback(checker.close)
        found = list[Different]()
        for other in map_in_threads(checker.check, drawn, threads=IN_HAND):
            found.append(other)
            if progress:
                progress(len(found), len(drawn))
    hows = {checker.how, *certificate["computed"]}
    units = [ROUNDING.get(how.partition(" ")[0], max(ROUNDING.values())) for how in hows]
    # the same hardware and software give the same to the last bit
    epsilon = 0.0 if len(hows) == 1 else GROWTH * sum(sorted(units)[-2:])
    odd = [other for other in found if other.pixels]
    return Verdict(
        seed=seed,
        blocks=len(blocks),
        again=tuple(block.name for block in drawn),
        different=tuple(other for other in odd if other.margin >= epsilon),
        rounded=tuple(other for other in odd if other.margin < epsilon),
        epsilon=epsilon,
    )


def _look(
    folder: Path, run: Run, certificate: Certificate, closing: ExitStack
) -> tuple[MaskLike, dict[Block, str], list[Different]]:
    """Return a run's mask, the hash of each block that holds a class, and what was changed.

    Raises:
        StoreError: there is no mask.
    """
    store = RunStore(folder=folder)
    seen = folder / MASK_FILES.get(run.kind, FILES["zarr"])
    path = seen if seen.exists() else store.mask_path
    if not path.exists():
        raise StoreError(f"{folder} has no mask any more; segment again")
    try:
        if run.kind in MASK_FILES:
            levels = [(1, open_mask_of(folder, run, closing))]
        else:
            groups = [group for group in (path, path / ome_zarr.LABELS) if group.is_dir()]
            levels = [
                (1 << n, level)
                for group in groups
                for n, level in enumerate(ome_zarr.open_levels(group))
            ]
    # what is damaged may raise anything
    except Exception as error:
        why = f"the mask cannot be read: {error}"
        return np.zeros(0), {}, [Different(block="", why=why)]
    mask = levels[0][1]
    blocks = list(iter_blocks(tuple(mask.shape), tuple(certificate["block_shape"])))
    held, kept = held_blocks(store, run, blocks), dict[Block, str]()
    for block in held:
        with suppress(StoreError, KeyError):
            arrays = store.load_block(block)
            if arrays["counts"][1:].any():
                kept[block] = str(arrays["sha256"])
    # a ledger that is lost, damaged or another run's can name no block
    half = len(levels) // 2 if (path / ome_zarr.LABELS).is_dir() else len(levels)
    is_kept = root_of(kept) == certificate["sha256"]
    is_ours = is_kept and isinstance(mask, zarr.Array)
    lost = {*store.damaged(held, cast("zarr.Array[Any]", mask))} if is_ours else set()

    def look(block: Block) -> tuple[str, str]:
        try:
            pixels = np.asarray(mask[block.slices])
            for n, (step, level) in enumerate(levels[1:], start=1):
                # pixel (i, j) of a level is (i · step, j · step) of level 0
                start, stop = (tuple(-(-a // step) for a in at) for at in (block.start, block.stop))
                part = Block(index=(), start=start, stop=stop)
                shown = level[part.slices]
                # What decoders make of a changed file may by chance be the same: a label's is that
                # of the level.
                if n >= half and not _are_copies(levels[n - half][1], level, part):
                    return "", "the labels' files are not those of the mask"
                firsts = tuple(slice(-a % step, None, step) for a in block.start)
                if not np.array_equal(shown, pixels[firsts]):
                    return "", "a reduced level, or the labels, show other pixels than level 0"
        # what is damaged may raise anything
        except Exception as error:
            return "", f"its pixels cannot be read: {error}"
        found = hash_block(pixels) if pixels.any() else ""
        if is_kept and found != kept.get(block, ""):
            return found, "its pixels are not those that were computed"
        return found, "its file is not the one that was written" if block in lost else ""

    looked = dict(zip(blocks, map_in_threads(look, blocks), strict=True))
    hashes = {block: found for block, (found, _) in looked.items() if found}
    different = [Different(block=b.name, why=why) for b, (_, why) in looked.items() if why]
    if not different and root_of(hashes) != certificate["sha256"]:
        why = "the mask is not the one that was computed; without its ledger no block can be named"
        different.append(Different(block="", why=why))
    return mask, hashes, different


def _are_copies(one: MaskLike, other: MaskLike, block: Block) -> bool:
    """Return whether two arrays keep a block in the same bytes."""
    files = (chunk_files(cast("zarr.Array[Any]", array), block) for array in (one, other))
    return all(
        a.is_file() == b.is_file() and (not a.is_file() or cmp(a, b, shallow=False))
        for a, b in zip(*files, strict=True)
    )


def _plan_again(
    folder: Path,
    run: Run,
    certificate: Certificate,
    model: str | Path | None,
    slide: str | Path | None,
    closing: ExitStack,
) -> tuple[Plan, list[Block]]:
    """Plan a run once more, into a folder that goes; return the plan and the blocks it touches.

    Raises: see `verify`.
    """
    with of_this_version(folder):
        select = dict(run.settings["select"])
        for name in ("roi", "tissue"):
            if select[name] not in (None, "auto", "none"):
                select[name] = source_path(folder, select[name])
        settings = Settings(
            select=SelectOptions(**select),
            predict=PredictOptions(**run.settings["predict"]),
            # nothing is to be traced
            export=replace(options_of(run), outputs=()),
        )
    bundle = load_model(model or certificate["bundle"])
    if bundle.digest != certificate["model"]:
        raise BundleError(f"{bundle.path} is not the model of this run: its content differs")
    path = Path(slide) if slide else source_path(folder, run.slide["path"])
    with open_source_run(path, bundle, settings) as again:
        if again.source.fingerprint != run.slide["fingerprint"]:
            raise SourceError(f"{path} is not the {run.kind} of this run: its content differs")
        if again.key_by(run.versions["wsi-pipeline"]) != run.settings["key"]:
            raise StoreError(f"{folder}: its tissue or ROI file is another now; put it back")
        work = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="verify-")))
        store = open_run_store(work, fingerprint="", key="", overwrite=False)
        again.prepare(store, passes_at_once(bundle, cpu_count()), lambda plan: None)
        return again.plan, again.blocks


class Checker(BlockWorker):
    """Does blocks as `segment` does, in a store of its own, and compares them with a mask.

    Args:
        plan: of that store.
        there: the mask.
    """

    def __init__(self, plan: Plan, there: MaskLike) -> None:
        super().__init__(plan, {})
        self._there, self._margins = there, dict[int, npt.NDArray[np.float32]]()
        self.how = self._predictor.how

    def close(self) -> None:
        """Close the source and the predictor."""
        super().close()
        self._predictor.close()

    def check(self, block: Block) -> Different:
        """Do a block; return in how many pixels it differs, and by what margin."""
        self(block)
        margin = self._margins.pop(threading.get_ident())
        margin = margin[..., ::-1] if self._plan.is_mirrored else margin
        odd = np.asarray(self._mask[block.slices]) != np.asarray(self._there[block.slices])
        return Different(
            block=block.name,
            why="its pixels came out otherwise",
            pixels=int(np.count_nonzero(odd)),
            margin=float(margin.max(initial=0, where=odd)),
        )

    def _classify(
        self, pieces: Pieces, block: Block
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16] | None]:
        margin = self._margins[threading.get_ident()] = np.ones(block.shape, np.float32)

        def measured() -> Pieces:
            for first, planes in pieces:
                every = every_class(planes)
                best, second = every.topk(2, 0).values
                nearest = [best - second]
                if rule := self._plan.predict.rule:
                    # what a probability is off by moves a margin by twice that
                    told = enumerate(self._thresholds, 1)
                    over = [every[k] - t for k, t in told if t is not None]
                    nearest += [2 * one.abs() for one in over]
                    nearest += [(a - b).abs() for a, b in combinations(over, 2)]
                    nearest.append((best - second - rule.min_margin).abs())
                least = torch.stack(nearest).amin(0)
                margin[box_slices(first, best.shape)] = least.cpu().numpy()
                yield first, planes

        return super()._classify(measured(), block)
