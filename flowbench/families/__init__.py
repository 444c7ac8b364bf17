"""One LightningModule per family."""

from flowbench.families.base import FlowModule, NetworkFactory, Samples, Trajectory
from flowbench.families.budget import Budget, BudgetLimit, count_flops
from flowbench.families.checkpoint import AtomicCheckpointIO, load_checkpoint, read_checkpoint
from flowbench.families.conditioning.base import Conditioner, SpatialCondition
from flowbench.families.conditioning.inpainting import InpaintingConditioner
from flowbench.families.conditioning.semantic import SemanticConditioner
from flowbench.families.flow_matching import FlowMatching
from flowbench.families.latent_cfm import LatentCFM
from flowbench.families.latents.autoencoder import Autoencoder, load_autoencoder
from flowbench.families.latents.decoder_finetuning import DecoderFineTuning
from flowbench.families.latents.decoder_losses import AdversarialConfig, PerceptualConfig
from flowbench.families.latents.pretrained import (
    TAEF2,
    DiffusersAutoencoder,
    PretrainedAutoencoder,
)
from flowbench.families.latents.space import LatentSpace, PixelSpace, Space
from flowbench.families.noise.augmentation import Augmentation, GaussianNoise, UniformDequantization
from flowbench.families.noise.denoising import DecoderDenoiser, Denoiser, FlowScoreDenoiser, Tweedie
from flowbench.families.normalized_flow_matching import NormalizedFlowMatching
from flowbench.families.optimization import OptimizerConfig
from flowbench.families.ot_cfm import OTCFM
from flowbench.families.pairing.batch import BatchPairing, Pairing, Pairs
from flowbench.families.pairing.stream import StreamPairing
from flowbench.families.parallel import FullyShardedStrategy, check_strategy
from flowbench.families.precision import PRECISIONS, check_precision
from flowbench.families.reflow import Reflow
from flowbench.families.source import DatasetSource
from flowbench.families.starflow import STARFlow
from flowbench.families.tarflow import TARFlow
from flowbench.families.training import Loss, NonFiniteLossError, TrainingModule
from flowbench.families.weighted_cfm import WeightedCFM

__all__ = [
    "OTCFM",
    "PRECISIONS",
    "TAEF2",
    "AdversarialConfig",
    "AtomicCheckpointIO",
    "Augmentation",
    "Autoencoder",
    "BatchPairing",
    "Budget",
    "BudgetLimit",
    "Conditioner",
    "DatasetSource",
    "DecoderDenoiser",
    "DecoderFineTuning",
    "Denoiser",
    "DiffusersAutoencoder",
    "FlowMatching",
    "FlowModule",
    "FlowScoreDenoiser",
    "FullyShardedStrategy",
    "GaussianNoise",
    "InpaintingConditioner",
    "LatentCFM",
    "LatentSpace",
    "Loss",
    "NetworkFactory",
    "NonFiniteLossError",
    "NormalizedFlowMatching",
    "OptimizerConfig",
    "Pairing",
    "Pairs",
    "PerceptualConfig",
    "PixelSpace",
    "PretrainedAutoencoder",
    "Reflow",
    "STARFlow",
    "Samples",
    "SemanticConditioner",
    "Space",
    "SpatialCondition",
    "StreamPairing",
    "TARFlow",
    "TrainingModule",
    "Trajectory",
    "Tweedie",
    "UniformDequantization",
    "WeightedCFM",
    "check_precision",
    "check_strategy",
    "count_flops",
    "load_autoencoder",
    "load_checkpoint",
    "read_checkpoint",
]
