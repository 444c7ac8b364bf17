"""Conditions of a flow that takes more than labels: made from held-out images, by the sample's index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.core.rows import Goal
from flowbench.evaluation.drawing import Drawing, condition_at, condition_rows
from flowbench.evaluation.failures import agreed
from flowbench.evaluation.gather import gather_by_index, shard
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.prospect import Prospect
from flowbench.evaluation.subject import ConditionScore, Subject
from flowbench.families import LatentSpace

__all__ = [
    "ConditionAgreement",
    "draw_condition_scores",
    "measured_conditions",
]


# ---- agreement ----------------------------------------------------------------------------------------


def draw_condition_scores(drawing: Drawing, labels: Tensor | None, num: int) -> dict[str, ConditionScore]:
    """Draw samples that keep nothing of the data but what the flow put there, and compare; a collective.

    Args:
        drawing: whose samples.
        labels: of a conditional flow, see :func:`~flowbench.evaluation.drawing.labels_of`.
        num: samples, counted from the first.

    Returns:
        By metric name; empty for a flow without such conditions.
    """
    flow, conditioner = drawing.flow, drawing.flow.conditioner
    if conditioner is None:
        return {}
    num = min(num, drawing.num_samples)
    drawn: dict[str, list[Tensor]] = {}
    floor: dict[str, list[Tensor]] = {}
    units: dict[str, str] = {}
    with agreed():
        index = shard(num, drawing.rank, drawing.world_size)
        for chunk in drawing.batches(index):
            condition = condition_at(drawing, chunk)
            assert condition is not None, "this flow has a conditioner"
            # Without the original nothing is pasted: known pixels would agree however bad the flow is.
            label = None if labels is None else labels[chunk].to(flow.device)
            x = flow.sample(flow.draw_noise(chunk, drawing.seed), label, spatial=replace(condition, original=None)).x
            rows = condition_rows(drawing, chunk)
            original = drawing.data.model_values(drawing.condition_split, rows).to(flow.device)
            ideal = flow.space.decode(flow.space.encode_mean(original))
            for found, points in ((drawn, x), (floor, ideal)):
                for name, (values, unit) in conditioner.scores(points, condition).items():
                    found.setdefault(name, []).append(values.cpu())
                    units[name] = unit
    protocol = f"{conditioner.name}/{drawing.condition_split}/{num}"
    latent = isinstance(flow.space, LatentSpace)
    return {
        name: ConditionScore(
            gather_by_index(index, torch.cat(drawn[name])),
            unit,
            gather_by_index(index, torch.cat(floor[name])) if latent else None,
            protocol,
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
    needs = ("condition_scores",)

    def __init__(self, num_samples: int | None = None) -> None:
        check_count("num_samples", num_samples, or_none=True)
        self._num_samples = num_samples

    @property
    def num_samples(self) -> int | None:
        """How many samples it looks at."""
        return self._num_samples

    def expected(self, who: Prospect) -> tuple[str, ...] | None:
        """See :meth:`Metric.expected`: what the flow's conditioner measures, of an autoencoder's images too."""
        if who.flow is None or who.flow.conditioner is None:
            return ()
        names = who.flow.conditioner.score_names(who.spec)
        if names is None or not who.is_latent:
            return names
        return (*names, *(f"reconstruction_{name}" for name in names))

    def measure(self, subject: Subject) -> list[Measurement]:
        """Means over samples."""
        return [row for name, score in (subject.condition_scores or {}).items() for row in _measured(name, score)]


def measured_conditions(
    drawing: Drawing, labels: Tensor | None, metrics: Iterable[Metric]
) -> dict[str, ConditionScore] | None:
    """:func:`draw_condition_scores` as far as a metric asks for it; None where none does."""
    wanted = [metric for metric in metrics if isinstance(metric, ConditionAgreement)]
    if not wanted:
        return None
    return draw_condition_scores(drawing, labels, max(m.num_samples or drawing.num_samples for m in wanted))


def _measured(name: str, score: ConditionScore) -> Iterator[Measurement]:
    yield Measurement(name, float(score.values.mean()), len(score.values), score.protocol, score.unit)
    if score.floor is not None:
        mean = float(score.floor.mean())
        yield Measurement(f"reconstruction_{name}", mean, len(score.floor), score.protocol, score.unit)
