"""What differs between the runs of slides, images and volumes; all else is told once, in `segment`.

open       SlideRun or ScanRun, by the model's modality: the source is open, its key is known
prepare    where to look, the plan for the workers, the mask in which blocks are written
blocks     elsewhere: workers know the plan alone
write      the outputs from the finished mask, and what `run.json` says
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wsi_pipeline.bundle import Bundle
from wsi_pipeline.errors import SourceError
from wsi_pipeline.files.clock import Clock
from wsi_pipeline.geometry import Block
from wsi_pipeline.options import Settings
from wsi_pipeline.report.record import Certificate, Run
from wsi_pipeline.run.facts import model_facts, versions, warnings_of
from wsi_pipeline.run.plan import Plan
from wsi_pipeline.run.probability import write_probability
from wsi_pipeline.run.store import RunStore, hash_block, root_of, run_key
from wsi_pipeline.run.worker import STAGES
from wsi_pipeline.run.written import WrittenFiles
from wsi_pipeline.sources import Slide
from wsi_pipeline.sources.base import Opened

if TYPE_CHECKING:
    # Writers of all kinds of files, which the first block need not wait for.
    from wsi_pipeline.run.result import Ledger, Result
    from wsi_pipeline.sources.radiology.preprocess import Scan

UNLIKE_PERCENT = 50
"""Of the patches, above which a run warns."""
UNLIKE = "{:.0f} % of the patches are unlike the tissue that the model was trained for"


class SourceRun(Opened, ABC):
    """A source that is open, the model and the options: one run on its way to its files.

    Attributes:
        source: the slide, image or volume, closed once the run is prepared.
        reopened: the same, open again while outputs are written.
        bundle: the model.
        settings: options; may be changed until `prepare`.
        plan: for the workers, once prepared.
        blocks: that some patch touches, once prepared.
        kept_bytes: of predictions that each worker may keep; None = as it sees fit.
    """

    source: Slide | Scan
    reopened: Slide | Scan
    plan: Plan
    blocks: list[Block]
    kept_bytes: int | None

    def __init__(self, path: Path, bundle: Bundle, settings: Settings) -> None:
        self.bundle, self.settings = bundle, settings
        self.source = self._open(path)

    @abstractmethod
    def _open(self, path: Path) -> Slide | Scan:
        """Open the source; return it.

        Raises:
            SourceError: it cannot be read, or does not fit the model or the options.
        """

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """Return everything of the source and of where to look that the mask depends on."""

    @abstractmethod
    def lay_out(self, store: RunStore, threads: int, *, keep: bool) -> Plan:
        """Find out where to look; return the plan for the workers.

        Args:
            keep: write down what was found, and read it where it is; else nothing is written.

        Raises:
            SourceError: the source cannot be read, or does not fit the model.
            StoreError: a block size or overlap that cannot be.
        """

    @abstractmethod
    def make_mask(self) -> None:
        """Create the mask unless an interrupted run has begun one; forget damaged blocks."""

    @abstractmethod
    def most_mask_files(self, plan: Plan) -> int:
        """Return the largest number of files that the mask can have."""

    @abstractmethod
    def _finish(self, ledger: Ledger, files: WrittenFiles, clock: Clock) -> Result:
        """Finish the mask; return it with what its files tell of it.

        Raises:
            SourceError: more of the source is unreadable than the settings allow.
        """

    def _common(self, ledger: Ledger, **of_pixels: Any) -> dict[str, Any]:
        """Return the fields of `Result` that all have; `of_pixels` is for `write_probability`."""
        return {
            "model": model_facts(self.bundle),
            "key": self.key,
            "blocks": self.blocks,
            "side": self.plan.block_shape[0],
            "ledger": ledger,
            "write_probability": partial(
                write_probability,
                self.plan,
                self.blocks,
                self.bundle.classes[1:],
                is_ensemble=bool(self.bundle.members),
                **of_pixels,
            ),
        }

    @abstractmethod
    def _facts(self, ledger: Ledger) -> dict[str, Any]:
        """Return those fields of `Run` that this modality has beside the others'."""

    @cached_property
    def key(self) -> str:
        """Return the digest of everything that the mask depends on."""
        return self.key_by(version("wsi-pipeline"))

    def key_by(self, release: str) -> str:
        """Return the key that a release of this package gives the run."""
        # A mask goes on where another machine began it: these change nothing but the last bits of
        # its number format, which "auto" has been replaced by.
        left_out = ("device", "batch_size")
        predict = {k: v for k, v in asdict(self.settings.predict).items() if k not in left_out}
        # Older runs, which have none in their key, go on.
        if predict["tta"] in (None, "none"):
            del predict["tta"]
        if not predict["skip"]:
            del predict["skip"]
        whole = {"model": self.bundle.digest, "predict": predict, "version": release}
        return run_key(self._identity() | whole)

    def close(self) -> None:
        """Close the source."""
        self.source.close()

    def prepare(self, store: RunStore, threads: int, check: Callable[[Plan], int | None]) -> None:
        """Plan the blocks and create the mask; return nothing.

        Args:
            check: refuses a plan that takes too much memory, and tells `kept_bytes`.
        """
        self.plan = self.lay_out(store, threads, keep=True)
        self.kept_bytes = check(self.plan)
        self.blocks = self.plan.blocks()
        self.make_mask()

    def reopen(self) -> Slide | Scan:
        """Open the source again, to be closed when all is written; return it.

        One that was replaced is refused, and what was made of it forgotten.

        Raises:
            SourceError: it was.
        """
        self.reopened = self._open(self.plan.pixels.path)
        try:
            self.plan.check_fingerprint(self.reopened.fingerprint)
        except SourceError:
            self.reopened.close()
            self.plan.store.empty()
            raise
        return self.reopened

    def write(self, files: WrittenFiles) -> Run:
        """Write what was asked for, once the source is open again; return the run.

        An output that fails is named in the run and costs no other.

        Raises:
            SourceError: more of the source is unreadable than the settings allow.
        """
        plan, settings, clock = self.plan, self.settings, Clock()
        ledger = {block.index: plan.store.load_block(block) for block in self.blocks}
        result = self._finish(ledger, files, clock)
        wanted = settings.export.outputs
        failures, written = result.write(wanted, plan.store.folder, files, clock)
        own, unlike = self._facts(ledger), self._unlike(ledger)
        seconds = {s: sum(float(a.get(f"seconds_{s}", 0)) for a in ledger.values()) for s in STAGES}
        run = Run(
            kind=self.bundle.modality,
            status="failed" if failures else "done",
            reason="; ".join(failures),
            slide=result.facts,
            model=result.model,
            settings={"key": self.key, **settings.as_plain(), **own.pop("settings")},
            versions=versions(),
            patches={
                "grid": own.pop("patches"),
                "kept": len(plan.grid),
                "predicted": sum(int(arrays["predicted"]) for arrays in ledger.values()),
            },
            # Those of blocks are summed over threads and interrupted runs.
            seconds={name: round(s, 3) for name, s in {**seconds, **clock.seconds}.items()},
            colors={c.name: list(c.color or ()) for c in result.classes[1:]},
            background=result.classes[0].name,
            regions=written.regions,
            unlike_percent=unlike,
            disagreement_percent=self._disagreement(ledger),
            certificate=self._certificate(ledger, result),
            largest=written.largest,
            warnings=[
                *warnings_of(self.bundle),
                *([UNLIKE.format(unlike)] if (unlike or 0) > UNLIKE_PERCENT else []),
                *self.source.doubts,
                *written.dropped,
                *own.pop("warnings"),
            ],
            **own,
        )
        return files.noted(run)

    def _unlike(self, ledger: Ledger) -> float | None:
        """Return the percentage of patches that are unlike the training tissue, None = unknown."""
        judged = self._judged()
        unlike, like = (
            int(sum(judged[a[name]].sum() for a in ledger.values() if name in a))
            for name in ("unlike", "like")
        )
        return 100 * unlike / (unlike + like) if unlike + like else None

    def _disagreement(self, ledger: Ledger) -> float | None:
        """Return by how many percent an ensemble disagrees where it looked, None = it is none."""
        told = [arrays["disputed"] for arrays in ledger.values() if "disputed" in arrays]
        disputed, seen = np.sum(told, axis=0) if told else (0, 0)
        return float(100 * disputed / seen) if seen else None

    def _judged(self) -> npt.NDArray[np.bool_]:
        """Return (n,) which patches are compared with the training tissue."""
        return np.ones(len(self.plan.grid), bool)

    def _certificate(self, ledger: Ledger, result: Result) -> Certificate:
        """Return what the mask is later held against."""
        hashes = {}
        for block in self.blocks:
            arrays = ledger[block.index]
            if arrays["counts"][1:].any():
                # blocks that an older version did have none
                own = arrays.get("sha256")
                hashes[block] = str(own) if own else hash_block(result.mask[block.slices])
        return {
            "sha256": root_of(hashes),
            "block_shape": list(self.plan.block_shape),
            "bundle": str(self.plan.bundle_path),
            "model": self.plan.model,
            "computed": sorted({str(a["computed"]) for a in ledger.values() if "computed" in a}),
        }
