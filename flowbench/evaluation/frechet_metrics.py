"""The Frechet distance of features, at the N that was drawn and extrapolated."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from flowbench import metrics as pure
from flowbench.core.packages import sha256_of
from flowbench.core.places import expand
from flowbench.core.remarks import say_once
from flowbench.core.sample_size import sample_size_warning
from flowbench.core.seeds import generator
from flowbench.data import DataSpec
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.feature_metrics import FeatureMetric
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.prospect import Prospect
from flowbench.evaluation.sample_metric import distance
from flowbench.evaluation.samples import RealSet
from flowbench.evaluation.sampling import samples_of
from flowbench.metrics import FeatureExtractor, Moments

__all__ = ["FrechetDistance", "FrechetInfinity"]


class _FrechetMetric(FeatureMetric):
    """Compares with the reference split, or with moments from a file.

    Args:
        features: name of the extractor.
        num_samples: see :class:`FeatureMetric`.
        num_reference: see :class:`FeatureMetric`.
        statistics: file of moments to compare with instead; see :func:`flowbench.metrics.load_moments`.

    Raises:
        ValueError: for a file and a number of reference samples at once.
    """

    def __init__(
        self,
        features: str,
        num_samples: int | None = None,
        num_reference: int | None = None,
        statistics: str | None = None,
    ) -> None:
        super().__init__(features, num_samples, num_reference)
        if statistics is not None and num_reference is not None:
            raise ValueError(f"num_reference={num_reference} has no say over the statistics in {statistics}; remove it")
        self.statistics = None if statistics is None else str(expand(statistics))
        # The file's moments and hash: read once, not for every point of a sweep.
        self._loaded: tuple[Moments, str] | None = None

    def check(self, dataset: str, spec: DataSpec) -> None:
        """Refuse a file of moments that cannot be read, besides."""
        super().check(dataset, spec)
        if self.statistics is not None:
            pure.load_moments(self.statistics)

    @property
    def num_reference(self) -> int | None:
        """None of the reference split where a file takes its place."""
        return super().num_reference if self.statistics is None else 0

    def fill_cache(self, reference: RealSet, extractors: Mapping[str, FeatureExtractor]) -> None:
        """Compute the reference's moments, too."""
        super().fill_cache(reference, extractors)
        if self.num_reference != 0 and reference.spec.modality == "image":
            reference.moments(extractors[self.features], self.num_reference or len(reference))

    def _moments(self, answers: Answers) -> Tensor | Moments:
        extractor = answers.extractors[self.features]
        if self.statistics is None:
            return answers.reference.moments(extractor, self.counts(answers)[1])
        return self._of_file(self.statistics, extractor)[0]

    def _of_file(self, path: str, extractor: FeatureExtractor) -> tuple[Moments, str]:
        """A file's moments and hash."""
        if self._loaded is None:
            expected = {"extractor": extractor.name, "checksum": extractor.checksum, "protocol": extractor.protocol}
            self._loaded = pure.load_moments(path, extractor.dimension, expected), sha256_of(path)[:8]
        return self._loaded

    def _against(self, answers: Answers) -> str:
        """What the samples are compared with, for the protocol."""
        if self.statistics is None:
            return f"{answers.reference.name}-{self.counts(answers)[1]}"
        moments, digest = self._of_file(self.statistics, answers.extractors[self.features])
        # The file's hash, because its name says nothing about what it holds.
        return f"statistics-{digest}-{moments.count or 'foreign-unknown-N'}"

    def _result(self, answers: Answers, name: str, value: float, extra: str = "") -> Measurement:
        n, m = self.counts(answers)
        dimension = answers.extractors[self.features].dimension
        if (count := n if self.statistics else min(n, m)) <= dimension:
            say_once(f"{self.label('fd')}: {sample_size_warning(count, dimension)}")
        protocol = f"{answers.extractors[self.features].protocol}/{self._against(answers)}/{n}{extra}"
        return Measurement(self.label(name), value, n, protocol)


