"""Metrics: pure functions on features, samples and trajectories, and their torchmetrics wrappers."""

from __future__ import annotations

from flowbench.metrics.classifier import (
    DigitsCNN,
    classification_accuracy,
    load_classifier,
    save_classifier,
    train_classifier,
    weights_checksum,
)
from flowbench.metrics.features import ClassifierFeatures, FeatureExtractor, IdentityFeatures, extract
from flowbench.metrics.frechet import (
    FeatureStatistics,
    frechet_distance,
    gaussian_frechet_distance,
    load_statistics,
    save_statistics,
)
from flowbench.metrics.kernel import KernelEstimate, kernel_distance, median_bandwidths, mmd_rbf
from flowbench.metrics.modules import (
    DensityCoverageMetric,
    FrechetDistance,
    KernelDistance,
    MaximumMeanDiscrepancy,
    PrecisionRecallMetric,
    SampleMetric,
    SlicedWasserstein2,
    Wasserstein2,
)
from flowbench.metrics.neighbours import DensityCoverage, PrecisionRecall, density_coverage, precision_recall
from flowbench.metrics.straightness import (
    PathEnergySplit,
    PathGeometry,
    block_geometry,
    normalized_path_energy,
    path_geometry,
)
from flowbench.metrics.transport import sliced_wasserstein2, wasserstein2, wasserstein2_squared

__all__ = [
    "ClassifierFeatures",
    "DensityCoverage",
    "DensityCoverageMetric",
    "DigitsCNN",
    "FeatureExtractor",
    "FeatureStatistics",
    "FrechetDistance",
    "IdentityFeatures",
    "KernelDistance",
    "KernelEstimate",
    "MaximumMeanDiscrepancy",
    "PathEnergySplit",
    "PathGeometry",
    "PrecisionRecall",
    "PrecisionRecallMetric",
    "SampleMetric",
    "SlicedWasserstein2",
    "Wasserstein2",
    "block_geometry",
    "classification_accuracy",
    "density_coverage",
    "extract",
    "frechet_distance",
    "gaussian_frechet_distance",
    "kernel_distance",
    "load_classifier",
    "load_statistics",
    "median_bandwidths",
    "mmd_rbf",
    "normalized_path_energy",
    "path_geometry",
    "precision_recall",
    "save_classifier",
    "save_statistics",
    "sliced_wasserstein2",
    "train_classifier",
    "wasserstein2",
    "wasserstein2_squared",
    "weights_checksum",
]
