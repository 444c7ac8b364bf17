"""Metrics on the points themselves."""

from __future__ import annotations

from torch import Tensor

from flowbench import metrics as pure
from flowbench.core.checks import check_count
from flowbench.core.seeds import generator
from flowbench.data import DataSpec
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.sample_metric import SampleMetric, check_points, distance
from flowbench.evaluation.sampling import samples_of

__all__ = ["MaximumMeanDiscrepancy", "SlicedWasserstein2", "Wasserstein2"]


class _PointMetric(SampleMetric):
    """A metric on the points themselves, against as many reference points as there are samples."""

    name: str

    @property
    def declares(self) -> tuple[MetricInfo, ...]:  # type: ignore[override]
        """The one distance."""
        return (MetricInfo(self.name, "down"),)

    def check(self, dataset: str, spec: DataSpec) -> None:
        """Refuse images."""
        check_points(self.name, spec)

    def _points(self, answers: Answers) -> tuple[Tensor, Tensor]:
        count = min(len(samples_of(answers)), len(answers.reference))
        return samples_of(answers).points()[:count], answers.reference.points()[:count]

    def _measurement(self, answers: Answers, value: float, unit: str, extra: str = "") -> Measurement:
        count = min(len(samples_of(answers)), len(answers.reference))
        protocol = f"points/{answers.reference.name}-{count}/{count}{extra}"
        return Measurement(self.name, value, count, protocol, unit)


class Wasserstein2(_PointMetric):
    """Exact 2-Wasserstein distance between equal numbers of samples and data points."""

    in_sweep = True
    name = "w2"

    def measure(self, answers: Answers) -> list[Measurement]:
        """`w2` in the units of model space; biased upward at finite N, so compare with the floor row of the same N."""
        value = distance(answers, lambda: pure.wasserstein2(*self._points(answers)))
        return [self._measurement(answers, value, f"{answers.spec.unit_name} units")]


class SlicedWasserstein2(_PointMetric):
    """Sliced 2-Wasserstein distance (Bonneel et al., 2015).

    Args:
        num_projections: random directions, >= 1, the same for everybody.
    """

    name = "sliced_w2"

    def __init__(self, num_projections: int = 128) -> None:
        check_count("num_projections", num_projections)
        self.num_projections = num_projections

    def measure(self, answers: Answers) -> list[Measurement]:
        """`sliced_w2` in the units of model space."""
        directions = generator(0, "sliced-w2")
        pair = self._points(answers)
        value = distance(answers, lambda: pure.sliced_wasserstein2(*pair, self.num_projections, directions))
        unit, extra = f"{answers.spec.unit_name} units", f"/{self.num_projections}-directions"
        return [self._measurement(answers, value, unit, extra)]


class MaximumMeanDiscrepancy(_PointMetric):
    """Unbiased squared MMD with Gaussian kernels around the median distance (Gretton et al., 2012)."""

    name = "mmd"

    def measure(self, answers: Answers) -> list[Measurement]:
        """`mmd`, squared, lower is better; may be below 0."""
        value = distance(answers, lambda: pure.mmd_rbf(*self._points(answers)))
        return [self._measurement(answers, value, "")]
