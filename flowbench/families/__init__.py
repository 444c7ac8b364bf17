"""One LightningModule per family."""

from flowbench.families.answers import SolvedDensity
from flowbench.families.arflow import ARFlow
from flowbench.families.base import FlowModule, FlowSamples, NetworkFactory, Trajectory
from flowbench.families.biflow import BiFlow
from flowbench.families.conditioning.base import Conditioner
from flowbench.families.conditioning.condition import Condition, SpatialCondition
from flowbench.families.conditioning.inpainting import InpaintingConditioner
from flowbench.families.conditioning.semantic import SemanticConditioner
from flowbench.families.description import Description
from flowbench.families.divergence_head import DivergenceHead
from flowbench.families.flow_map import FlowMap
from flowbench.families.flow_matching import FlowMatching
from flowbench.families.latent_cfm import LatentCFM
from flowbench.families.latents.autoencoder import Autoencoder, load_autoencoder
from flowbench.families.latents.decoder_finetuning import DecoderFineTuning
from flowbench.families.latents.decoder_losses import AdversarialConfig, PerceptualConfig
from flowbench.families.latents.joint_space import JointLatentSpace
from flowbench.families.latents.pretrained import (
    TAEF2,
    DiffusersAutoencoder,
    PretrainedAutoencoder,
)
from flowbench.families.latents.space import LatentSpace, PixelSpace, Space
from flowbench.families.noise.annealing import NoiseAnnealing
from flowbench.families.noise.augmentation import Augmentation, ConditionedNoise, GaussianNoise, UniformDequantization
from flowbench.families.noise.denoising import DecoderDenoiser, Denoiser, FlowScoreDenoiser, Tweedie
from flowbench.families.normalized_flow_matching import NormalizedFlowMatching
from flowbench.families.ot_cfm import OTCFM
from flowbench.families.pairing.base import Pairing, PairingContext, Pairs
from flowbench.families.pairing.batch_pairing import BatchPairing
from flowbench.families.pairing.semidiscrete import SemidiscretePairing
from flowbench.families.pairing.stream import StreamPairing
from flowbench.families.reflow import Reflow
from flowbench.families.simflow import SimFlow
from flowbench.families.source import DatasetSource
from flowbench.families.starflow import STARFlow
from flowbench.families.tarflow import TARFlow
from flowbench.families.weighted_cfm import WeightedCFM

__all__ = [
    "OTCFM",
    "TAEF2",
    "ARFlow",
    "AdversarialConfig",
    "Augmentation",
    "Autoencoder",
    "BatchPairing",
    "BiFlow",
    "Condition",
    "ConditionedNoise",
    "Conditioner",
    "DatasetSource",
    "DecoderDenoiser",
    "DecoderFineTuning",
    "Denoiser",
    "Description",
    "DiffusersAutoencoder",
    "DivergenceHead",
    "FlowMap",
    "FlowMatching",
    "FlowModule",
    "FlowSamples",
    "FlowScoreDenoiser",
    "GaussianNoise",
    "InpaintingConditioner",
    "JointLatentSpace",
    "LatentCFM",
    "LatentSpace",
    "NetworkFactory",
    "NoiseAnnealing",
    "NormalizedFlowMatching",
    "Pairing",
    "PairingContext",
    "Pairs",
    "PerceptualConfig",
    "PixelSpace",
    "PretrainedAutoencoder",
    "Reflow",
    "STARFlow",
    "SemanticConditioner",
    "SemidiscretePairing",
    "SimFlow",
    "SolvedDensity",
    "Space",
    "SpatialCondition",
    "StreamPairing",
    "TARFlow",
    "Trajectory",
    "Tweedie",
    "UniformDequantization",
    "WeightedCFM",
    "load_autoencoder",
]
