"""How well scores tell anomalies from normal samples."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from flowbench.evaluation.answers import Answers
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.probe import Probe
from flowbench.evaluation.prospect import Prospect
from flowbench.evaluation.protocols import HasDensity
from flowbench.tasks.anomaly.probes import Scores
from flowbench.tasks.anomaly.references import ScoringReference

__all__ = ["ImageAUROC"]


class ImageAUROC(Metric):
    """Area under the receiver operating characteristic of whole test samples (Bergmann et al., 2019, MVTec AD).

    The probability that an anomaly has a higher score than a normal sample, ties counted half: 1 is perfect, 0.5 is
    guessing.

    Example:
        >>> ImageAUROC().names
        ('image_auroc',)
    """

    declares = (MetricInfo("image_auroc", "up", "anomaly"),)

    def probes(self) -> tuple[Probe[Any], ...]:
        """The scores."""
        return (Scores(),)

    def expected(self, who: Prospect) -> tuple[str, ...]:
        """See :meth:`Metric.expected`: of modules with a density, and of references that score."""
        scores = isinstance(who.module, HasDensity) or isinstance(who.reference, ScoringReference)
        return self.names if scores else ()

    def measure(self, answers: Answers) -> list[Measurement]:
        """`image_auroc` in [0, 1], higher is better; NaN where a score is, or where one of the kinds is missing."""
        found = answers[Scores()]
        if found is None:
            return []
        num_anomalies, n = int(found.is_anomaly.sum()), len(found.values)
        value = math.nan
        if 0 < num_anomalies < n and bool(found.values.isfinite().all()):
            value = float(binary_auroc(_ranks(found.values), found.is_anomaly.long()))
        protocol = f"{found.method}/test/{n - num_anomalies}-normal/{num_anomalies}-anomalies"
        return [Measurement("image_auroc", value, n, protocol)]


def _ranks(values: Tensor) -> Tensor:
    """Ranks in [0, 1], equal for equal values: torchmetrics squashes numbers outside of it, and large ones are tied."""
    distinct, position = torch.unique(values, return_inverse=True)
    return position.double() / max(len(distinct) - 1, 1)
