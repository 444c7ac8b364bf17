"""One LightningModule per family."""

from flowbench.torchvision_guard import ensure_importable

ensure_importable()

from flowbench.families.base import FlowModule, NetworkFactory, Samples, Trajectory  # noqa: E402
from flowbench.families.budget import Budget, BudgetLimit, count_flops  # noqa: E402
from flowbench.families.checkpoint import AtomicCheckpointIO, load_checkpoint, read_checkpoint  # noqa: E402
from flowbench.families.conditioning.base import Conditioner, SpatialCondition  # noqa: E402
from flowbench.families.conditioning.inpainting import InpaintingConditioner  # noqa: E402
from flowbench.families.conditioning.semantic import SemanticConditioner  # noqa: E402
from flowbench.families.flow_matching import FlowMatching  # noqa: E402
from flowbench.families.latent_cfm import LatentCFM  # noqa: E402
from flowbench.families.latents.autoencoder import Autoencoder, load_autoencoder  # noqa: E402
from flowbench.families.latents.decoder_finetuning import DecoderFineTuning  # noqa: E402
from flowbench.families.latents.decoder_losses import AdversarialConfig, PerceptualConfig  # noqa: E402
from flowbench.families.latents.pretrained import (  # noqa: E402
    TAEF2,
    DiffusersAutoencoder,
    PretrainedAutoencoder,
)
from flowbench.families.latents.space import LatentSpace, PixelSpace, Space  # noqa: E402
from flowbench.families.noise.augmentation import Augmentation, GaussianNoise, UniformDequantization  # noqa: E402
from flowbench.families.noise.denoising import DecoderDenoiser, Denoiser, FlowScoreDenoiser, Tweedie  # noqa: E402
from flowbench.families.normalized_flow_matching import NormalizedFlowMatching  # noqa: E402
from flowbench.families.optimization import OptimizerConfig  # noqa: E402
from flowbench.families.ot_cfm import OTCFM  # noqa: E402
from flowbench.families.pairing.batch import BatchPairing, Pairing, Pairs  # noqa: E402
from flowbench.families.pairing.stream import StreamPairing  # noqa: E402
from flowbench.families.parallel import FullyShardedStrategy, check_strategy  # noqa: E402
from flowbench.families.precision import PRECISIONS, check_precision  # noqa: E402
from flowbench.families.reflow import Reflow  # noqa: E402
from flowbench.families.source import DatasetSource  # noqa: E402
from flowbench.families.starflow import STARFlow  # noqa: E402
from flowbench.families.tarflow import TARFlow  # noqa: E402
from flowbench.families.training import Loss, NonFiniteLossError, TrainingModule  # noqa: E402
from flowbench.families.weighted_cfm import WeightedCFM  # noqa: E402

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
