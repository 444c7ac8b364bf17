"""One evaluator for all families: what is measured, on which samples, and where the numbers go."""

from flowbench.core.places import cache_dir
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.auto_features import planned_features, resolve_features
from flowbench.evaluation.cost import Cost, CostReport
from flowbench.evaluation.evaluator import Evaluator
from flowbench.evaluation.extractors import get_extractor
from flowbench.evaluation.feature_metrics import (
    ClassAccuracy,
    DensityCoverage,
    InceptionScore,
    KernelDistance,
    MeanNorm,
    PrecisionRecall,
)
from flowbench.evaluation.frechet_metrics import FrechetDistance, FrechetInfinity
from flowbench.evaluation.frechet_ratio import FrechetRatio
from flowbench.evaluation.measurement import Measurement
from flowbench.evaluation.memorization import Memorization
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.mind import MIND
from flowbench.evaluation.mode_metrics import ModeRecovery, NearestData
from flowbench.evaluation.point_metrics import (
    MaximumMeanDiscrepancy,
    SlicedWasserstein2,
    Wasserstein2,
)
from flowbench.evaluation.probe import Probe, Setup
from flowbench.evaluation.records import Identity
from flowbench.evaluation.reference import Reference
from flowbench.evaluation.samples import SampleSet
from flowbench.evaluation.sampling import Generated, Samples
from flowbench.evaluation.two_sample import ClassifierTwoSample

__all__ = [
    "MIND",
    "Answers",
    "ClassAccuracy",
    "ClassifierTwoSample",
    "Cost",
    "CostReport",
    "DensityCoverage",
    "Evaluator",
    "FrechetDistance",
    "FrechetInfinity",
    "FrechetRatio",
    "Generated",
    "Identity",
    "InceptionScore",
    "KernelDistance",
    "MaximumMeanDiscrepancy",
    "MeanNorm",
    "Measurement",
    "Memorization",
    "Metric",
    "ModeRecovery",
    "NearestData",
    "PrecisionRecall",
    "Probe",
    "Reference",
    "SampleSet",
    "Samples",
    "Setup",
    "SlicedWasserstein2",
    "Wasserstein2",
    "cache_dir",
    "get_extractor",
    "planned_features",
    "resolve_features",
]
