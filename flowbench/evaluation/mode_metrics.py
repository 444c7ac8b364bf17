"""Metrics on points of data that consist of a few separate modes."""

from __future__ import annotations

import torch
from torch import Tensor

from flowbench.core.checks import check_scale
from flowbench.data import DataSpec
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.prospect import Prospect
from flowbench.evaluation.sample_metric import SampleMetric, check_points, distance
from flowbench.evaluation.sampling import samples_of
from flowbench.metrics.modes import average_minimum_distance, failure_rate, mode_discrepancy, mode_matched_w2

__all__ = ["ModeRecovery", "NearestData"]


class NearestData(SampleMetric):
    """How far samples are from the nearest data point, and how many are too far.

    Args:
        radius: a sample farther than this from every data point is a failure, data units, in [1e-12, 1e12].

    Raises:
        ValueError: for a radius out of range.
    """

    declares = (MetricInfo("average_minimum_distance", "down"), MetricInfo("failure_rate", "down"))
    in_sweep = True

    def check(self, dataset: str, spec: DataSpec) -> None:
        """Refuse images."""
        check_points(type(self).__name__, spec)

    def __init__(self, radius: float) -> None:
        check_scale("radius", radius, hint="give a distance in data units")
        self.radius = radius

    def measure(self, answers: Answers) -> list[Measurement]:
        """`average_minimum_distance` in data units and `failure_rate` in per cent; against all reference points."""
        generated, reference = samples_of(answers).points(), answers.reference.points()
        near = distance(answers, lambda: average_minimum_distance(generated, reference))
        far = distance(answers, lambda: failure_rate(generated, reference, self.radius))
        protocol, n = _protocol(answers), len(generated)
        return [
            Measurement("average_minimum_distance", near, n, protocol, f"{answers.spec.unit_name} units"),
            Measurement("failure_rate", far, n, f"{protocol}/radius-{self.radius:g}", "%"),
        ]


class ModeRecovery(SampleMetric):
    """Whether the modes have their shares, and how well each is covered; a mode is the mean of a class of the data."""

    declares = (MetricInfo("mode_discrepancy", "down"), MetricInfo("mode_matched_w2", "down"))
    in_sweep = True

    def check(self, dataset: str, spec: DataSpec) -> None:
        """Refuse images."""
        check_points(type(self).__name__, spec)

    def expected(self, who: Prospect) -> tuple[str, ...]:
        """See :meth:`Metric.expected`; data without labels have no modes."""
        return () if who.spec.num_classes is None else self.names

    def measure(self, answers: Answers) -> list[Measurement]:
        """`mode_discrepancy` in nats and `mode_matched_w2` in data units; nothing for data without labels."""
        modes = class_means(answers)
        if modes is None:
            return []
        generated, reference = samples_of(answers).points(), answers.reference.points()
        shares = distance(answers, lambda: mode_discrepancy(generated, reference, modes))
        within = distance(answers, lambda: mode_matched_w2(generated, reference, modes))
        protocol, n = f"{_protocol(answers)}/{len(modes)}-class-means", len(generated)
        return [
            Measurement("mode_discrepancy", shares, n, protocol, "nats"),
            Measurement("mode_matched_w2", within, n, protocol, f"{answers.spec.unit_name} units"),
        ]


def class_means(answers: Answers) -> Tensor | None:
    """Mean point of each class of the reference, shape (K, *D); None without labels."""
    points, label = answers.reference.points(), answers.reference.label
    if label is None:
        return None
    return torch.stack([points[label == number].mean(0) for number in label.unique()])


def _protocol(answers: Answers) -> str:
    reference = answers.reference
    return f"points/{reference.name}-{len(reference)}/{len(samples_of(answers))}"
