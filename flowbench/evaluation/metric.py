"""What every metric of an experiment file is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Self

from torch import Tensor

from flowbench.data import DataSpec
from flowbench.evaluation.extractors import check_extractor
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.prospect import Prospect
from flowbench.evaluation.subject import Part, Subject

__all__ = ["Metric", "check_points", "distance"]


class Metric(ABC):
    """Something to measure about a subject.

    Attributes:
        declares: every number that it may have: name, goal and group. Of a name that it does not declare neither a
            higher nor a lower value is called better.
        in_sweep: whether it is measured at every point of a sweep, too.
        needs: what it looks at; where a part could not be computed, its rows say so and :meth:`measure` is not called.
    """

    declares: tuple[MetricInfo, ...] = ()
    in_sweep: bool = False
    needs: tuple[Part, ...] = ("samples",)

    @abstractmethod
    def measure(self, subject: Subject) -> list[Measurement]:
        """Measurements of the subject; none when it lacks what the metric looks at."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its measurements, as far as they do not depend on who is measured; empty where all do."""
        return tuple(info.name for info in self.declares if info.always)

    def info(self, name: str) -> MetricInfo:
        """What it declares about one of its numbers."""
        return next((info for info in self.declares if info.name == name), MetricInfo(name))

    def check(self, dataset: str, spec: DataSpec) -> None:
        """Refuse data that it cannot be measured on, before anything is trained; by default those without its features.

        Args:
            dataset: name in the catalogue or of a user's format.
            spec: shape, classes and value grid of the data.

        Raises:
            ValueError: names what suits them.
        """
        if self.features is not None:
            check_extractor(self.features, dataset, spec)

    def expected(self, who: Prospect) -> tuple[str, ...] | None:
        """Names of the measurements that somebody will have, so that a claim on any other is refused before training.

        Args:
            who: a flow or a reference row, before it is measured.

        Returns:
            The names; None where they cannot be known before, and a claim may name anything.
        """
        return self.names or None

    @property
    def features(self) -> str | None:
        """Name of the feature extractor it needs, if any."""
        return None

    def with_features(self, names: Mapping[str, str]) -> Self:
        """The same metric with another extractor, where `names` has one for the name that it was given."""
        return self

    @property
    def num_samples(self) -> int | None:
        """How many samples it looks at, counted from the first; None is all."""
        return None

    @property
    def num_reference(self) -> int | None:
        """How many samples of the reference split it looks at, counted from the first; None is all, 0 none."""
        return None

    def pictures(self, subject: Subject) -> dict[str, Tensor]:
        """Pictures beside the numbers, uint8 (C, H, W) by name; most metrics have none."""
        return {}


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


def distance(subject: Subject, compute: Callable[[], float]) -> float:
    """A distance to the subject's samples; NaN where there is none, which costs this row and no others.

    There is none where a sample diverged, or where either side has a single point.
    """
    enough = min(len(subject.samples), len(subject.reference)) > 1
    return compute() if enough and subject.samples.is_finite else math.nan
