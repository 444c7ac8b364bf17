"""A small file that says how far a run is, for whoever watches from outside."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from flowbench.families import Budget
from flowbench.storage import write_text

__all__ = ["ProgressFile", "read_phase"]

# Seconds between two writes during training.
INTERVAL = 1.0


class ProgressFile(L.Callback):
    """Writes ``progress.json`` in the run's folder, about once a second.

    Args:
        path: the file.
        budget: says which share of the training is done.
        clock: seconds since the epoch.
    """

    def __init__(self, path: Path, budget: Budget | None, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self.budget = budget
        self._clock = clock
        self._last = 0.0
        self._loss: torch.Tensor | float | None = _last_loss(path)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write when a second has passed."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        if isinstance(loss, torch.Tensor):
            self._loss = loss.detach()  # read when it is written, because that waits for the device
        if self._clock() - self._last >= INTERVAL:
            self.write(trainer, "fit")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Training is over; the budget says whether it is used up."""
        self.write(trainer, "fit")

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Measuring."""
        self.write(trainer, "test")

    def write(self, trainer: L.Trainer, phase: str) -> None:
        """Write the file on process 0, atomically.

        Args:
            trainer: for the step.
            phase: `fit`, `test` or `done`.
        """
        if not trainer.is_global_zero:
            return
        self._last = self._clock()
        record = {
            "phase": phase,
            "step": self.budget.steps if self.budget else trainer.global_step,
            "max_steps": self.budget.max_steps if self.budget else None,
            "fraction": self.budget.progress if self.budget else 0.0,
            "loss": None if self._loss is None else float(self._loss),
            "samples_seen": self.budget.samples_seen if self.budget else None,
            "train_seconds": self.budget.train_seconds if self.budget else None,
            "updated": self._last,
        }
        write_text(self.path, json.dumps(record))


def read_phase(path: Path) -> str | None:
    """The phase that a run has reached, or None when it has not begun."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["phase"])
    except (OSError, ValueError, KeyError):
        return None


def _last_loss(path: Path) -> float | None:
    """The loss that the run's training ended with, which a measurement of it leaves as it is."""
    try:
        loss = json.loads(path.read_text(encoding="utf-8"))["loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(loss) if isinstance(loss, (int, float)) else None
