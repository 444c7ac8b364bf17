"""What metrics of samples share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from flowbench.data import DataSpec
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.probe import Probe
from flowbench.evaluation.sampling import Samples, samples_of

__all__ = ["SampleMetric", "check_points", "distance"]


class SampleMetric(Metric):
    """A metric of samples."""

    def probes(self) -> tuple[Probe[Any], ...]:
        """The samples."""
        return (Samples(),)


def check_points(name: str, spec: DataSpec) -> None:
    """Refuse images where points are compared.

    Raises:
        ValueError: names what suits images.
    """
    if spec.modality != "vector":
        raise ValueError(
            f"{name} compares points, and {spec.name} holds images of shape {spec.shape}: take a metric on features, "
            "such as FrechetDistance"
        )


def distance(answers: Answers, compute: Callable[[], float]) -> float:
    """A distance between samples and reference; NaN where there is none, which costs this row and no others.

    There is none where a sample diverged, or where either side has a single point.
    """
    samples = samples_of(answers)
    enough = min(len(samples), len(answers.reference)) > 1
    return compute() if enough and samples.is_finite else math.nan
