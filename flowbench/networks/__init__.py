"""Networks: plain ``nn.Module``s.

MLP, UNet, DiT and HybridDiT (for sequences of images) are velocity networks, built as ``Net(shape, num_classes, *,
options)``. CausalTransformer serves autoregressive flows, ReadOutTransformer their learned inverse; KLAutoencoder and
TinyAutoencoder the latent families, PatchDiscriminator their training.
"""

from __future__ import annotations

from flowbench.networks.autoencoder import GaussianAutoencoder, KLAutoencoder
from flowbench.networks.causal_transformer import CausalTransformer
from flowbench.networks.discriminator import PatchDiscriminator
from flowbench.networks.dit import DiT
from flowbench.networks.hybrid_dit import HybridDiT
from flowbench.networks.mlp import MLP
from flowbench.networks.read_out_transformer import ReadOutTransformer
from flowbench.networks.tiny_autoencoder import TinyAutoencoder
from flowbench.networks.token_transformer import TokenTransformer
from flowbench.networks.unet import UNet
from flowbench.networks.velocity import VelocityNetwork

__all__ = [
    "MLP",
    "CausalTransformer",
    "DiT",
    "GaussianAutoencoder",
    "HybridDiT",
    "KLAutoencoder",
    "PatchDiscriminator",
    "ReadOutTransformer",
    "TinyAutoencoder",
    "TokenTransformer",
    "UNet",
    "VelocityNetwork",
]
