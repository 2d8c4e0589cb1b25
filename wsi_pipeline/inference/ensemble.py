"""Several networks that are asked of the same patches, and how far they disagree."""

from __future__ import annotations

import threading
from collections.abc import Collection
from itertools import combinations
from typing import Any

import torch
from torch.nn.functional import one_hot

from wsi_pipeline.bundle import Bundle
from wsi_pipeline.inference.patch_queue import Answer, PatchQueue
from wsi_pipeline.inference.predictor import Predictor
from wsi_pipeline.networks.ensemble import check_members
from wsi_pipeline.options import PredictOptions
from wsi_pipeline.schedule.worker_state import WorkerCache

_making = threading.Lock()


class Ensemble(Predictor):
    """The predictors of an ensemble's members as one.

    Its probabilities are the mean of theirs, or the shares of their votes; one more channel behind
    those of the classes holds the disagreement: half the sum of the differences between two members
    over the classes, of all pairs the mean. 0: they say the same; 1: each another class for sure.
    Arguments are those of `Predictor`.
    """

    def __init__(self, bundle: Bundle, **options: Any) -> None:
        check_members(bundle)
        self._members = [Predictor(member, **options) for member in bundle.members]
        first = self._members[0]
        self.bundle, self.device, self.dtype = bundle, first.device, first.dtype
        self._passes, self._is_int8, self.gives_logits = first._passes, False, False
        self.channels = len(bundle.classes) + 1
        queues = [member.queue for member in self._members]
        fixed = [queue.batch for queue in queues if queue.is_fixed]
        self.queue = PatchQueue(
            self._run,
            batch=min(fixed or [queue.batch for queue in queues]),
            passes=first._passes,
            too_large=f"{bundle.name} does not fit into the memory of {self.device}",
            is_fixed=bool(fixed),
        )

    @property
    def how(self) -> str:
        """Return how each member predicts, see `Predictor`."""
        return "; ".join(dict.fromkeys(member.how for member in self._members))

    def close(self) -> None:
        """End the threads."""
        super().close()
        for member in self._members:
            member.close()

    def _run(self, patches: torch.Tensor) -> Answer:
        each = [member._run(patches)[0] for member in self._members]
        each = [torch.cat([1 - p, p], 1) if p.shape[1] == 1 else p for p in each]
        if self.bundle.network_options["combine"] == "vote":
            votes = (one_hot(p.argmax(1), p.shape[1]).movedim(-1, 1) for p in each)
            each = [vote.float() for vote in votes]
        pairs = [(a - b).abs().sum(1, keepdim=True) / 2 for a, b in combinations(each, 2)]
        mean = torch.stack(each).mean(0)
        nothing = mean.new_empty(len(mean), 0)
        return torch.cat([mean, torch.stack(pairs).mean(0)], 1), nothing, nothing


def open_predictor(bundle: Bundle, predict: PredictOptions, *, threads: int) -> Predictor:
    """Return the predictor of a bundle as a run's options have it, to be closed.

    Raises:
        BundleError: see `Predictor`.
    """
    return (Ensemble if bundle.members else Predictor)(
        bundle,
        device=predict.device,
        precision=predict.precision,
        batch_size=predict.batch_size,
        threads=threads,
        tta=predict.tta,
    )


def kept_predictor(
    bundle: Bundle,
    options: PredictOptions,
    threads: int,
    keep: WorkerCache,
    beside: Collection[str],
) -> Predictor:
    """Return the predictor that a worker made for the last slide, or a new one."""
    key = repr((bundle.digest, bundle, options.device, options.precision, options.batch_size,
                threads, options.tta))  # fmt: skip
    used = (*beside, bundle.digest)
    with _making:
        predictor = keep.get(key)
        if not isinstance(predictor, Predictor):
            # A model that is used no more gives its memory back first.
            for old in [old for old in keep if not any(model in old for model in used)]:
                keep.pop(old).close()
            predictor = keep[key] = open_predictor(bundle, options, threads=threads)
        return predictor
