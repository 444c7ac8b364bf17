"""What every metric of an experiment file is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from flowbench.data import DataSpec
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.probe import Probe
from flowbench.evaluation.samples import RealSet
from flowbench.metrics import FeatureExtractor

if TYPE_CHECKING:
    from flowbench.evaluation.prospect import Prospect

__all__ = ["Metric"]


class Metric(ABC):
    """A computation on the answers to its probes.

    Attributes:
        declares: every number that it may have: name, goal and group. Of a name that it does not declare neither a
            higher nor a lower value is called better.
        in_sweep: whether it is measured at every point of a sweep, too.
    """

    declares: tuple[MetricInfo, ...] = ()
    in_sweep: bool = False

    @abstractmethod
    def probes(self) -> tuple[Probe[Any], ...]:
        """Every probe whose answer it looks up."""

    @abstractmethod
    def measure(self, answers: Answers) -> list[Measurement]:
        """Its numbers, computed on process 0; none where what it looks at does not exist."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its measurements, as far as they do not depend on who is measured; empty where all do."""
        return tuple(info.name for info in self.declares if info.always)

    def info(self, name: str) -> MetricInfo:
        """What it declares about one of its numbers."""
        return next((info for info in self.declares if info.name == name), MetricInfo(name))

    def check(self, dataset: str, spec: DataSpec) -> None:  # noqa: B027
        """Refuse data that it cannot be measured on, before anything is trained; by default none.

        Args:
            dataset: name in the catalogue or of a user's format.
            spec: shape, classes and value grid of the data.

        Raises:
            ValueError: names what suits them.
        """

    def check_reference(self, split: str) -> None:  # noqa: B027
        """Refuse a split that it cannot compare samples with; by default none.

        Args:
            split: `train`, `val` or `test`.

        Raises:
            ValueError: names what to change.
        """

    def expected(self, who: Prospect) -> tuple[str, ...] | None:
        """Names of the measurements that somebody will have, so that a claim on any other is refused before training.

        Args:
            who: a module or a reference row, before it is measured.

        Returns:
            The names; None where they cannot be known before, and a claim may name anything.
        """
        return self.names or None

    @property
    def extractors(self) -> tuple[str, ...]:
        """Names of the feature extractors it needs; most metrics need one or none."""
        return ()

    def with_features(self, names: Mapping[str, str]) -> Self:
        """The same metric with other extractors, where `names` has one for a name that it was given."""
        return self

    @property
    def num_reference(self) -> int | None:
        """How many samples of the reference split it looks at, counted from the first; None is all, 0 none."""
        return None

    def fill_cache(  # noqa: B027
        self, reference: RealSet, extractors: Mapping[str, FeatureExtractor]
    ) -> None:
        """Put into the cache what it needs of the reference split and all contenders share; by default nothing."""

    def pictures(self, answers: Answers) -> dict[str, Tensor]:
        """Pictures beside the numbers, uint8 (C, H, W) by name; most metrics have none."""
        return {}
