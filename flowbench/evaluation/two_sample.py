"""Whether a classifier can tell samples from data."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from flowbench import metrics as pure
from flowbench.core.checks import check_count
from flowbench.data import DataSpec
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.prospect import Prospect
from flowbench.evaluation.sample_metric import SampleMetric, check_points
from flowbench.evaluation.samples import SampleSet
from flowbench.evaluation.sampling import samples_of

__all__ = ["ClassifierTwoSample"]

NUM_FOLDS = 5
"""Parts of the cross-validation."""


class ClassifierTwoSample(SampleMetric):
    """Classifier two-sample test on points (C2ST): 0.5 where nothing tells samples from data, 1 where all does.

    The classifier is a random forest, cross-validated in five parts
    (:func:`flowbench.metrics.classifier_two_sample`).

    Args:
        labels: judge points together with the classes that they were asked to be, against data with theirs: what a
            conditional flow is to get right. Samples without labels then have no rows.
        num_samples: samples of each side, >= 2, counted from the first; None takes as many as both have.
        sweep: measure it at every point of a sweep, too.

    Raises:
        ValueError: for counts below 2.
    """

    def __init__(
        self,
        labels: bool = False,
        num_samples: int | None = None,
        sweep: bool = False,
    ) -> None:
        check_count("num_samples", num_samples, at_least=2, or_none=True, hint="null is all")
        self.labels, self.num_samples, self.in_sweep = labels, num_samples, sweep

    @property
    def declares(self) -> tuple[MetricInfo, ...]:  # type: ignore[override]
        """The accuracy and its standard error."""
        base = "c2st_with_labels" if self.labels else "c2st"
        return (MetricInfo(base, "down"), MetricInfo(f"{base}_error"))

    def check(self, dataset: str, spec: DataSpec) -> None:
        """Refuse images, and data without labels where labels are judged."""
        check_points("c2st", spec)
        if self.labels and spec.num_classes is None:
            raise ValueError(f"c2st is to judge labels, and {dataset} has none: set labels: false")

    def expected(self, who: Prospect) -> tuple[str, ...]:
        """See :meth:`Metric.expected`; where labels are judged, samples without them have none."""
        return self.names if who.has_labels or not self.labels else ()

    def measure(self, answers: Answers) -> list[Measurement]:
        """`c2st`, best at 0.5, and `c2st_error`, its standard error; NaN where a sample diverged.

        Where labels are judged they are `c2st_with_labels` and `c2st_with_labels_error`.
        """
        samples, reference = samples_of(answers), answers.reference
        if self.labels and samples.label is None:
            return []
        count = min(len(samples), len(reference))
        count = min(self.num_samples or count, count)
        found = pure.TwoSampleAccuracy(math.nan, math.nan)
        if samples.is_finite and count >= NUM_FOLDS:
            sides = self._table(samples, count), self._table(reference, count)
            found = pure.classifier_two_sample(*sides, num_folds=NUM_FOLDS)
        protocol = f"points/forest/{NUM_FOLDS}-folds/{reference.name}-{count}/{count}"
        return [Measurement(name, value, count, protocol) for name, value in zip(self.names, found, strict=True)]

    def _table(self, side: SampleSet, count: int) -> Tensor:
        """The first points, shape (count, d), and beside them a column for each class where labels are judged."""
        points = side.points()[:count].flatten(1).cpu()
        if not self.labels or side.label is None:
            return points
        columns = one_hot(side.label[:count].cpu(), side.spec.num_classes or -1)
        return torch.cat([points, columns.to(points.dtype)], dim=1)
