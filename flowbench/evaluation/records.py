"""From measurements to rows, and the file of quality against training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L

from flowbench.core.checks import check_seed
from flowbench.core.rows import Row
from flowbench.core.storage import write_text
from flowbench.evaluation.measurement import Measurement
from flowbench.evaluation.subject import Subject
from flowbench.training import Budget

__all__ = ["Curve", "Identity", "make_row"]


@dataclass(frozen=True)
class Identity:
    """Who is measured, for the rows.

    Attributes:
        bench: name of the bench, or empty.
        problem: name of the problem, or empty.
        contender: name of the contender.
        seed: training seed, >= 0.
        config_hash: fingerprint of the resolved configuration.
    """

    bench: str = ""
    problem: str = ""
    contender: str = ""
    seed: int = 0
    config_hash: str = ""

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)


def make_row(
    identity: Identity,
    subject: Subject,
    measurement: Measurement,
    *,
    contender: str,
    family: str,
    weights: str,
    provenance: Mapping[str, Any],
) -> Row:
    """The row of one measurement.

    Args:
        identity: bench, problem and seed.
        subject: who was measured.
        measurement: the number.
        contender: the contender's name, or that of a reference row.
        family: class of the flow, `reference`, or `external`.
        weights: `ema`, `raw` or `none`.
        provenance: where the number comes from.
    """
    return Row(
        bench=identity.bench,
        problem=identity.problem,
        contender=contender,
        family=family,
        dataset=subject.spec.name,
        seed=identity.seed,
        metric=measurement.metric,
        value=None if measurement.reason else measurement.value,
        n=measurement.n,
        protocol=measurement.protocol,
        unit=measurement.unit,
        goal=measurement.goal,
        group=measurement.group,
        axis=subject.swept,
        at=subject.at,
        network_evaluations=subject.network_evaluations,
        guidance=subject.guidance,
        sampler=subject.sampler,
        weights=weights,
        status="failed" if measurement.reason else "ok",
        provenance={**provenance, **({"message": measurement.reason} if measurement.reason else {})},
    )


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
