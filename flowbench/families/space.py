"""Where a flow lives: the data space itself, or the latent space of a frozen autoencoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowbench.seeds import indexed_normal

if TYPE_CHECKING:
    from flowbench.families.autoencoder import Autoencoder

__all__ = ["LatentSpace", "PixelSpace", "Space", "latent_space"]

Density = Callable[[Tensor], Tensor]


class Space(ABC):
    """Carries data into the flow's space and back."""

    shape: tuple[int, ...]

    @property
    def checksum(self) -> str | None:
        """Names the weights that the space depends on; None when there are none."""
        return None

    @abstractmethod
    def encode(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Data (B, *D) to the flow's space (B, *shape); random spaces draw from `generator`."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """The flow's space (B, *shape) to data (B, *D)."""

    @abstractmethod
    def log_prob(self, x: Tensor, flow_density: Density, index: Tensor, seed: int) -> Tensor:
        """Log-density of data in nats, shape (B,), from the flow's density of its own points."""


class PixelSpace(Space):
    """The data space itself."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = tuple(shape)

    def encode(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Nothing to do."""
        return x

    def decode(self, z: Tensor) -> Tensor:
        """Nothing to do."""
        return z

    def log_prob(self, x: Tensor, flow_density: Density, index: Tensor, seed: int) -> Tensor:
        """The flow's density is the data's."""
        return flow_density(x)


class LatentSpace(Space):
    """The latent space of a frozen autoencoder, scaled to unit variance (Rombach et al., 2022, arXiv 2112.10752).

    The autoencoder is not a submodule of the flow: its weights enter neither the optimiser nor the averaged weights
    nor the checkpoint. It follows the data's device.

    Args:
        autoencoder: trained and in evaluation mode.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.shape = tuple(autoencoder.network.latent_shape)

    @cached_property
    def checksum(self) -> str | None:
        """SHA-256 of the autoencoder's weights, the first 16 hex digits."""
        return self.autoencoder.checksum()

    def _model(self, x: Tensor) -> Autoencoder:
        return self.autoencoder.to(x.device)

    @torch.no_grad()
    def encode(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A draw from the posterior, divided by the latents' standard deviation."""
        model = self._model(x)
        mean, log_variance = model.network.encode(x)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return model.network.sample(mean, log_variance, noise) / model.latent_std

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """The decoder's mean."""
        model = self._model(z)
        return model.network.decode(z * model.latent_std)

    def log_prob(self, x: Tensor, flow_density: Density, index: Tensor, seed: int) -> Tensor:
        """One-sample evidence lower bound (Kingma & Welling, 2014, arXiv 1312.6114, eq. 3).

        log p(x) >= E_q [log p(x | z) + log p(z) - log q(z | x)], with the decoder's calibrated Gaussian likelihood
        and the flow as the prior; the posterior draw is keyed by the sample's index.
        """
        model = self._model(x)
        with torch.no_grad():
            mean, log_variance = model.network.encode(x)
            noise = indexed_normal(index, tuple(mean.shape[1:]), seed, "posterior", device=x.device, dtype=mean.dtype)
            latent = model.network.sample(mean, log_variance, noise)
            decoder = torch.distributions.Normal(model.network.decode(latent), model.network.decoder_std)
            posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
            reconstruction = decoder.log_prob(x).flatten(1).sum(1)
            entropy_term = posterior.log_prob(latent).flatten(1).sum(1)
        scale = latent[0].numel() * model.latent_std.log()
        return reconstruction + flow_density(latent / model.latent_std) - scale - entropy_term


def latent_space(autoencoder: Autoencoder | None, family: str) -> LatentSpace:
    """The space of a family that cannot do without an autoencoder.

    Raises:
        ValueError: when there is none.
    """
    if autoencoder is None:
        raise ValueError(
            f"{family} lives in an autoencoder's latent space and got none: "
            "add `requires: {autoencoder: <experiment file>}` to the experiment file"
        )
    return LatentSpace(autoencoder)
