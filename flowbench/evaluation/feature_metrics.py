"""Metrics on the features of a named network."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Self

from torch import Tensor

from flowbench import metrics as pure
from flowbench.core.checks import check_count
from flowbench.data import DataSpec
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.auto_features import AUTO
from flowbench.evaluation.extractors import check_extractor
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.probe import Probe
from flowbench.evaluation.prospect import Prospect
from flowbench.evaluation.sample_metric import SampleMetric, distance
from flowbench.evaluation.samples import RealSet
from flowbench.evaluation.sampling import Samples, samples_of
from flowbench.metrics import FeatureExtractor

__all__ = [
    "ClassAccuracy",
    "DensityCoverage",
    "FeatureMetric",
    "InceptionScore",
    "KernelDistance",
    "MeanNorm",
    "PrecisionRecall",
]


class FeatureMetric(SampleMetric):
    """A metric on the features of a named extractor.

    Args:
        features: name of the extractor: `auto` (what suits the data, see
            :func:`flowbench.evaluation.resolve_features`), `inception`, `efficientnet-lite0`, `<dataset>-cnn`,
            `identity` (raw pixels or coordinates) or another one of `flowbench.evaluation.get_extractor`.
        num_samples: how many samples to look at, >= 2, counted from the first; None takes all that were drawn.
        num_reference: how many samples of the reference split, >= 2; None takes all.

    Raises:
        ValueError: for counts below 2.
    """

    def __init__(self, features: str, num_samples: int | None = None, num_reference: int | None = None) -> None:
        check_count("num_samples", num_samples, at_least=2, or_none=True, hint="null is all")
        check_count("num_reference", num_reference, at_least=2, or_none=True, hint="null is all")
        self._features, self._num_samples, self._num_reference = features, num_samples, num_reference

    bases: tuple[MetricInfo, ...] = ()
    """What it declares, by names without the extractor's."""

    @property
    def declares(self) -> tuple[MetricInfo, ...]:  # type: ignore[override]
        """Its numbers, by names with the extractor's."""
        return tuple(replace(info, name=self.label(info.name)) for info in self.bases)

    def probes(self) -> tuple[Probe[Any], ...]:
        """Samples with their features."""
        return (Samples.with_features(self.features, self._num_samples),)

    def check(self, dataset: str, spec: DataSpec) -> None:
        """Refuse data that its extractor cannot take."""
        check_extractor(self.features, dataset, spec)

    def fill_cache(self, reference: RealSet, extractors: Mapping[str, FeatureExtractor]) -> None:
        """Extract the reference's features, as far as they are compared with and kept."""
        if self.num_reference != 0 and reference.spec.modality == "image":
            reference.features(extractors[self.features], self.num_reference)

    @property
    def features(self) -> str:
        """Name of the feature extractor."""
        return self._features

    @property
    def extractors(self) -> tuple[str, ...]:
        """See :attr:`Metric.extractors`."""
        return (self.features,)

    def with_features(self, names: Mapping[str, str]) -> Self:
        """See :meth:`Metric.with_features`."""
        found = names.get(self._features, self._features)
        if found == self._features:
            return self
        renamed = copy.copy(self)
        renamed._features = found
        return renamed

    @property
    def num_reference(self) -> int | None:
        """How many samples of the reference split it looks at; None is all."""
        return self._num_reference

    def counts(self, answers: Answers) -> tuple[int, int]:
        """Samples and reference samples that this metric compares."""
        n, m = len(samples_of(answers)), len(answers.reference)
        return min(self._num_samples or n, n), min(self._num_reference or m, m)

    def pair(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Features of the generated and of the real samples."""
        extractor, (n, m) = answers.extractors[self.features], self.counts(answers)
        return samples_of(answers).features(extractor, n), answers.reference.features(extractor, m)

    def measurement(
        self, answers: Answers, name: str, value: float, counts: tuple[int, int], extra: str = ""
    ) -> Measurement:
        """A number whose protocol names extractor, reference split with its size, and number of samples."""
        n, m = counts
        protocol = f"{answers.extractors[self.features].protocol}/{answers.reference.name}-{m}/{n}{extra}"
        return Measurement(self.label(name), value, n, f"{protocol}")

    def label(self, name: str) -> str:
        """The metric's name with its extractor; the Frechet distance of float32 Inception features is the FID."""
        if self.features == "inception" and name.startswith("fd"):
            return name.replace("fd", "fid", 1)
        return f"{name}[{self.features}]"


class _NeighbourMetric(FeatureMetric):
    """Balls around neighbours shrink with N, so both sides have equal numbers of points.

    Args:
        features: name of the extractor.
        k: neighbours that make a ball, >= 1.
        num_samples: see :class:`FeatureMetric`.
        num_reference: see :class:`FeatureMetric`.
    """

    def __init__(self, features: str, k: int, num_samples: int | None = None, num_reference: int | None = None) -> None:
        super().__init__(features, num_samples, num_reference)
        check_count("k", k)
        self.k = k

    def counts(self, answers: Answers) -> tuple[int, int]:
        """The smaller of both counts, twice."""
        smaller = min(super().counts(answers))
        return smaller, smaller

    @abstractmethod
    def compute(self, real: Tensor, generated: Tensor) -> tuple[float, float]:
        """The two numbers, in the order of `bases`."""

    def measure(self, answers: Answers) -> list[Measurement]:
        """Two numbers; NaN where a sample diverged or a point lacks `k` neighbours, which costs these rows alone."""
        counts, names = self.counts(answers), [info.name for info in self.bases]
        values: Iterable[float] = [math.nan] * len(names)
        if samples_of(answers).is_finite and counts[0] > self.k:
            generated, real = self.pair(answers)
            values = self.compute(real, generated)
        pairs = zip(names, values, strict=True)
        return [self.measurement(answers, name, value, counts, f"/k{self.k}") for name, value in pairs]


class KernelDistance(FeatureMetric):
    """Kernel distance, unbiased on the full sets (Binkowski et al., 2018, arXiv 1801.01401)."""

    bases = (MetricInfo("kid", "down"),)

    def measure(self, answers: Answers) -> list[Measurement]:
        """`kid[features]`, lower is better; may be below 0."""
        value = distance(answers, lambda: pure.kernel_distance(*self.pair(answers)).mean)
        return [self.measurement(answers, "kid", value, self.counts(answers))]


class PrecisionRecall(_NeighbourMetric):
    """Improved precision and recall (Kynkaanniemi et al., 2019, arXiv 1904.06991).

    Args:
        features: name of the extractor.
        k: neighbours that make a ball, >= 1.
        num_samples: see :class:`FeatureMetric`.
        num_reference: see :class:`FeatureMetric`.
    """

    bases = (MetricInfo("precision", "up"), MetricInfo("recall", "up"))

    def __init__(
        self, features: str, k: int = 3, num_samples: int | None = None, num_reference: int | None = None
    ) -> None:
        super().__init__(features, k, num_samples, num_reference)

    def compute(self, real: Tensor, generated: Tensor) -> tuple[float, float]:
        """`precision[features]` and `recall[features]`, in [0, 1], higher is better."""
        return pure.precision_recall(real, generated, self.k)


class DensityCoverage(_NeighbourMetric):
    """Density and coverage (Naeem et al., 2020, arXiv 2002.09797).

    Args:
        features: name of the extractor.
        k: neighbours that make a ball, >= 1.
        num_samples: see :class:`FeatureMetric`.
        num_reference: see :class:`FeatureMetric`.
    """

    bases = (MetricInfo("density", "up"), MetricInfo("coverage", "up"))

    def __init__(
        self, features: str, k: int = 5, num_samples: int | None = None, num_reference: int | None = None
    ) -> None:
        super().__init__(features, k, num_samples, num_reference)

    def compute(self, real: Tensor, generated: Tensor) -> tuple[float, float]:
        """`density[features]` (may exceed 1) and `coverage[features]` in [0, 1], higher is better."""
        return pure.density_coverage(real, generated, self.k)


class InceptionScore(FeatureMetric):
    """Inception score (Salimans et al., 2016, arXiv 1606.03498); it knows nothing of real data.

    Args:
        splits: equal parts, >= 1, whose scores are averaged; published values use 10.
        num_samples: see :class:`FeatureMetric`.

    Raises:
        ValueError: for fewer than one split.
    """

    bases = (MetricInfo("inception_score", "up"),)

    def __init__(self, splits: int = 10, num_samples: int | None = None) -> None:
        super().__init__("inception-logits", num_samples)
        check_count("splits", splits)
        self.splits = splits

    @property
    def num_reference(self) -> int | None:
        """None of the reference split is needed."""
        return 0

    def label(self, name: str) -> str:
        """The name alone: there is one extractor."""
        return name

    def measure(self, answers: Answers) -> list[Measurement]:
        """`inception_score`, from 1 to the number of classes, higher is better."""
        extractor, (n, _) = answers.extractors[self.features], self.counts(answers)
        defined = samples_of(answers).is_finite and n >= self.splits
        value = (
            pure.inception_score(samples_of(answers).features(extractor, n), self.splits).mean if defined else math.nan
        )
        return [Measurement("inception_score", value, n, f"{extractor.protocol}/{n}/{self.splits}-splits")]


class MeanNorm(FeatureMetric):
    """Mean norm of the samples over that of the data: below 1 where high-energy data were weighted down.

    The norm is |x| / sqrt(D) in model space (images: values in [-1, 1], so 0 is a mean grey), of each sample; see
    :class:`flowbench.metrics.features.NormFeatures`.

    Args:
        num_samples: see :class:`FeatureMetric`.
        num_reference: see :class:`FeatureMetric`.
    """

    in_sweep = True
    bases = (MetricInfo("mean_norm_ratio"),)

    def __init__(self, num_samples: int | None = None, num_reference: int | None = None) -> None:
        super().__init__("norm", num_samples, num_reference)

    def label(self, name: str) -> str:
        """The name alone: there is one extractor."""
        return name

    def measure(self, answers: Answers) -> list[Measurement]:
        """`mean_norm_ratio`, 1 for samples of the data's mean norm; NaN where a sample diverged."""
        value = distance(answers, lambda: self._ratio(*self.pair(answers)))
        return [self.measurement(answers, "mean_norm_ratio", value, self.counts(answers))]

    @staticmethod
    def _ratio(generated: Tensor, real: Tensor) -> float:
        mean = float(real.double().mean())
        return float(generated.double().mean()) / mean if mean else math.nan


class ClassAccuracy(FeatureMetric):
    """Share of a conditional flow's samples that the dataset's own classifier takes for the class asked for.

    Guidance raises it, beyond the share of real images even, and pays in recall.

    Args:
        features: the classifier, `<dataset>-cnn` or `auto`.
        num_samples: see :class:`FeatureMetric`.
    """

    in_sweep = True
    bases = (MetricInfo("class_accuracy", "up"),)

    def __init__(self, features: str, num_samples: int | None = None) -> None:
        super().__init__(features, num_samples)

    @property
    def num_reference(self) -> int | None:
        """None of the reference split is needed."""
        return 0

    def check(self, dataset: str, spec: DataSpec) -> None:
        """Refuse an extractor that is no classifier of the data."""
        super().check(dataset, spec)
        unlabelled = spec.modality != "image" or (spec.num_classes or 0) < 2
        if self.features != f"{dataset}-cnn" and (self.features != AUTO or unlabelled):
            raise ValueError(_no_classifier(self.features))

    def expected(self, who: Prospect) -> tuple[str, ...]:
        """See :meth:`Metric.expected`; samples without labels have none."""
        return self.names if who.has_labels else ()

    def measure(self, answers: Answers) -> list[Measurement]:
        """`class_accuracy[features]` in [0, 1], higher is better; none for samples that have no label.

        Raises:
            ValueError: when the extractor is no classifier of this data set.
        """
        extractor, (n, _), label = answers.extractors[self.features], self.counts(answers), samples_of(answers).label
        if label is None:
            return []
        if not isinstance(extractor, pure.ClassifierFeatures):
            raise ValueError(_no_classifier(self.features))
        value = math.nan
        if samples_of(answers).is_finite:
            found = extractor.classify(samples_of(answers).features(extractor, n))
            value = float((found == label[:n].cpu()).double().mean())
        protocol = f"{extractor.protocol}/given-label/{n}"
        return [Measurement(self.label("class_accuracy"), value, n, protocol)]


def _no_classifier(features: str) -> str:
    return f"class_accuracy needs a classifier of labelled images, {features} is none: use features: <dataset>-cnn"
