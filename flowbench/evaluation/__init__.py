"""One evaluator for all families: what is measured, on which samples, and where the numbers go."""

from flowbench.torchvision_guard import ensure_importable

ensure_importable()

from flowbench.core.places import cache_dir  # noqa: E402
from flowbench.evaluation.auto_features import planned_features, resolve_features  # noqa: E402
from flowbench.evaluation.conditions import ConditionAgreement  # noqa: E402
from flowbench.evaluation.evaluator import Evaluator  # noqa: E402
from flowbench.evaluation.extractors import get_extractor  # noqa: E402
from flowbench.evaluation.feature_metrics import (  # noqa: E402
    ClassAccuracy,
    DensityCoverage,
    InceptionScore,
    KernelDistance,
    MeanNorm,
    PrecisionRecall,
)
from flowbench.evaluation.flow_metrics import (  # noqa: E402
    CostReport,
    NegativeLogLikelihood,
    PathStraightness,
    TrainingPairs,
)
from flowbench.evaluation.frechet_metrics import FrechetDistance, FrechetInfinity  # noqa: E402
from flowbench.evaluation.latent_bound import LatentBound  # noqa: E402
from flowbench.evaluation.memorization import Memorization  # noqa: E402
from flowbench.evaluation.metric import Metric  # noqa: E402
from flowbench.evaluation.mode_metrics import ModeRecovery, NearestData  # noqa: E402
from flowbench.evaluation.point_metrics import (  # noqa: E402
    MaximumMeanDiscrepancy,
    SlicedWasserstein2,
    Wasserstein2,
)
from flowbench.evaluation.reconstruction import Reconstruction  # noqa: E402
from flowbench.evaluation.records import Identity  # noqa: E402
from flowbench.evaluation.samples import SampleSet  # noqa: E402
from flowbench.evaluation.subject import Cost, Measurement, Subject  # noqa: E402

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
