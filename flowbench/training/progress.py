"""A small file with the progress of a run, for monitoring from outside and for runs that need its weights."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from flowbench.core.preparation_progress import note_progress
from flowbench.core.storage import read_record, write_text
from flowbench.training import Budget

__all__ = ["ProgressFile", "is_trained", "note_end", "read_phase"]

# Seconds between two writes during training.
INTERVAL = 1.0
_COUNT = " 0123456789/"


class ProgressFile(L.Callback):
    """Writes ``progress.json`` in the run's folder, about once a second.

    Attributes:
        trained: whether training has ended as its configuration says; written with every record, because a run may be
            measured, or fail to be, long after it.

    Args:
        path: the file.
        budget: gives the share of the training that is done.
        clock: seconds since the epoch.
    """

    def __init__(self, path: Path, budget: Budget | None, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self.budget = budget
        self.trained = is_trained(path)
        self._clock = clock
        self._last = 0.0
        self._loss: torch.Tensor | float | None = _last_loss(path)
        self._written: dict[str, Any] = {}

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
        """Measuring begins; :meth:`stage` records its progress."""
        self.write(trainer, "test")

    def stage(self, what: str, fraction: float, phase: str = "test") -> None:
        """Note what a measurement does; for process 0.

        What begins is written at once, because it may take long; how far it is, at most once a second.

        Args:
            what: e.g. `samples 256/360`.
            fraction: share of the measurement that is done.
            phase: `test` of a flow, which follows its training, or `reference` for rows of what is not trained.
        """
        before = str(self._written.get("what", ""))
        begins = what.rstrip(_COUNT) != before.rstrip(_COUNT)
        if begins or self._clock() - self._last >= INTERVAL:
            self._put({**self._written, "phase": phase, "what": what, "fraction": fraction})

    def write(self, trainer: L.Trainer, phase: str, reason: str | None = None) -> None:
        """Write the file on process 0, atomically.

        Args:
            trainer: for the step.
            phase: `fit`, `test`, `done`, or how the run broke off: `interrupted` by a signal, `failed` by an error. A
                process that was killed leaves the phase that it was in, and its folder's lock free.
            reason: why a run broke off.
        """
        if not trainer.is_global_zero:
            return
        record = {
            "phase": phase,
            "trained": self.trained,
            "step": self.budget.steps if self.budget else trainer.global_step,
            "max_steps": self.budget.max_steps if self.budget else None,
            # Of the training; a measurement that begins has done nothing of its own.
            "fraction": self.budget.progress if self.budget and phase != "test" else 0.0,
            "loss": None if self._loss is None else float(self._loss),
            "samples_seen": self.budget.samples_seen if self.budget else None,
            "train_seconds": self.budget.train_seconds if self.budget else None,
            "train_flops": self.budget.train_flops if self.budget else None,
            "reason": reason,
        }
        self._put(record)

    def _put(self, record: dict[str, Any]) -> None:
        self._last = self._clock()
        self._written = {**record, "updated": self._last}
        write_text(self.path, json.dumps(self._written))
        if record["phase"] == "fit":  # of something required, where another process waits for it
            name = self.path.parent.name.rpartition("-")[0] or self.path.parent.name
            note_progress(f"training {name}, step {record['step']}", record["fraction"])


def note_end(path: Path, phase: str, reason: str) -> None:
    """Note how a run broke off; the other entries of the file stay.

    Args:
        path: ``progress.json``; made where the run had not begun.
        phase: `interrupted` or `failed`.
        reason: one line.
    """
    write_text(path, json.dumps({**read_record(path), "phase": phase, "reason": reason, "updated": time.time()}))


def read_phase(path: Path) -> str | None:
    """The phase that a run has reached, or None when it has not begun."""
    phase = read_record(path).get("phase")
    return None if phase is None else str(phase)


def is_trained(path: Path) -> bool:
    """Whether a run's training is finished: not only ended, for a signal or an error ends it too."""
    record = read_record(path)
    # Files of earlier versions have the phase alone, and `done` only after the whole training.
    return bool(record.get("trained", record.get("phase") == "done"))


def _last_loss(path: Path) -> float | None:
    """The loss that the run's training ended with, which a measurement of it leaves as it is."""
    loss = read_record(path).get("loss")
    return float(loss) if isinstance(loss, (int, float)) else None
