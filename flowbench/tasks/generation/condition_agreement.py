"""How well samples keep to conditions that are more than labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.core.rows import Goal
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.failures import agreed
from flowbench.evaluation.gather import gather_by_index
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.probe import Probe, Setup
from flowbench.evaluation.prospect import Prospect
from flowbench.families import FlowModule, LatentSpace
from flowbench.families.conditioning.by_index import condition_at, condition_rows
from flowbench.tasks.generation.held_out import is_latent

__all__ = ["ConditionAgreement", "ConditionScore", "ConditionScores"]


@dataclass(frozen=True)
class ConditionScore:
    """How well samples keep to their condition.

    Attributes:
        values: one per sample, shape (N,).
        unit: of the values.
        floor: the same of the condition's own images through the autoencoder, shape (N,): what its decoder leaves of
            the best sample; None in data space.
        protocol: the condition and the split.
    """

    values: Tensor
    unit: str
    floor: Tensor | None
    protocol: str


@dataclass(frozen=True)
class ConditionScores(Probe[Mapping[str, ConditionScore]]):
    """Scores of the first samples, of which nothing is kept of the data but what the flow put there; by metric name.

    Attributes:
        num_samples: how many; None takes as many as the evaluator draws.
    """

    num_samples: int | None = None
    stage = "conditions"
    follows_sampler = True

    def merge(self, other: ConditionScores) -> ConditionScores:
        """The larger number of samples."""
        both = (self.num_samples, other.num_samples)
        return ConditionScores(None if None in both else max(filter(None, both)))

    def ask(self, setup: Setup) -> Mapping[str, ConditionScore] | None:
        """Sample by sample; a collective."""
        flow = setup.module
        if not isinstance(flow, FlowModule) or (conditioner := flow.conditioner) is None:
            return None
        num = min(self.num_samples or setup.num_samples, setup.num_samples)
        drawn: dict[str, list[Tensor]] = {}
        floor: dict[str, list[Tensor]] = {}
        units: dict[str, str] = {}
        with agreed():
            for chunk in setup.batches(setup.shard(num)):
                condition = condition_at(flow, setup, chunk)
                grid = condition.grid
                assert grid is not None, "this flow has a conditioner"
                # Without the original nothing is pasted: known pixels would agree however bad the flow is.
                unpasted = replace(condition, grid=replace(grid, original=None))
                x = flow.sample(flow.draw_noise(chunk, setup.seed), unpasted, **asdict(setup.override)).x
                original = setup.data.model_values(setup.held_out.name, condition_rows(setup, chunk)).to(flow.device)
                ideal = flow.space.decode(flow.space.encode_mean(original))
                for found, points in ((drawn, x), (floor, ideal)):
                    for name, (values, unit) in conditioner.scores(points, grid).items():
                        found.setdefault(name, []).append(values.cpu())
                        units[name] = unit
        index, latent = setup.shard(num), isinstance(flow.space, LatentSpace)
        return {
            name: ConditionScore(
                gather_by_index(index, torch.cat(drawn[name])),
                unit,
                gather_by_index(index, torch.cat(floor[name])) if latent else None,
                f"{conditioner.name}/{setup.held_out.name}",
            )
            for name, unit in units.items()
        }


# Of the samples, and of the condition's own images through the autoencoder.
_SOURCES: tuple[tuple[str, Goal], ...] = (("", "up"), ("reconstruction_", "none"))


class ConditionAgreement(Metric):
    """How well samples of a flow under inpainting or semantic conditions keep to them, and the autoencoder's floor.

    Known values are not pasted back for it. `inpainting_psnr` (unknown pixels against the original), `known_psnr` and
    `semantic_agreement`; with the prefix `reconstruction_` the same of the originals through the autoencoder. Flows
    without such conditions have no such rows.

    Args:
        num_samples: how many samples, >= 1, counted from the first; None takes as many as the evaluator draws.

    Raises:
        ValueError: for a number below 1.
    """

    declares = tuple(
        MetricInfo(f"{prefix}{name}", goal, always=False)
        for prefix, goal in _SOURCES
        for name in ("inpainting_psnr", "known_psnr", "semantic_agreement")
    )

    def __init__(self, num_samples: int | None = None) -> None:
        check_count("num_samples", num_samples, or_none=True)
        self._num_samples = num_samples

    def probes(self) -> tuple[Probe[Any], ...]:
        """The scores of the samples."""
        return (ConditionScores(self._num_samples),)

    def expected(self, who: Prospect) -> tuple[str, ...] | None:
        """See :meth:`Metric.expected`: what the flow's conditioner measures, of an autoencoder's images too."""
        if not isinstance(who.module, FlowModule) or who.module.conditioner is None:
            return ()
        names = who.module.conditioner.score_names(who.spec)
        if names is None or not is_latent(who):
            return names
        return (*names, *(f"reconstruction_{name}" for name in names))

    def measure(self, answers: Answers) -> list[Measurement]:
        """Means over samples."""
        found, num = answers[ConditionScores()] or {}, self._num_samples or answers.num_samples
        return [row for name, score in found.items() for row in _measured(name, score, num)]


def _measured(name: str, score: ConditionScore, num: int) -> Iterator[Measurement]:
    values = score.values[:num]
    n, protocol = len(values), f"{score.protocol}/{len(values)}"
    yield Measurement(name, float(values.mean()), n, protocol, score.unit)
    if score.floor is not None:
        yield Measurement(f"reconstruction_{name}", float(score.floor[:num].mean()), n, protocol, score.unit)
