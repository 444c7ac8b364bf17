"""One evaluator for all families: what is measured, on which samples, and where the numbers go."""

from flowbench.core.places import cache_dir
from flowbench.evaluation.auto_features import planned_features, resolve_features
from flowbench.evaluation.conditions import ConditionAgreement
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
from flowbench.evaluation.flow_metrics import (
    CostReport,
    NegativeLogLikelihood,
    PathStraightness,
    TrainingPairs,
)
from flowbench.evaluation.frechet_metrics import FrechetDistance, FrechetInfinity
from flowbench.evaluation.latent_bound import LatentBound
from flowbench.evaluation.measurement import Measurement
from flowbench.evaluation.memorization import Memorization
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.mode_metrics import ModeRecovery, NearestData
from flowbench.evaluation.point_metrics import (
    MaximumMeanDiscrepancy,
    SlicedWasserstein2,
    Wasserstein2,
)
from flowbench.evaluation.reconstruction import Reconstruction
from flowbench.evaluation.records import Identity
from flowbench.evaluation.samples import SampleSet
from flowbench.evaluation.subject import Cost, Subject

__all__ = [
    "ClassAccuracy",
    "ConditionAgreement",
    "Cost",
    "CostReport",
    "DensityCoverage",
    "Evaluator",
    "FrechetDistance",
    "FrechetInfinity",
    "Identity",
    "InceptionScore",
    "KernelDistance",
    "LatentBound",
    "MaximumMeanDiscrepancy",
    "MeanNorm",
    "Measurement",
    "Memorization",
    "Metric",
    "ModeRecovery",
    "NearestData",
    "NegativeLogLikelihood",
    "PathStraightness",
    "PrecisionRecall",
    "Reconstruction",
    "SampleSet",
    "SlicedWasserstein2",
    "Subject",
    "TrainingPairs",
    "Wasserstein2",
    "cache_dir",
    "get_extractor",
    "planned_features",
    "resolve_features",
]
