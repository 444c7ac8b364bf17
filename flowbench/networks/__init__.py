"""Networks: plain ``nn.Module``s.

MLP, UNet and DiT are velocity networks, built as ``Net(shape, num_classes, *, options)``. CausalTransformer
serves autoregressive flows, KLAutoencoder the latent families.
"""

from __future__ import annotations

from flowbench.networks.autoencoder import KLAutoencoder
from flowbench.networks.causal_transformer import CausalTransformer
from flowbench.networks.dit import DiT
from flowbench.networks.mlp import MLP
from flowbench.networks.unet import UNet
from flowbench.networks.velocity import VelocityNetwork

__all__ = ["MLP", "CausalTransformer", "DiT", "KLAutoencoder", "UNet", "VelocityNetwork"]
