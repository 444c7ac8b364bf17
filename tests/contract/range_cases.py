"""Valid arguments of every public constructor and function that takes numbers, and which odd values are right for them.

What a constructor has no default for stands here; a class that is missing makes the tests of the ranges fail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from flowbench import families, flows, metrics
from flowbench.commands.prediction.request import Request
from flowbench.flows import Euler, ExactDivergence, UniformWeight
from flowbench.metrics import IdentityFeatures
from flowbench.networks import MLP, DiT, HybridDiT, KLAutoencoder, TinyAutoencoder
from flowbench.training import BudgetLimit
from flowbench.training.ema import ExponentialMovingAverage

from .builders import IMAGES, POINTS, autoencoder, joint_network, teacher

__all__ = ["ALIASES", "CONTEXT", "EXTRA", "NEGATIVE", "RESULTS", "UNBOUNDED", "VALID", "ZERO"]

mlp = partial(MLP, width=8, depth=1)
kl = partial(KLAutoencoder, latent_channels=2, width=8)
points = partial(torch.randn, 40, 2)


class Network(nn.Module):
    """The least causal network that an affine block takes: four tokens of one number."""

    num_tokens, token_dim, num_classes, num_slots = 4, 1, None, 4


@cache
def own_data(tmp: Path) -> dict[str, str]:
    """A file of points, and a folder with a picture."""
    from PIL import Image

    np.savez(tmp / "own.npz", x=np.zeros((40, 2), np.float32))
    (tmp / "folder").mkdir()
    for number in range(12):
        Image.fromarray(np.full((8, 8, 3), 20 * number, np.uint8)).save(tmp / "folder" / f"{number}.png")
    return {"file": str(tmp / "own.npz"), "folder": str(tmp / "folder")}


@cache
def taef2(tmp: Path) -> str:
    """A folder with weights of the published form."""
    network = TinyAutoencoder((3, 8, 8))
    torch.save(network.encoder.state_dict(), tmp / "taef2_encoder.pth")
    torch.save(network.decoder.state_dict(), tmp / "taef2_decoder.pth")
    return str(tmp)


def on_meta(cls: type) -> Callable[..., Any]:
    """The class, built where models are only counted."""

    def make(**arguments: Any) -> Any:
        with torch.device("meta"):
            return cls(**arguments)

    return make


def pairs() -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    return {"generated": torch.randn(60, 2, generator=rng), "reference": torch.randn(60, 2, generator=rng)}


def xy(size: int = 40) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    return {"x": torch.randn(size, 2, generator=rng), "y": torch.randn(size, 2, generator=rng)}


def real_and_generated() -> dict[str, Any]:
    return {"real": xy()["x"], "generated": xy()["y"]}


def likelihood() -> dict[str, Any]:
    normal = flows.GaussianSource().log_prob
    return {
        "field": lambda t, x: -x,
        "source_log_prob": normal,
        "solver": Euler(2),
        "divergence": ExactDivergence(),
    }


def pictures() -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    return {
        "images": torch.randint(0, 255, (8, 1, 4, 4), generator=rng, dtype=torch.uint8),
        "labels": torch.arange(8) % 2,
        "num_classes": 2,
        "seed": 0,
        "num_steps": 1,
        "dimension": 4,
        "width": 4,
    }


# Required arguments; a function where they need a folder, are made anew for each object, or cost something.
VALID: dict[str, dict[str, Any] | Callable[[Path], dict[str, Any]]] = {
    # flows
    "AffineBlock": lambda tmp: {"network": Network(), "permutation": "transpose", "grid": (2, 2)},
    "ButcherTableau": {"a": ((), (1.0,)), "b": (0.5, 0.5), "c": (0.0, 1.0), "order": 2},
    "DDIM": {"num_steps": 2},
    "DPMSolverPlusPlus2M": {"num_steps": 2},
    "Euler": {"num_steps": 2},
    "EulerMaruyama": {"num_steps": 2},
    "LowFrequencySource": {"cutoff": 1},
    "SemidiscreteDual": lambda tmp: {"points": points(), "draw": lambda num, rng: torch.zeros(num, 2)},
    "SemidiscretePotential": lambda tmp: {"points": points(), "potential": torch.zeros(40)},
    "chi_squared": {"counts": torch.tensor([2, 1])},
    "FixedStepSolver": {"num_steps": 2},
    "Jumps": {"num_jumps": 2},
    "Heun": {"num_steps": 2},
    "Midpoint": {"num_steps": 2},
    "Refinement": {"solver": Euler(2), "remaining": 0.5, "description": "twice the steps"},
    "RungeKutta4": {"num_steps": 2},
    "PrunedSource": {"max_cosine": 0.9, "quantile": 0.3},
    "SchrodingerBridgeCoupling": {"sigma": 1.0},
    "SchrodingerBridgePath": {"sigma": 1.0},
    "VelocityObjective": {"weight": "elbo"},  # the natural weight has nothing to clip
    "VonMisesFisherSource": {"concentration": 3.0},
    "alternating": {"num_blocks": 2, "last": "flip"},
    "bits_per_dim": lambda tmp: {"log_prob": torch.zeros(2), "num_dims": 2, "bin_width": 0.1},
    "guided_gaussian": lambda tmp: {
        **dict.fromkeys(("mean_c", "mean_u"), torch.zeros(2)),
        **dict.fromkeys(("std_c", "std_u"), torch.ones(2)),
        "weight": 1.0,
    },
    "log_likelihood": lambda tmp: {**likelihood(), "x": points()},
    "sample_with_log_prob": lambda tmp: {**likelihood(), "x0": points()},
    "network_grid": {"permutation": "transpose", "grid": (2, 2)},
    "patchify": lambda tmp: {"x_BCHW": torch.zeros(1, 1, 4, 4), "patch_size": 2},
    "unpatchify": lambda tmp: {"tokens_BND": torch.zeros(1, 4, 4), "patch_size": 2, "shape": (1, 4, 4)},
    "permute": lambda tmp: {"x_BND": torch.zeros(1, 4, 1), "permutation": "transpose", "grid": (2, 2)},
    "sinkhorn_plan": lambda tmp: {"cost": torch.ones(2, 2, dtype=torch.float64), "epsilon": 1.0},
    "transport_decomposition": lambda tmp: {"weight": UniformWeight(), "x0": points(), "x1": points()},
    # networks
    "MLP": {"shape": (2,), "num_classes": 3, "width": 8, "depth": 1},
    "DiT": {"shape": (1, 4, 4), "num_classes": 3, "width": 8, "depth": 1},
    "HybridDiT": {"shape": (1, 4, 4), "num_classes": 3, "width": 8, "depth": 1},
    "UNet": {"shape": (1, 4, 4), "num_classes": 3, "channels": 8, "attention_resolutions": (2,)},
    "VelocityNetwork": {"shape": (2,), "num_classes": 3, "embedding_width": 8},
    "CausalTransformer": {"num_tokens": 4, "token_dim": 1, "width": 32, "depth": 1, "grid": (2, 2)},
    "ReadOutTransformer": {"num_tokens": 4, "token_dim": 1, "width": 32, "depth": 1, "grid": (2, 2)},
    "TokenTransformer": {"num_tokens": 4, "token_dim": 1, "width": 32, "depth": 1, "grid": (2, 2)},
    "GaussianAutoencoder": {"shape": (1, 4, 4)},
    "KLAutoencoder": {"shape": (1, 4, 4), "width": 8},
    "PatchDiscriminator": {"shape": (1, 24, 24), "width": 8},
    "TinyAutoencoder": {"shape": (3, 8, 8)},
    # metrics
    "ClassifierSettings": {"version": 1, "num_steps": 1, "width": 4, "stages": 1},
    "DigitsCNN": {"shape": (1, 4, 4), "num_classes": 2},
    "FeatureStatistics": {"dimension": 2},
    "GaussianStatistics": lambda tmp: {"mean": torch.zeros(2), "covariance": torch.eye(2), "count": 3},
    "IdentityFeatures": {"dimension": 2},
    "PerceptualDistance": {"network": "inception", "side": 128},
    "classification_accuracy": lambda tmp: {
        "model": metrics.DigitsCNN((1, 4, 4), 2),
        "images": pictures()["images"],
        "labels": pictures()["labels"],
    },
    "classifier_settings": {"shape": (1, 28, 28), "num_samples": 100},
    "density_coverage": lambda tmp: real_and_generated(),
    "precision_recall": lambda tmp: real_and_generated(),
    "extract": lambda tmp: {"extractor": IdentityFeatures(2), "images": points()},
    "failure_rate": lambda tmp: {**pairs(), "radius": 1.0},
    "frechet_infinity": lambda tmp: {**pairs(), "generator": torch.Generator(), "min_size": 30},
    "frechet_interval": lambda tmp: {**pairs(), "generator": torch.Generator()},
    "frechet_ratio_interval": lambda tmp: {
        **pairs(),
        "held_out": torch.randn(60, 2, generator=torch.Generator().manual_seed(1)),
        "generator": torch.Generator(),
    },
    "classifier_two_sample": lambda tmp: xy(),
    "mind": lambda tmp: {**xy(), "generator": torch.Generator()},
    "inception_score": lambda tmp: {"logits": xy()["x"]},
    "jackknife_interval": lambda tmp: {"count": 40, "statistic": lambda keep: 0.0, "generator": torch.Generator()},
    "kernel_distance": lambda tmp: {**xy(), "generator": torch.Generator()},
    "load_moments": lambda tmp: {"path": moments(tmp)},
    "median_bandwidths": lambda tmp: {"reference": xy()["x"]},
    "memorization": lambda tmp: {"generated": points(), "train": points(), "heldout": points()},
    "mmd_rbf": lambda tmp: xy(),
    "nearest_neighbours": lambda tmp: {"queries": points(), "references": points()},
    "normalized_path_energy": {"path_energy": 2.0, "w2_squared": 1.0},
    "psnr": lambda tmp: {"x": points(), "x_hat": points()},
    "sliced_wasserstein2": lambda tmp: {**xy(), "num_projections": 2, "generator": torch.Generator()},
    "train_classifier": lambda tmp: pictures(),
    # data
    "Batch": lambda tmp: {"x": points()},
    "BatchIndex": lambda tmp: {"indices": torch.arange(2)},
    "DataSpec": {"name": "data", "version": "1", "shape": (2,)},
    "Spec": {"name": "data", "version": "1", "shape": (2,)},
    "VideoSpec": {"name": "data", "version": "1", "shape": (2, 3, 4, 4)},
    "TokenSpec": {"name": "data", "version": "1", "shape": (2,), "num_values": 3},
    "GraphSpec": {"name": "data", "version": "1", "num_entities": 3, "num_relations": 2},
    "Units": {"shift": (0.0,), "scale": (1.0,)},
    "DatasetEntry": lambda tmp: {
        "spec": POINTS,
        "description": "",
        "licence": "",
        "citation": "",
        "load": dict,
        "num_samples": {"train": 2},
    },
    "Identity": {"seeds": {"init": 0}},
    "EndlessSampler": {"num_samples": 4, "batch_size": 2, "seed": 0},
    "GroupedSampler": lambda tmp: {"label": torch.zeros(4).long(), "group_size": 2, "batch_size": 2, "seed": 0},
    "ShardedSampler": {"num_samples": 4, "batch_size": 2},
    "get": lambda tmp: {"name": "image_folder", "path": own_data(tmp)["folder"]},
    # families
    "ARFlow": {"spec": IMAGES, "network": partial(HybridDiT, width=8, depth=1)},
    "Autoencoder": {"spec": IMAGES, "network": kl},
    "Budget": lambda tmp: {
        "limit": BudgetLimit("steps", 3),
        "flops_per_step": 1,
        "samples_per_step": 1,
        "num_train": 3,
    },
    "BudgetLimit": {"kind": "steps", "amount": 3},
    "DecoderFineTuning": {"spec": IMAGES, "network": kl, "noise_std": 0.1},
    "DiffusersAutoencoder": {"shape": (3, 8, 8), "path": "nowhere", "latents": (4, 8)},
    "FlowMap": {"spec": POINTS, "network": partial(mlp, second_time=True)},
    "FlowMatching": {"spec": POINTS, "network": mlp},
    "FlowModule": {"spec": POINTS},
    "ConditionedNoise": {"low": 0.1, "high": 0.5},
    "GaussianNoise": {"std": 0.1},
    "LatentCFM": lambda tmp: {
        "spec": IMAGES,
        "network": partial(DiT, width=16, depth=1, patch_size=1),
        "autoencoder": autoencoder(),
    },
    "JointLatentSpace": lambda tmp: {"autoencoder": families.Autoencoder(IMAGES, joint_network())},
    "LatentSpace": lambda tmp: {"autoencoder": autoencoder()},
    "PixelSpace": {"shape": (2,)},
    "PretrainedAutoencoder": {"spec": IMAGES, "network": kl},
    "BiFlow": lambda tmp: {"spec": POINTS, "teacher": teacher(POINTS, False)},
    "Reflow": lambda tmp: {
        "spec": POINTS,
        "network": mlp,
        "initialise_from_teacher": False,
        "teacher": teacher(POINTS, False),
    },
    "SimFlow": lambda tmp: {"spec": IMAGES, "autoencoder_network": joint_network(), "width": 32},
    "STARFlow": lambda tmp: {"spec": IMAGES, "autoencoder": autoencoder(), "width": 32},
    "Space": {"shape": (2,)},
    "SolvedDensity": {"solve": print, "method": "Euler(num_steps=2)", "remaining": 0.5},
    "TAEF2": lambda tmp: {"shape": (3, 8, 8), "weights": taef2(tmp)},
    "TARFlow": {"spec": IMAGES, "layers": [1], "width": 32, "patch_size": 2},
    "TrainingModule": {"spec": POINTS},
    "ExponentialMovingAverage": lambda tmp: {"module": nn.Linear(1, 1), "decay": 0.9},
    # evaluation
    "ClassAccuracy": {"features": "digits-cnn"},
    "evaluation.DensityCoverage": {"features": "identity"},
    "FrechetDistance": {"features": "identity"},
    "evaluation.FrechetInfinity": {"features": "identity"},
    "FrechetRatio": {"features": ["identity"]},
    "MIND": {"features": "identity"},
    "KernelDistance": {"features": "identity"},
    "evaluation.PrecisionRecall": {"features": "identity"},
    "evaluation.Memorization": {"features": "identity"},
    "Reconstruction": {"features": "identity"},
    "NearestData": {"radius": 1.0},
    "Evaluator": {"sweep": {"network_evaluations": [1.0, 2.0], "guidance": [1.0, 2.0]}},
    "SampleSet": {"spec": POINTS, "name": "generated", "count": 3},
}


@cache
def moments(tmp: Path) -> str:
    """A file of the moments of two features."""
    np.savez(tmp / "moments.npz", mu=np.zeros(2), sigma=np.eye(2))
    return str(tmp / "moments.npz")


# Other arguments that an argument needs beside it.
CONTEXT: dict[str, Callable[[Path], dict[str, Any]]] = {
    "PrunedSource.threshold": lambda tmp: {"quantile": None},
    "CausalTransformer.token_dim": lambda tmp: {},
    "FlowDataModule.shape": lambda tmp: {"dataset": "npz", "path": own_data(tmp)["file"]},
    "FlowDataModule.num_classes": lambda tmp: {"dataset": "npz", "path": own_data(tmp)["file"], "shape": (2,)},
    "FlowDataModule.image_size": lambda tmp: {"dataset": "image_folder", "path": own_data(tmp)["folder"]},
    "FlowMap.target_guidance": lambda tmp: {"conditional": True},
    "TARFlow.extent": lambda tmp: {"position": "rope"},
    "BiFlow.guidance": lambda tmp: {"teacher": teacher(POINTS, True), "conditional": True},
    "Reflow.pair_guidance": lambda tmp: {"teacher": teacher(POINTS, True), "conditional": True},
    "kernel_distance.num_subsets": lambda tmp: {"subset_size": 4},
}

# What messages call an argument, where they do not use its name.
ALIASES = {"BudgetLimit.amount": "budget.steps", "ExponentialMovingAverage.decay": "ema.decay"}

# Records of what was computed. NaN is a value there: it says that samples diverged, or that a ratio is not defined.
RESULTS = {
    "flows": {"Inversion", "JumpBatch", "Likelihood", "SolverStats", "TransportDecomposition"},
    "families": {"Description", "FlowSamples", "PairingContext", "Pairs"},
    "training": {"Count", "Loss", "Preparation"},
    "metrics": {
        "DensityCoverage", "FrechetInfinity", "InceptionScore", "Interval", "KernelEstimate", "Memorization",
        "PathEnergySplit", "PrecisionRecall", "TwoSampleAccuracy",
    },
    "evaluation": {"Answers", "Cost", "Generated", "Measurement", "Samples", "Setup"},
    "config": {"Built", "Experiment"},  # made from files, whose seed and budget are checked
}  # fmt: skip
# Arguments that are such a value.
RESULTS_GIVEN = {"normalized_path_energy.path_energy"}

OPTIMIZERS = ("AdamW", "MatrixSettings", "OptimizerSettings", "SGD", "SWAN", "SinkGD")
MAPS = ("ConsistencyTraining", "Lagrangian", "MeanFlow", "Progressive", "Shortcut", "SolutionConsistency")
OPTIMIZER_ZEROS = ("betas", "final_fraction", "warmup_fraction", "weight_decay")

ZERO: dict[str, set[str]] = {
    "none, nothing or off": {
        *(f"{name}.{field}" for name in OPTIMIZERS for field in OPTIMIZER_ZEROS),
        "AutoInverse.crossover", "CausalTransformer.checkpoint_every", "Conditioner.dropout", "DiT.condition_channels",
        "BiFlow.label_dropout", "FlowDataModule.num_workers", "FlowMatching.label_dropout",
        "FlowModule.label_dropout", "InpaintingConditioner.dropout", "KLAutoencoder.downsamplings",
        "LatentCFM.noise_std", "LatentSpace.noise_std", "LinearPath.sigma", "MLP.condition_channels",
        "PixelSpace.noise_std",
        "PretrainedAutoencoder.noise_std", "SemanticConditioner.dropout", "Space.noise_std", "StreamPairing.ahead",
        "TARFlow.checkpoint_every", "TARFlow.label_dropout", "TARFlow.latent_norm",
        "TargetConditionalPath.sigma_min",
        "UNet.condition_channels", "UNet.dropout", "VelocityNetwork.condition_channels",
        "AdversarialConfig.start", "Autoencoder.latent_std_decay", "ExponentialMovingAverage.decay",
        "FlowDataModule.label_noise", "memorization.num_worst", "kernel_distance.coef", "guided_gaussian.weight",
        "ConditionalCoupling.weight", "ConditionalCoupling.target_ratio", "EulerMaruyama.eta",
        "VonMisesFisherSource.concentration", "RatioAwareGuidance.decay", "JacobiInverse.tolerance",
        "AutoInverse.tolerance", "DatasetEntry.download_mb", "DatasetEntry.num_samples", "SampleSet.count",
        "SemidiscreteDual.ema", "SemidiscretePairing.ema",
        "Budget.flops_per_step", "EMAConfig.decay", "FlowMapObjective.weight_power",
        *(f"{name}.weight_power" for name in MAPS), "NegativeLogLikelihood.num_checked", "Refinement.remaining",
        "SolvedDensity.remaining",
    },
    "the unconditional flow": {
        "BiFlow.guidance", "ClassifierFreeGuidance.scale", "FlowMap.target_guidance", "Reflow.pair_guidance",
        "Request.guidance",
    },
    "the first time, process, place, class or seed": {
        "Batch.position", "BatchIndex.position", "ClassifierFreeGuidance.interval", "EndlessSampler.rank",
        "EndlessSampler.seed", "EulerMaruyama.seed", "Evaluator.seed", "FlowDataModule.seed", "GroupedSampler.rank",
        "GroupedSampler.seed", "Identity.seed",
        "Identity.seeds", "Renoise.seed",
        "SemidiscreteDual.seed", "SemidiscretePairing.seed",
        "PointTimes.t", "Reflow.pair_seed", "Request.classes", "ShardedSampler.rank", "classifier_two_sample.seed",
        "log_likelihood.interval",
        "sample_with_log_prob.interval",
        "train_classifier.learning_rate", "train_classifier.seed",
    },
}  # fmt: skip
NEGATIVE: dict[str, set[str]] = {
    "coefficients, means and cosines have a sign": {
        "ButcherTableau.a", "ButcherTableau.b", "ButcherTableau.c", "LogitNormalGrid.mean", "LogitNormalTimes.mean",
        "PrunedSource.threshold", "Units.shift",
    },
}  # fmt: skip
UNBOUNDED: dict[str, set[str]] = {
    "operations of a training": {"Budget.flops_per_step", "BudgetLimit.amount"},
    "squares of the largest number": {"normalized_path_energy.w2_squared"},
}

# Public classes that a room's ``__all__`` does not list.
EXTRA: Mapping[str, type] = {cls.__name__: cls for cls in (ExponentialMovingAverage, Request, families.LatentSpace)}
MAKERS: Mapping[str, Callable[..., Any]] = {"DiffusersAutoencoder": on_meta(families.DiffusersAutoencoder)}