class FrechetDistance(_FrechetMetric):
    """Frechet distance between Gaussians fitted to features (Heusel et al., 2017, arXiv 1706.08500).

    Args:
        features: name of the extractor; only Inception features may be called FID.
        num_samples: see :class:`FeatureMetric`.
        num_reference: see :class:`FeatureMetric`.
        statistics: file of moments to compare with instead of the reference split: our own, clean-fid's,
            pytorch-fid's, torch-fidelity's.
        sweep: measure it at every point of a sweep, too.
        interval: add the ends of the 95 % interval over redrawn samples of this model
            (:func:`flowbench.metrics.frechet_interval`); the spread over training seeds is another one.
    """

    def __init__(
        self,
        features: str,
        num_samples: int | None = None,
        num_reference: int | None = None,
        statistics: str | None = None,
        sweep: bool = True,
        interval: bool = False,
    ) -> None:
        super().__init__(features, num_samples, num_reference, statistics)
        self.in_sweep = sweep
        self.interval = interval

    @property
    def bases(self) -> tuple[MetricInfo, ...]:  # type: ignore[override]
        """With the ends of the interval where it is wanted."""
        ends = (MetricInfo("fd_low"), MetricInfo("fd_high")) if self.interval else ()
        return (MetricInfo("fd", "down"), *ends)

    def expected(self, who: Prospect) -> tuple[str, ...]:
        """See :meth:`Metric.expected`; the interval is left out of a sweep."""
        return self.names[:1] if who.swept else self.names

    def measure(self, answers: Answers) -> list[Measurement]:
        """`fd[features]`, or `fid`; lower is better."""
        if not self.interval or answers.override.axis:
            return [self._result(answers, "fd", distance(answers, lambda: self._value(answers)))]
        n, _ = self.counts(answers)
        if not samples_of(answers).is_finite or n < 4:
            return [self._result(answers, name, math.nan, extra) for name, extra in self._names()]
        features = samples_of(answers).features(answers.extractors[self.features], n)
        groups = min(25, n // 2)
        found = pure.frechet_interval(
            features, self._moments(answers), generator(0, "frechet-interval"), num_groups=groups
        )
        values = (found.value, found.low, found.high)
        return [self._result(answers, name, v, extra) for (name, extra), v in zip(self._names(), values, strict=True)]

    @staticmethod
    def _names() -> list[tuple[str, str]]:
        return [("fd", ""), ("fd_low", "/jackknife-95"), ("fd_high", "/jackknife-95")]

    def _value(self, answers: Answers) -> float:
        features = samples_of(answers).features(answers.extractors[self.features], self.counts(answers)[0])
        return pure.frechet_distance_of_features(features, self._moments(answers))


class FrechetInfinity(_FrechetMetric):
    """Frechet distance extrapolated to infinitely many samples (Chong and Forsyth, 2020, arXiv 1911.07023).

    Needs 2.5 samples a feature, 5,120 for Inception's 2,048, and has no value with fewer. The reference is taken as it
    is.

    Args:
        features: name of the extractor.
        num_samples: see :class:`FeatureMetric`.
        num_reference: see :class:`FeatureMetric`.
        statistics: see :class:`FrechetDistance`.
    """

    bases = (MetricInfo("fd_infinity", "down"), MetricInfo("fd_infinity_low"), MetricInfo("fd_infinity_high"))

    def measure(self, answers: Answers) -> list[Measurement]:
        """`fd_infinity[features]`, or `fid_infinity`, and the ends of its 95 % interval."""
        n, _ = self.counts(answers)
        features = samples_of(answers).features(answers.extractors[self.features], n)
        names, values = [info.name for info in self.bases], (math.nan, math.nan, math.nan)
        # Too few samples cost this row and no others.
        if samples_of(answers).is_finite and n >= max(20, math.ceil(2.5 * features.shape[1])):
            found = pure.frechet_infinity(features, self._moments(answers), generator(0, "frechet-infinity"))
            half = 1.96 * found.standard_error
            values = (found.value, found.value - half, found.value + half)
        return [self._result(answers, name, value) for name, value in zip(names, values, strict=True)]
