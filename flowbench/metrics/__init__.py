"""Metrics: pure functions on features, samples and trajectories, and the networks that make features."""

from __future__ import annotations

from flowbench.metrics.classifier import (
    ClassifierSettings,
    DigitsCNN,
    classification_accuracy,
    classifier_settings,
    load_classifier,
    save_classifier,
    train_classifier,
    weights_checksum,
)
from flowbench.metrics.efficientnet import EfficientNetFeatures
from flowbench.metrics.features import ClassifierFeatures, FeatureExtractor, IdentityFeatures, extract
from flowbench.metrics.fidelity_features import FIDELITY_DIMENSIONS, FidelityFeatures
from flowbench.metrics.frechet import (
    FeatureStatistics,
    GaussianStatistics,
    Moments,
    frechet_distance,
    frechet_distance_of_features,
    gaussian_frechet_distance,
)
from flowbench.metrics.frechet_ratio import frechet_ratio, frechet_ratio_interval
from flowbench.metrics.inception import InceptionFeatures, InceptionLogits
from flowbench.metrics.inception_score import InceptionScore, inception_score
from flowbench.metrics.kernel import KernelEstimate, kernel_distance, median_bandwidths, mmd_rbf
from flowbench.metrics.memorization import (
    Memorization,
    authenticity,
    data_copying,
    memorization,
    nearest_neighbours,
)
from flowbench.metrics.mind import mind
from flowbench.metrics.modes import (
    average_minimum_distance,
    failure_rate,
    mode_discrepancy,
    mode_matched_w2,
    nearest_mode,
)
from flowbench.metrics.neighbours import DensityCoverage, PrecisionRecall, density_coverage, precision_recall
from flowbench.metrics.pairwise import Neighbours
from flowbench.metrics.perceptual import PerceptualDistance, PerceptualNetwork, feature_map_distance
from flowbench.metrics.reconstruction import psnr
from flowbench.metrics.small_sample import (
    FrechetInfinity,
    Interval,
    frechet_infinity,
    frechet_interval,
    jackknife_interval,
)
from flowbench.metrics.statistics_file import load_moments, load_statistics, save_statistics
from flowbench.metrics.straightness import (
    PathEnergySplit,
    PathGeometry,
    block_geometry,
    normalized_path_energy,
    path_geometry,
)
from flowbench.metrics.transport import sliced_wasserstein2, wasserstein2, wasserstein2_squared
from flowbench.metrics.two_sample import TwoSampleAccuracy, classifier_two_sample

__all__ = [
    "FIDELITY_DIMENSIONS",
    "ClassifierFeatures",
    "ClassifierSettings",
    "DensityCoverage",
    "DigitsCNN",
    "EfficientNetFeatures",
    "FeatureExtractor",
    "FeatureStatistics",
    "FidelityFeatures",
    "FrechetInfinity",
    "GaussianStatistics",
    "IdentityFeatures",
    "InceptionFeatures",
    "InceptionLogits",
    "InceptionScore",
    "Interval",
    "KernelEstimate",
    "Memorization",
    "Moments",
    "Neighbours",
    "PathEnergySplit",
    "PathGeometry",
    "PerceptualDistance",
    "PerceptualNetwork",
    "PrecisionRecall",
    "TwoSampleAccuracy",
    "authenticity",
    "average_minimum_distance",
    "block_geometry",
    "classification_accuracy",
    "classifier_settings",
    "classifier_two_sample",
    "data_copying",
    "density_coverage",
    "extract",
    "failure_rate",
    "feature_map_distance",
    "frechet_distance",
    "frechet_distance_of_features",
    "frechet_infinity",
    "frechet_interval",
    "frechet_ratio",
    "frechet_ratio_interval",
    "gaussian_frechet_distance",
    "inception_score",
    "jackknife_interval",
    "kernel_distance",
    "load_classifier",
    "load_moments",
    "load_statistics",
    "median_bandwidths",
    "memorization",
    "mind",
    "mmd_rbf",
    "mode_discrepancy",
    "mode_matched_w2",
    "nearest_mode",
    "nearest_neighbours",
    "normalized_path_energy",
    "path_geometry",
    "precision_recall",
    "psnr",
    "save_classifier",
    "save_statistics",
    "sliced_wasserstein2",
    "train_classifier",
    "wasserstein2",
    "wasserstein2_squared",
    "weights_checksum",
]
