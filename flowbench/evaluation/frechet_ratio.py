"""FDr: how many times farther from the reference samples are than held-out data, in several feature spaces."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from flowbench import metrics as pure
from flowbench.core.checks import check_count
from flowbench.core.remarks import say_once
from flowbench.core.sample_size import sample_size_warning
from flowbench.core.seeds import generator
from flowbench.data import DataSpec
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.extractors import check_extractor
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.probe import Probe
from flowbench.evaluation.prospect import Prospect
from flowbench.evaluation.sample_metric import SampleMetric
from flowbench.evaluation.samples import RealSet
from flowbench.evaluation.sampling import Samples, samples_of
from flowbench.metrics import FeatureExtractor

__all__ = ["FrechetRatio"]

Ends = tuple[float, float, float]
"""A ratio and the ends of its interval."""


class FrechetRatio(SampleMetric):
    """Frechet distance over that of held-out data at equal N and protocol, and its mean over feature spaces.

    1 is as good as held-out data (FDr, arXiv 2604.28190). The smaller of both numbers of samples, counted from the
    first, is taken of each side.

    Args:
        features: names of one extractor or more, see :class:`FeatureMetric`.
        num_samples: see :class:`FeatureMetric`.
        num_reference: see :class:`FeatureMetric`.
        sweep: measure it at every point of a sweep, too.
        interval: add the ends of the 95 % interval over redrawn samples and held-out data
            (:func:`flowbench.metrics.frechet_ratio_interval`). All spaces see the same samples, so the interval of the
            mean takes their errors as one.

    Raises:
        ValueError: for no extractor, or counts below 2.
    """

    def __init__(
        self,
        features: Sequence[str],
        num_samples: int | None = None,
        num_reference: int | None = None,
        sweep: bool = True,
        interval: bool = False,
    ) -> None:
        if isinstance(features, str) or not features:
            raise ValueError(f"features must be a list of extractors, got {features!r}: write [{features or 'auto'}]")
        check_count("num_samples", num_samples, at_least=2, or_none=True, hint="null is all")
        check_count("num_reference", num_reference, at_least=2, or_none=True, hint="null is all")
        self.features = tuple(dict.fromkeys(features))
        self.num_samples, self._num_reference = num_samples, num_reference
        self.in_sweep, self.interval = sweep, interval

    @property
    def declares(self) -> tuple[MetricInfo, ...]:  # type: ignore[override]
        """The ratio in each space, and the mean, which has no brackets."""
        found: list[MetricInfo] = []
        for space in (*(f"[{name}]" for name in self.features), ""):
            found.append(MetricInfo(f"fdr{space}", "down"))
            if self.interval:
                found += [MetricInfo(f"fdr_low{space}"), MetricInfo(f"fdr_high{space}")]
        return tuple(found)

    def expected(self, who: Prospect) -> tuple[str, ...]:
        """See :meth:`Metric.expected`; the interval is left out of a sweep."""
        ends = ("fdr_low", "fdr_high")
        return tuple(name for name in self.names if not (who.swept and name.startswith(ends)))

    def probes(self) -> tuple[Probe[Any], ...]:
        """Samples with their features in every space."""
        return (Samples(frozenset((name, self.num_samples) for name in self.features)),)

    def check(self, dataset: str, spec: DataSpec) -> None:
        """Refuse data that an extractor cannot take."""
        for name in self.features:
            check_extractor(name, dataset, spec)

    @property
    def extractors(self) -> tuple[str, ...]:
        """See :attr:`Metric.extractors`."""
        return self.features

    def with_features(self, names: Mapping[str, str]) -> Self:
        """See :meth:`Metric.with_features`."""
        renamed = copy.copy(self)
        renamed.features = tuple(dict.fromkeys(names.get(name, name) for name in self.features))
        return renamed

    @property
    def num_reference(self) -> int | None:
        """How many samples of the reference split it looks at; None is all."""
        return self._num_reference

    def fill_cache(self, reference: RealSet, extractors: Mapping[str, FeatureExtractor]) -> None:
        """Extract the reference's features in every space, and their moments."""
        if reference.spec.modality == "image":
            for name in self.features:
                reference.moments(extractors[name], self.num_reference or len(reference))

    def measure(self, answers: Answers) -> list[Measurement]:
        """`fdr[NAME]` for each space and `fdr`, their mean; NaN where a sample diverged."""
        found = [self._ends(answers, name) for name in self.features]
        mean = tuple(sum(values) / len(found) for values in zip(*found, strict=True))
        rows = [
            row
            for name, ends in zip(self.features, found, strict=True)
            for row in self._rows(answers, f"[{name}]", ends, answers.extractors[name].protocol)
        ]
        protocols = "+".join(answers.extractors[name].protocol for name in self.features)
        return [*rows, *self._rows(answers, "", (mean[0], mean[1], mean[2]), protocols)]

    def _counts(self, answers: Answers) -> tuple[int, int]:
        """Samples of either side of the ratio, and of the reference."""
        n, m = min(len(samples_of(answers)), len(answers.held_out)), len(answers.reference)
        return min(self.num_samples or n, n), min(self.num_reference or m, m)

    def _has_interval(self, answers: Answers) -> bool:
        return self.interval and not answers.override.axis

    def _ends(self, answers: Answers, name: str) -> Ends:
        """The ratio in one space; without an interval its ends are NaN."""
        (n, m), extractor = self._counts(answers), answers.extractors[name]
        if n <= extractor.dimension:
            say_once(f"fdr[{name}]: {sample_size_warning(n, extractor.dimension)}")
        if not samples_of(answers).is_finite or min(n, m) < 2:
            return math.nan, math.nan, math.nan
        sides = samples_of(answers).features(extractor, n), answers.held_out.features(extractor, n)
        moments = answers.reference.moments(extractor, m)
        if self._has_interval(answers) and n >= 4:
            rng, groups = generator(0, "frechet-ratio"), min(25, n // 2)
            value, low, high, _ = pure.frechet_ratio_interval(*sides, moments, rng, num_groups=groups)
            return value, low, high
        return pure.frechet_ratio(*sides, moments), math.nan, math.nan

    def _rows(self, answers: Answers, space: str, ends: Ends, features: str) -> list[Measurement]:
        n, m = self._counts(answers)
        protocol = f"{features}/{answers.reference.name}-{m}/{n}-over-{answers.held_out.name}-{n}"
        rows = [Measurement(f"fdr{space}", ends[0], n, protocol)]
        if self._has_interval(answers):
            names = (f"fdr_low{space}", f"fdr_high{space}")
            rows += [
                Measurement(name, end, n, f"{protocol}/jackknife-95") for name, end in zip(names, ends[1:], strict=True)
            ]
        return rows
