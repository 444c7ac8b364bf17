"""A latent space whose autoencoder is trained together with the flow."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowbench.core.checks import check_scale
from flowbench.data import Batch
from flowbench.families.latents.space import LatentSpace, draw
from flowbench.networks import GaussianAutoencoder
from flowbench.training.module import Loss

if TYPE_CHECKING:
    from flowbench.families.latents.autoencoder import Autoencoder

__all__ = ["JointLatentSpace"]


class JointLatentSpace(LatentSpace):
    """Latents z = mean(x) + s e of a constant deviation s; encoder and decoder are trained with the flow (SimFlow).

    The loss is the negative evidence lower bound with the flow as prior, in nats per dimension of the data: the rate
    -log p(z) - log-density of q, whose entropy is a constant, plus `reconstruction_weight` times the decoder's loss.
    Because z is a sum with independent noise, E[-log p(z)] is at least the entropy of s e: the rate cannot fall below 0
    by shrinking the latents, as it could if s were learned; such networks are refused.

    The network joins the flow's parameters, averaged weights and checkpoint. Latents are not scaled: the encoder
    learns their scale beside s. Noise on them and a file that keeps them make no sense here. The flow's loss must be
    -log p(z): families that regress a velocity are refused.

    Args:
        autoencoder: with a network of constant ``posterior_std`` and without a discriminator; trained or not.
        reconstruction_weight: lambda, in [1e-12, 1e12]; 1 is the bound.

    Raises:
        ValueError: for another autoencoder, or a weight out of range.

    References:
        SimFlow (2025), arXiv 2512.04084. The Gaussian decoder of one learned standard deviation is ours.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import Batch, DataSpec
        >>> from flowbench.networks import KLAutoencoder
        >>> from flowbench.training import Loss
        >>> spec = DataSpec("images", "1", (1, 8, 8), levels=17)
        >>> network = partial(KLAutoencoder, latent_channels=2, width=8, posterior_std=0.5)
        >>> space = JointLatentSpace(Autoencoder(spec, network))
        >>> batch = Batch(torch.zeros(3, 1, 8, 8))
        >>> z = space.encode_batch(batch, torch.Generator().manual_seed(0))
        >>> z.shape, z.requires_grad
        (torch.Size([3, 2, 4, 4]), True)
        >>> entropy = 0.5 * torch.tensor(2 * torch.pi * torch.e * 0.5**2).log()  # of a dimension of q
        >>> space.joined(Loss(entropy), z, batch).metrics["rate"].abs() < 1e-4  # at its lower bound
        tensor(True)
    """

    def __init__(self, autoencoder: Autoencoder, reconstruction_weight: float = 1.0) -> None:
        check_scale("reconstruction_weight", reconstruction_weight, hint="1 is the evidence lower bound")
        if autoencoder.network.posterior_std is None:
            raise ValueError(
                "an autoencoder trained with its flow needs a constant posterior_std, this one learns it and could let "
                "the latents shrink: set posterior_std of the network, e.g. to 0.5"
            )
        if autoencoder.discriminator is not None:
            raise ValueError("an autoencoder trained with its flow takes no discriminator: set adversarial to null")
        super().__init__(autoencoder)
        self.autoencoder.requires_grad_(True)
        self.autoencoder.latent_second_moment.fill_(1.0)
        self.reconstruction_weight = reconstruction_weight

    @property
    def posterior_std(self) -> float:
        """Constant standard deviation of q(z | x)."""
        std = self.autoencoder.network.posterior_std
        assert std is not None, "a learned one is refused"
        return std

    @property
    def checksum(self) -> str | None:
        """SHA-256 of the autoencoder's weights as they are now, the first 16 hex digits."""
        return self.autoencoder.checksum()

    @property
    def identity(self) -> str | None:
        """The posterior's standard deviation: the weights are the checkpoint's own."""
        return f"joint({self.posterior_std:g})"

    @property
    def trained(self) -> GaussianAutoencoder | None:
        """Encoder and decoder."""
        return self.autoencoder.network

    def encode_batch(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """A draw from q(z | x), through which gradients reach the encoder."""
        return draw(*self._posterior(batch.x), generator)

    def joined(self, loss: Loss, points: Tensor, batch: Batch) -> Loss:
        """The negative evidence lower bound; see the class and :meth:`Space.joined`."""
        dims = points[0].numel()
        entropy = dims * (0.5 * math.log(2 * math.pi * math.e) + math.log(self.posterior_std))
        rate = loss.total * dims - entropy
        # What is added to -log p(z), a regulariser, is no part of the rate.
        reported = loss.metrics.get("nll", loss.total.detach()) * dims - entropy
        decoder = self.autoencoder.decoding_loss(batch.x, points)
        total = rate / batch.x[0].numel() + self.reconstruction_weight * decoder.total
        return Loss(total, {**loss.metrics, **decoder.metrics, "rate": reported}, loss.diagnostics)
