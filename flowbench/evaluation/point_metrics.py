"""Metrics on the points themselves."""

from __future__ import annotations

from torch import Tensor

from flowbench import metrics as pure
from flowbench.core.checks import check_count
from flowbench.core.seeds import generator
from flowbench.data import DataSpec
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.metric import Metric, check_points, distance
from flowbench.evaluation.subject import Subject

__all__ = ["MaximumMeanDiscrepancy", "SlicedWasserstein2", "Wasserstein2"]


class _PointMetric(Metric):
    """A metric on the points themselves, against as many reference points as there are samples."""

    name: str

    @property
    def declares(self) -> tuple[MetricInfo, ...]:  # type: ignore[override]
        """The one distance."""
        return (MetricInfo(self.name, "down"),)

    def check(self, dataset: str, spec: DataSpec) -> None:
        """Refuse images."""
        check_points(self.name, spec)

    def _points(self, subject: Subject) -> tuple[Tensor, Tensor]:
        count = min(len(subject.samples), len(subject.reference))
        return subject.samples.points()[:count], subject.reference.points()[:count]

    def _measurement(self, subject: Subject, value: float, unit: str, extra: str = "") -> Measurement:
        count = min(len(subject.samples), len(subject.reference))
        protocol = f"points/{subject.reference.name}-{count}/{count}{extra}"
        return Measurement(self.name, value, count, protocol, unit)


class Wasserstein2(_PointMetric):
    """Exact 2-Wasserstein distance between equal numbers of samples and data points."""

    in_sweep = True
    name = "w2"

    def measure(self, subject: Subject) -> list[Measurement]:
        """`w2` in the units of model space; biased upward at finite N, so compare with the floor row of the same N."""
        value = distance(subject, lambda: pure.wasserstein2(*self._points(subject)))
        return [self._measurement(subject, value, f"{subject.spec.unit_name} units")]


class SlicedWasserstein2(_PointMetric):
    """Sliced 2-Wasserstein distance (Bonneel et al., 2015).

    Args:
        num_projections: random directions, >= 1, the same for every subject.
    """

    name = "sliced_w2"

    def __init__(self, num_projections: int = 128) -> None:
        check_count("num_projections", num_projections)
        self.num_projections = num_projections

    def measure(self, subject: Subject) -> list[Measurement]:
        """`sliced_w2` in the units of model space."""
        directions = generator(0, "sliced-w2")
        pair = self._points(subject)
        value = distance(subject, lambda: pure.sliced_wasserstein2(*pair, self.num_projections, directions))
        unit, extra = f"{subject.spec.unit_name} units", f"/{self.num_projections}-directions"
        return [self._measurement(subject, value, unit, extra)]


class MaximumMeanDiscrepancy(_PointMetric):
    """Unbiased squared MMD with Gaussian kernels around the median distance (Gretton et al., 2012)."""

    name = "mmd"

    def measure(self, subject: Subject) -> list[Measurement]:
        """`mmd`, squared, lower is better; may be below 0."""
        value = distance(subject, lambda: pure.mmd_rbf(*self._points(subject)))
        return [self._measurement(subject, value, "")]
