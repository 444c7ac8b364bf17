"""One evaluator for all families: what is measured, on which samples, and where the numbers go."""

from flowbench.torchvision_guard import ensure_importable

ensure_importable()

from flowbench.evaluation.evaluator import Evaluator, Identity  # noqa: E402
from flowbench.evaluation.extractors import cache_dir, get_extractor  # noqa: E402
from flowbench.evaluation.metrics import (  # noqa: E402
    CostReport,
    DensityCoverage,
    FrechetDistance,
    KernelDistance,
    MaximumMeanDiscrepancy,
    Metric,
    NegativeLogLikelihood,
    PathStraightness,
    PrecisionRecall,
    SlicedWasserstein2,
    Wasserstein2,
)
from flowbench.evaluation.subject import Cost, Measurement, SampleSet, Subject  # noqa: E402

__all__ = [
    "Cost",
    "CostReport",
    "DensityCoverage",
    "Evaluator",
    "FrechetDistance",
    "Identity",
    "KernelDistance",
    "MaximumMeanDiscrepancy",
    "Measurement",
    "Metric",
    "NegativeLogLikelihood",
    "PathStraightness",
    "PrecisionRecall",
    "SampleSet",
    "SlicedWasserstein2",
    "Subject",
    "Wasserstein2",
    "cache_dir",
    "get_extractor",
]
