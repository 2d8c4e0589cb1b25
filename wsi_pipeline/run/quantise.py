"""A bundle that predicts in 8-bit integers, too: ranges found on sources, and what they cost."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline.bundle import Bundle, bundle_toml, load_bundle
from wsi_pipeline.errors import BundleError, UsageError
from wsi_pipeline.files.paths import Inputs
from wsi_pipeline.inference.predictor import Predictor
from wsi_pipeline.networks import SegmentationNetwork, build
from wsi_pipeline.networks.bundle_writer import (
    CARD,
    FEATURES,
    INT8,
    MODEL_TOML,
    WEIGHTS,
    written_folder,
)
from wsi_pipeline.networks.quantise import Ranges, quantise, rows, to_bytes, watched
from wsi_pipeline.run.jobs import Job
from wsi_pipeline.run.main import Batch, grouped, plan_batch
from wsi_pipeline.run.segment import fitting, open_source_run
from wsi_pipeline.run.store import RunStore
from wsi_pipeline.sources.pixels import Pixels

MOST_CHANGED = 0.003
"""Share of the pixels that convolutions in a row may give another class, alone in integers."""
TRIED = 8
"""Patches that this is found by."""


def quantise_model(
    inputs: Inputs,
    *,
    model: str | Path,
    output: Path,
    patches: int = 64,
    overwrite: bool = False,
    **options: Any,
) -> float:
    """Write a bundle like another that has int8, too; return the share of pixels that agree.

    Half of some patches, spread over all sources, give the ranges, and tell which convolutions
    bear integers; the other half judges.

    Args:
        inputs: all but `output` and `patches` are those of `segment`.
        output: folder of the bundle.
        patches: how many of all sources together, at the most.

    Raises:
        WsiPipelineError: nothing was found, fewer than two patches, a program, or an input, option
            or folder that cannot be used.
        TypeError: an option that there is not.
    """
    with TemporaryDirectory() as spare:
        batch = plan_batch(inputs, model=model, output=spare, **grouped(options))
        jobs = batch.jobs[:: -(-len(batch.jobs) // patches)]
        found = [pixels for job in jobs for pixels in _read(job, batch, patches // len(jobs))]
    if len(found) < 2:
        raise UsageError(f"{len(found)} patches of tissue; expected two or more to find ranges by")
    bundle, learning, judging = batch.bundle, found[::2], found[1::2]
    network = build(bundle).module
    if not isinstance(network, SegmentationNetwork) or bundle.encoder:
        raise BundleError(f"{bundle.name} is a program, or works behind one, which stays as it is")
    # ranges are noted by one thread
    with closing(Predictor(bundle, device="cpu", precision="fp32", threads=1)) as predictor:
        with watched(predictor.form) as ranges:
            learnt = _classes(predictor, learning)
        exact, every = _classes(predictor, judging), rows(predictor.form)
    kept: Ranges = {}
    for row in every:
        alone = {name: ranges[name] for name in row}
        with closing(
            Predictor(bundle, device="cpu", precision="fp32", network=network)
        ) as predictor:
            quantise(predictor.form, alone)
            changed = _classes(predictor, learning[:TRIED]) != learnt[:TRIED]
        if changed.mean() <= MOST_CHANGED:
            kept |= alone
    if not kept:
        raise BundleError(f"{bundle.name}: no convolution bears integers, or none can on this CPU")
    with written_folder(output, overwrite=overwrite) as partial:
        (partial / WEIGHTS).write_bytes(bundle.read_weights())
        (partial / INT8).write_bytes(to_bytes(kept))
        if bundle.features_path:
            shutil.copyfile(bundle.features_path, partial / FEATURES)
        features = FEATURES if bundle.features_path else None
        text = bundle_toml(bundle, weights=WEIGHTS, features=features, int8=INT8)
        (partial / MODEL_TOML).write_text(text, "utf-8")
        with closing(Predictor(load_bundle(partial), device="cpu", precision="int8")) as predictor:
            quick = _classes(predictor, judging)
        count = len(bundle.classes)
        pairs = np.bincount((exact * count + quick).ravel(), minlength=count**2)
        pairs = pairs.reshape(count, count)
        card = bundle.path / CARD
        told = card.read_text("utf-8", "replace") if card.is_file() else f"# {bundle.name}\n"
        # what it has told of other ranges is of those
        told = re.sub(r"\n## int8\n.*?(?=\n## |\Z)", "", told, flags=re.DOTALL).rstrip()
        (partial / CARD).write_text(f"{told}\n\n{_card(bundle, pairs, len(judging))}", "utf-8")
    return float(pairs.trace() / pairs.sum())


def _read(job: Job, batch: Batch, patches: int) -> list[Pixels]:
    """Return some patches of a source, evenly over where a run would look."""
    settings = replace(batch.settings, select=job.select(batch.settings.select))
    with open_source_run(job.path, batch.bundle, fitting(settings, batch.bundle)) as run:
        grid = (plan := run.lay_out(RunStore(folder=job.folder), 1, keep=False)).grid
        chosen = np.linspace(0, len(grid) - 1, min(len(grid), patches)).round().astype(int)
        with closing(plan.pixels.open()) as pixels:
            starts = [tuple(start) for start in grid.origins[chosen].tolist()]
            return [pixels.read(start, grid.patch_size) for start in starts]


def _classes(predictor: Predictor, patches: Sequence[Pixels]) -> npt.NDArray[np.int64]:
    """Return the class of each pixel of patches."""
    nowhere = np.zeros((1, len(predictor.bundle.input.patch_size)), np.int64)
    answers = (
        answer for p in patches for answer in predictor.predict(predictor.upload(p), nowhere)
    )
    return np.stack(
        [(a.argmax(0) if len(a) > 1 else a[0] > 0.5).numpy().astype(np.int64) for a in answers]
    )


def _card(bundle: Bundle, pairs: npt.NDArray[np.int64], patches: int) -> str:
    fp32, int8 = pairs.sum(1), pairs.sum(0)
    dice = 2 * pairs.diagonal() / np.maximum(fp32 + int8, 1)
    told = zip(bundle.classes, fp32 / pairs.sum(), dice, strict=True)
    table = "\n".join(f"| {info.name} | {share:.1%} | {same:.4f} |" for info, share, same in told)
    return f"""## int8

`--precision int8` gives {pairs.trace() / pairs.sum():.2%} of the pixels the class that fp32 gives
them, on {patches} patches that its ranges were not found by:

| class | of the pixels, in fp32 | Dice of int8 with fp32 |
|---|---:|---:|
{table}
"""
