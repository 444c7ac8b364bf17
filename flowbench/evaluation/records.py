"""From measurements to rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flowbench.core.checks import check_seed
from flowbench.core.rows import Row
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.measurement import Measurement
from flowbench.evaluation.sampling import Samples

__all__ = ["Identity", "make_row"]


@dataclass(frozen=True)
class Identity:
    """Who is measured, for the rows.

    Attributes:
        bench: name of the bench, or empty.
        problem: name of the problem, or empty.
        contender: name of the contender.
        seed: training seed, >= 0.
        config_hash: fingerprint of the resolved configuration.
        seeds: those of initialisation, data order and training noise, where they are not all ``seed``; the evaluation
            has its own.
    """

    bench: str = ""
    problem: str = ""
    contender: str = ""
    seed: int = 0
    config_hash: str = ""
    seeds: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        for name, seed in self.seeds.items():
            check_seed(f"seeds.{name}", seed)


def make_row(
    identity: Identity,
    answers: Answers,
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
        answers: what it was computed from.
        measurement: the number.
        contender: the contender's name, or that of a reference row.
        family: class of the flow, `reference`, or `external`.
        weights: `ema`, `raw` or `none`.
        provenance: where the number comes from.
    """
    drawn, override = answers.get(Samples()), answers.override
    seeds = {"seeds": dict(identity.seeds)} if identity.seeds and weights != "none" else {}
    message = measurement.reason or measurement.unconverged
    return Row(
        bench=identity.bench,
        problem=identity.problem,
        contender=contender,
        family=family,
        dataset=answers.spec.name,
        seed=identity.seed,
        metric=measurement.metric,
        value=None if measurement.reason else measurement.value,
        n=measurement.n,
        protocol=measurement.protocol,
        unit=measurement.unit,
        goal=measurement.goal,
        group=measurement.group,
        axis=override.axis,
        at=override.at,
        network_evaluations=drawn.network_evaluations if drawn else override.network_evaluations,
        guidance=answers.guidance,
        sampler=answers.sampler,
        weights=weights,
        status="failed" if measurement.reason else "unconverged" if measurement.unconverged else "ok",
        provenance={**provenance, **seeds, **measurement.details, **({"message": message} if message else {})},
    )
