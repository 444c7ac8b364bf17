"""Latent CFM: flow matching in the latent space of a frozen autoencoder."""

from __future__ import annotations

from typing import Any

from flowbench.data import DataSpec
from flowbench.families.base import NetworkFactory
from flowbench.families.flow_matching import FlowMatching
from flowbench.families.latents.autoencoder import Autoencoder
from flowbench.families.latents.space import latent_space

__all__ = ["LatentCFM"]


class LatentCFM(FlowMatching):
    """Flow matching on latents of a trained autoencoder.

    References:
        Dao et al. (2023), Flow Matching in Latent Space, arXiv 2307.08698.

    Args:
        spec: the data's shape, classes and value grid.
        network: builds the velocity network from the latents' shape.
        autoencoder: trained; an experiment file names it under ``requires``.
        noise_std: standard deviation of Gaussian noise on scaled latents in training, in [0, 1e12]; samples keep it, so
            above 0 the autoencoder's decoder should be fine-tuned for it.
        cache_latents: keep the training split's latents on disk instead of encoding every batch.
        options: the other axes of :class:`FlowMatching`.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import DataSpec
        >>> from flowbench.networks import DiT, KLAutoencoder
        >>> spec = DataSpec("images", "1", (1, 8, 8), levels=17)
        >>> autoencoder = Autoencoder(spec, partial(KLAutoencoder, latent_channels=2, width=8)).eval()
        >>> flow = LatentCFM(spec, partial(DiT, width=16, depth=1, num_heads=2), autoencoder=autoencoder)
        >>> flow.flow_shape, flow.sample(flow.draw_noise(torch.arange(3), seed=0)).x.shape
        ((2, 4, 4), torch.Size([3, 1, 8, 8]))
        >>> flow.describe().likelihood
        'bound'
    """

    def __init__(
        self,
        spec: DataSpec,
        network: NetworkFactory,
        *,
        autoencoder: Autoencoder | None = None,
        noise_std: float = 0.0,
        cache_latents: bool = False,
        **options: Any,
    ) -> None:
        space = latent_space(autoencoder, "LatentCFM", noise_std, cache_latents)
        super().__init__(spec, network, space=space, **options)
