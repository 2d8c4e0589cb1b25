"""How far a training is, with all that changes from step to step, kept in checkpoints."""

from __future__ import annotations

import io
import logging
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsi_pipeline.errors import RecipeError
from wsi_pipeline.files.remote import write_whole

logger = logging.getLogger(__name__)

LAST, BEST = "last.pt", "best.pt"
"""Checkpoints: of the last step, and the averaged weights that did best on the validation."""
KEPT = ("step", "history", "best", "stale", "losses")
"""Fields that the last checkpoint holds beside its parts."""


@dataclass(kw_only=True, eq=False)
class TrainerState:
    """How far a training is.

    Attributes:
        parts: What changes besides, each with `state_dict` and `load_state_dict`.
        folder: Where the checkpoints lie; None = there are none.
        history: A row of figures by name every few steps.
        best: Validation Dice of the best weights, None before the first look.
        stale: Looks since those.
        losses: Losses of the steps since the last row.
    """

    parts: Mapping[str, Any]
    folder: Path | None = None
    is_writer: bool = True
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: float | None = None
    best_weights: dict[str, Tensor] | None = None
    stale: int = 0
    losses: list[float] = field(default_factory=list)

    def load(self) -> None:
        """Go back to the last checkpoint, where there is one.

        Raises:
            RecipeError: it is damaged.
        """
        if not self.folder or not (self.folder / LAST).is_file():
            return
        held = _read(self.folder / LAST)
        for name, part in self.parts.items():
            part.load_state_dict(held[name])
        for name in KEPT:
            setattr(self, name, held["progressed"][name])
        if self.best is not None:
            self.best_weights = _read(self.folder / BEST)

    def save(self) -> None:
        """Write the last checkpoint; it appears when it is complete."""
        held = {name: part.state_dict() for name, part in self.parts.items()}
        self._write(LAST, held | {"progressed": {name: getattr(self, name) for name in KEPT}})

    def log(self, learning_rate: float) -> None:
        """Add a row to the history."""
        loss = sum(self.losses) / len(self.losses)
        self.history.append({"step": self.step, "loss": loss, "learning_rate": learning_rate})
        self.losses.clear()
        logger.info("step %d: loss %.3f", self.step, loss)

    def compare(self, dice: float, weights: Mapping[str, Tensor]) -> None:
        """Keep weights if they do better on the validation patients than any before.

        NaN stands for the Dice of patients that show no class.
        """
        if math.isnan(dice):
            logger.warning("the validation patients show no class: no weights are chosen by them")
            return
        self.history[-1]["validation_dice"] = dice
        if self.best is not None and dice <= self.best:
            self.stale += 1
            return
        self.best, self.stale = dice, 0
        self.best_weights = {name: t.detach().cpu().clone() for name, t in weights.items()}
        self._write(BEST, self.best_weights)

    def _write(self, name: str, held: Mapping[str, Any]) -> None:
        if self.folder and self.is_writer:
            # Into memory first: of a full disk torch's own writer says nothing that helps.
            torch.save(held, buffer := io.BytesIO())
            write_whole(self.folder / name, buffer.getvalue())


def _read(path: Path) -> dict[str, Any]:
    try:
        # A pickle may run anything; this one is read as tensors and plain values alone.
        held: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise RecipeError(f"the checkpoint {path} is damaged; train with --overwrite") from error
    return held
