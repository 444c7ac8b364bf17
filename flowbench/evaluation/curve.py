"""Quality against training: curve.jsonl, and its points in the loggers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L

from flowbench.core.storage import write_text
from flowbench.evaluation.measurement import Measurement
from flowbench.training import Budget

__all__ = ["Curve", "write_point"]


class Curve:
    """curve.jsonl: metrics against steps, samples, seconds and operations of training.

    Args:
        run_dir: the run's folder.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / "curve.jsonl"

    @classmethod
    def of(cls, trainer: L.Trainer) -> Curve:
        """The curve of a trainer's run."""
        return cls(trainer.default_root_dir)

    def steps(self) -> set[int]:
        """Steps that have a point."""
        return {json.loads(line)["step"] for line in self._lines()}

    def lacks(self, trainer: L.Trainer, step: int) -> bool:
        """Whether the validation that was due at a step of the training has left no point."""
        every = trainer.val_check_interval  # in batches; other kinds follow no step
        if not (step and trainer.limit_val_batches and isinstance(every, int)):
            return False
        return step * trainer.accumulate_grad_batches % every == 0 and step not in self.steps()

    def append(self, step: int, budget: Budget | None, measured: Sequence[Measurement]) -> None:
        """Add the point at `step`; a resumed run drops what lies beyond its checkpoint."""
        point: dict[str, Any] = {"step": step}
        if budget is not None:
            point |= {
                "samples_seen": budget.samples_seen,
                "train_seconds": budget.train_seconds,
                "train_flops": budget.train_flops,
            }
        kept = [line for line in self._lines() if json.loads(line)["step"] < step]
        kept += [json.dumps({**point, "metric": m.metric, "value": m.value}) for m in measured]
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []


def write_point(trainer: L.Trainer, step: int, budget: Budget | None, measured: Sequence[Measurement]) -> None:
    """Add a point to the run's curve; training goes on without what could not be measured or has not converged.

    Args:
        trainer: whose run and loggers.
        step: of the training.
        budget: what the training spent; None where it was not metered.
        measured: at that step.
    """
    known = [m for m in measured if not (m.reason or m.unconverged)]
    for m in measured:
        if reason := m.reason or m.unconverged:
            print(f"no point of {m.metric} at step {step}: {reason}", file=sys.stderr, flush=True)
    Curve.of(trainer).append(step, budget, known)
    if trainer.logger is not None and known:
        values: Mapping[str, float] = {f"val/{m.metric}": m.value for m in known}
        trainer.logger.log_metrics(dict(values), step=step)
