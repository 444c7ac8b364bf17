"""MIND: transport along random directions of features."""

from __future__ import annotations

from flowbench import metrics as pure
from flowbench.core.checks import check_count
from flowbench.core.seeds import generator
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.feature_metrics import FeatureMetric
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.sample_metric import distance

__all__ = ["MIND"]


class MIND(FeatureMetric):
    """Mean 1-D transport over random directions of features, which few samples suffice for (arXiv 2605.06797).

    Biased upwards at N samples, as every distance is: read it beside the floor's. See :func:`flowbench.metrics.mind`.

    Args:
        features: name of the extractor.
        num_projections: random directions, >= 1, the same for everybody.
        num_samples: see :class:`FeatureMetric`.
        num_reference: see :class:`FeatureMetric`.
        sweep: measure it at every point of a sweep, too.
    """

    bases = (MetricInfo("mind", "down"),)

    def __init__(
        self,
        features: str,
        num_projections: int = 1000,
        num_samples: int | None = None,
        num_reference: int | None = None,
        sweep: bool = True,
    ) -> None:
        super().__init__(features, num_samples, num_reference)
        check_count("num_projections", num_projections)
        self.num_projections = num_projections
        self.in_sweep = sweep

    def measure(self, answers: Answers) -> list[Measurement]:
        """`mind[features]` in squared feature units; lower is better."""
        directions = generator(0, "mind")
        value = distance(answers, lambda: pure.mind(*self.pair(answers), directions, self.num_projections))
        extra = f"/{self.num_projections}-directions"
        return [self.measurement(answers, "mind", value, self.counts(answers), extra)]
