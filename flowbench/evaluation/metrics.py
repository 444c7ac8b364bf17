"""The metrics that an experiment file can name; each turns a subject into measurements."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from flowbench import metrics as pure
from flowbench.evaluation.subject import Measurement, Subject
from flowbench.flows import bits_per_dim
from flowbench.seeds import generator

__all__ = [
    "CostReport",
    "DensityCoverage",
    "FeatureMetric",
    "FrechetDistance",
    "KernelDistance",
    "MaximumMeanDiscrepancy",
    "Metric",
    "NegativeLogLikelihood",
    "PathStraightness",
    "PrecisionRecall",
    "SlicedWasserstein2",
    "Wasserstein2",
]


def _distance(subject: Subject, compute: Callable[[], float]) -> float:
    """A distance to the subject's samples; NaN where there is none, which costs this row and no others.

    There is none where a sample diverged, or where either side has a single point.
    """
    enough = min(len(subject.samples), len(subject.reference)) > 1
    return compute() if enough and subject.samples.is_finite else math.nan


class Metric(ABC):
    """Something to measure about a subject."""

    in_sweep = False

    @abstractmethod
    def measure(self, subject: Subject) -> list[Measurement]:
        """Measurements of the subject; none when it lacks what the metric looks at."""

    @property
    def features(self) -> str | None:
        """Name of the feature extractor it needs, if any."""
        return None


class FeatureMetric(Metric):
    """A metric on the features of a named extractor.

    Args:
        features: name of the extractor: `<dataset>-cnn`, or `identity` for raw pixels or coordinates.
    """

    def __init__(self, features: str) -> None:
        self._features = features

    @property
    def features(self) -> str:
        """Name of the feature extractor."""
        return self._features

    def _measurement(
        self, subject: Subject, name: str, value: float, *, pairs: int | None = None, extra: str = ""
    ) -> Measurement:
        """The protocol names extractor, reference split with its size, and number of samples; `pairs` sets both."""
        sweep = "/sweep" if subject.swept else ""
        n = pairs or len(subject.samples)
        reference = f"{subject.reference.name}-{pairs or len(subject.reference)}"
        protocol = f"{self.features}/{reference}/{n}{extra}{sweep}"
        return Measurement(f"{name}[{self.features}]", value, n, protocol)


class _NeighbourMetric(FeatureMetric):
    """Balls around neighbours shrink with N, so both sides have equal numbers of points.

    Args:
        features: name of the extractor.
        k: neighbours that make a ball.
    """

    def __init__(self, features: str, k: int) -> None:
        super().__init__(features)
        self.k = k

    def _pair(self, subject: Subject) -> tuple[Tensor, Tensor]:
        extractor, count = subject.extractors[self.features], self._count(subject)
        return subject.reference.features(extractor)[:count], subject.samples.features(extractor)[:count]

    def _is_defined(self, subject: Subject) -> bool:
        """Whether no sample diverged and every point has `k` neighbours; else the values are NaN."""
        return subject.samples.is_finite and self._count(subject) > self.k

    def _count(self, subject: Subject) -> int:
        return min(len(subject.reference), len(subject.samples))

    def _results(self, subject: Subject, **values: float) -> list[Measurement]:
        extra, count = f"/k{self.k}", self._count(subject)
        return [self._measurement(subject, n, v, pairs=count, extra=extra) for n, v in values.items()]


class FrechetDistance(FeatureMetric):
    """Frechet distance between Gaussians fitted to features (Heusel et al., 2017, arXiv 1706.08500).

    Args:
        features: name of the extractor; only Inception features may be called FID.
    """

    in_sweep = True

    def measure(self, subject: Subject) -> list[Measurement]:
        """`fd[features]`, lower is better."""
        return [self._measurement(subject, "fd", _distance(subject, lambda: self._value(subject)))]

    def _value(self, subject: Subject) -> float:
        extractor = subject.extractors[self.features]
        statistics = []
        for part in (subject.samples, subject.reference):
            collected = pure.FeatureStatistics(extractor.dimension)
            collected.update(part.features(extractor))
            statistics.append(collected)
        return pure.frechet_distance(*statistics)


class KernelDistance(FeatureMetric):
    """Kernel distance, unbiased on the full sets (Binkowski et al., 2018, arXiv 1801.01401)."""

    def measure(self, subject: Subject) -> list[Measurement]:
        """`kid[features]`, lower is better; may be below 0."""
        return [self._measurement(subject, "kid", _distance(subject, lambda: self._value(subject)))]

    def _value(self, subject: Subject) -> float:
        extractor = subject.extractors[self.features]
        generated, real = (part.features(extractor) for part in (subject.samples, subject.reference))
        return pure.kernel_distance(generated, real).mean


class PrecisionRecall(_NeighbourMetric):
    """Improved precision and recall (Kynkaanniemi et al., 2019, arXiv 1904.06991).

    Args:
        features: name of the extractor.
        k: neighbours that make a ball.
    """

    def __init__(self, features: str, k: int = 3) -> None:
        super().__init__(features, k)

    def measure(self, subject: Subject) -> list[Measurement]:
        """`precision[features]` and `recall[features]`, in [0, 1], higher is better."""
        if not self._is_defined(subject):
            return self._results(subject, precision=math.nan, recall=math.nan)
        real, generated = self._pair(subject)
        result = pure.precision_recall(real, generated, self.k)
        return self._results(subject, precision=result.precision, recall=result.recall)


class DensityCoverage(_NeighbourMetric):
    """Density and coverage (Naeem et al., 2020, arXiv 2002.09797).

    Args:
        features: name of the extractor.
        k: neighbours that make a ball.
    """

    def __init__(self, features: str, k: int = 5) -> None:
        super().__init__(features, k)

    def measure(self, subject: Subject) -> list[Measurement]:
        """`density[features]` (may exceed 1) and `coverage[features]` in [0, 1], higher is better."""
        if not self._is_defined(subject):
            return self._results(subject, density=math.nan, coverage=math.nan)
        real, generated = self._pair(subject)
        result = pure.density_coverage(real, generated, self.k)
        return self._results(subject, density=result.density, coverage=result.coverage)


class _PointMetric(Metric):
    """A metric on the points themselves, against as many reference points as there are samples."""

    def _points(self, subject: Subject) -> tuple[Tensor, Tensor]:
        count = min(len(subject.samples), len(subject.reference))
        return subject.samples.x[:count], subject.reference.x[:count]

    def _measurement(self, subject: Subject, name: str, value: float, unit: str, extra: str = "") -> Measurement:
        count = min(len(subject.samples), len(subject.reference))
        sweep = "/sweep" if subject.swept else ""
        protocol = f"points/{subject.reference.name}-{count}/{count}{extra}{sweep}"
        return Measurement(name, value, count, protocol, unit)


class Wasserstein2(_PointMetric):
    """Exact 2-Wasserstein distance between equal numbers of samples and data points."""

    in_sweep = True

    def measure(self, subject: Subject) -> list[Measurement]:
        """`w2` in data units; biased upward at finite N, so compare with the floor row of the same N."""
        value = _distance(subject, lambda: pure.wasserstein2(*self._points(subject)))
        return [self._measurement(subject, "w2", value, "data units")]


class SlicedWasserstein2(_PointMetric):
    """Sliced 2-Wasserstein distance (Bonneel et al., 2015).

    Args:
        num_projections: random directions, the same for every subject.
    """

    def __init__(self, num_projections: int = 128) -> None:
        self.num_projections = num_projections

    def measure(self, subject: Subject) -> list[Measurement]:
        """`sliced_w2` in data units."""
        directions = generator(0, "sliced-w2")
        pair = self._points(subject)
        value = _distance(subject, lambda: pure.sliced_wasserstein2(*pair, self.num_projections, directions))
        return [self._measurement(subject, "sliced_w2", value, "data units", f"/{self.num_projections}-directions")]


class MaximumMeanDiscrepancy(_PointMetric):
    """Unbiased squared MMD with Gaussian kernels around the median distance (Gretton et al., 2012)."""

    def measure(self, subject: Subject) -> list[Measurement]:
        """`mmd`, squared, lower is better; may be below 0."""
        value = _distance(subject, lambda: pure.mmd_rbf(*self._points(subject)))
        return [self._measurement(subject, "mmd", value, "")]


class NegativeLogLikelihood(Metric):
    """Mean negative log-likelihood of the test split, with its kind in the protocol."""

    def measure(self, subject: Subject) -> list[Measurement]:
        """`nll`: bits/dim of uniformly dequantised data (an upper bound on the discrete one), else nats."""
        if subject.log_prob is None:
            return []
        log_prob, n = subject.log_prob.double(), len(subject.log_prob)
        protocol = self._protocol(subject, n)
        if subject.spec.levels is None:
            return [Measurement("nll", float(-log_prob.mean()), n, protocol, "nats")]
        value = bits_per_dim(log_prob.mean(), subject.spec.num_dims, subject.spec.bin_width)
        return [Measurement("nll", float(value), n, protocol, "bits/dim")]

    def _protocol(self, subject: Subject, n: int) -> str:
        """Kind, split, N, and whatever else moves the value: labels, the place in the bins, the solver."""
        parts = [subject.likelihood, "test", str(n)]
        if subject.given_label:
            parts.append("given-label")
        if subject.spec.levels is not None:
            place = "uniform-dequantisation" if subject.dequantize == "uniform" else "bin-centres"
            parts.append(f"{place}-{subject.spec.levels}-levels")
        return "/".join([*parts, subject.likelihood_method] if subject.likelihood_method else parts)


class PathStraightness(Metric):
    """Straightness, path energy and its split, normalised path energy and path length ratio."""

    def measure(self, subject: Subject) -> list[Measurement]:
        """Means over paths; squared data units summed over dimensions, except the pure ratios."""
        if subject.geometry is None:
            return []
        summary, n = subject.geometry.mean(), len(subject.geometry.straightness)
        protocol, unit = f"{subject.space}/{n}-paths", f"squared {subject.space.split(' ')[0]} units"
        rows = [
            Measurement(name, summary[name], n, protocol, unit)
            for name in ("straightness", "path_energy", "displacement")
        ]
        rows.append(Measurement("path_length_ratio", summary["path_length_ratio"], n, protocol))
        if subject.transport_cost is not None:
            value = pure.normalized_path_energy(summary["path_energy"], subject.transport_cost)
            rows.append(Measurement("npe", value, n, f"{protocol}/w2-squared={subject.transport_cost:.4f}"))
        return rows


class CostReport(Metric):
    """What training and sampling cost on this machine."""

    def measure(self, subject: Subject) -> list[Measurement]:
        """Parameters, operations, seconds, memory, evaluations per sample and samples per second."""
        cost, n = subject.cost, len(subject.samples)
        if cost is None:
            return []
        rows = [
            ("parameters", float(cost.parameters), ""),
            ("train_flops", cost.train_flops, "FLOP"),
            ("train_seconds", cost.train_seconds, "s"),
            ("samples_seen", float(cost.samples_seen), ""),
            ("peak_memory", cost.peak_memory_mb, "MiB"),
            ("samples_per_second", cost.samples_per_second, "1/s"),
        ]
        if subject.network_evaluations is not None:
            rows.append(("network_evaluations", subject.network_evaluations, "per sample"))
        return [Measurement(name, value, n, "cost", unit) for name, value, unit in rows]
