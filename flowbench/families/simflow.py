"""SimFlow: an autoregressive flow and the autoencoder whose latents it models, trained together."""

from __future__ import annotations

from typing import Any

from flowbench.data import DataSpec
from flowbench.families.latents.autoencoder import Autoencoder, AutoencoderFactory
from flowbench.families.latents.joint_space import JointLatentSpace
from flowbench.families.starflow import STARFlow

__all__ = ["SimFlow"]


class SimFlow(STARFlow):
    """A STARFlow on latents of a constant posterior standard deviation, trained with their encoder and decoder.

    Differs from STARFlow by its space alone, see :class:`~flowbench.families.latents.joint_space.JointLatentSpace`: no
    autoencoder is trained before, no noise is added to latents, and no denoiser takes it out, for the decoder learns to
    decode noisy latents. The likelihood is the evidence lower bound.

    References:
        SimFlow (2025), arXiv 2512.04084, read in abstract and project page only: loss L = lambda rec(x, dec(z)) -
        log p(z) with z = mean(x) + s e. Its networks and its choice of rec are not ours.

    Args:
        spec: the data's shape, classes and value grid.
        autoencoder_network: builds the autoencoder from the data's shape, with a constant ``posterior_std``, e.g.
            ``flowbench.networks.KLAutoencoder`` with ``posterior_std`` 0.5.
        reconstruction_weight: lambda, in [1e-12, 1e12]; 1 is the evidence lower bound.
        options: depth, width, conditioning, sampling and training as in :class:`STARFlow`.

    Raises:
        ValueError: for a network that learns its posterior's deviation, noise, a trained autoencoder, cached latents.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import Batch, DataSpec
        >>> from flowbench.networks import KLAutoencoder
        >>> spec = DataSpec("images", "1", (1, 8, 8), levels=17)
        >>> network = partial(KLAutoencoder, latent_channels=2, width=8, posterior_std=0.5)
        >>> flow = SimFlow(spec, network, deep_layers=2, shallow_blocks=1, width=16, head_dim=8)
        >>> loss = flow.training_loss(Batch(torch.zeros(3, 1, 8, 8)), torch.Generator().manual_seed(0))
        >>> "rate" in loss.metrics, "reconstruction_nll" in loss.metrics, flow.describe().likelihood
        (True, True, 'bound')
    """

    def __init__(
        self,
        spec: DataSpec,
        autoencoder_network: AutoencoderFactory,
        *,
        reconstruction_weight: float = 1.0,
        **options: Any,
    ) -> None:
        noise = options.get("augmentation")
        if noise is not None and noise.noise_std:
            raise ValueError(
                f"SimFlow adds no noise to latents beside the posterior's, got augmentation {noise!r}: set the "
                "network's posterior_std instead"
            )
        space = JointLatentSpace(Autoencoder(spec, autoencoder_network), reconstruction_weight)
        super().__init__(spec, space=space, **options)
