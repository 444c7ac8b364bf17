"""Where a flow lives: the data space itself, or the latent space of a frozen autoencoder."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowbench.core.checks import check_counts, check_number
from flowbench.core.seeds import indexed_normal
from flowbench.data import Batch, FlowDataModule
from flowbench.families.latents.latent_cache import LatentCache, check_cacheable, latent_cache
from flowbench.networks import GaussianAutoencoder
from flowbench.training.module import Loss

if TYPE_CHECKING:
    from flowbench.families.latents.autoencoder import Autoencoder

__all__ = ["Denoise", "Density", "LatentSpace", "PixelSpace", "Space", "draw", "latent_space"]

Density = Callable[[Tensor], Tensor]
Denoise = Callable[[Tensor], Tensor]


class Space(ABC):
    """Carries data into the flow's space and back.

    Args:
        shape: shape of one point of the flow's space, sizes >= 1.
        noise_std: standard deviation of the Gaussian noise that :meth:`encode` adds, in [0, 1e12], in units of that
            space.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> space: Space = PixelSpace((2,), noise_std=0.1)
        >>> x = torch.zeros(3, 2)
        >>> z = space.encode(x, torch.Generator().manual_seed(0))
        >>> z.shape, torch.equal(space.encode_mean(x), x), torch.equal(space.decode(z), z)
        (torch.Size([3, 2]), True, True)
    """

    def __init__(self, shape: tuple[int, ...], noise_std: float = 0.0) -> None:
        check_counts("shape", shape)
        check_number("noise_std", noise_std, at_least=0, hint="0 adds none")
        self.shape = tuple(shape)
        self.noise_std = noise_std

    @property
    def checksum(self) -> str | None:
        """Names the weights that the space depends on; None when there are none."""
        return None

    @property
    def identity(self) -> str | None:
        """What a checkpoint of a flow and the flow that loads it must agree on; the weights the space depends on."""
        return self.checksum

    @property
    def spread(self) -> float:
        """Standard deviation of training points about their mean, :meth:`encode_mean`, where all have one and the same.

        Where an encoder learns it for every point, that of the noise alone.
        """
        return self.noise_std

    @property
    def trained(self) -> GaussianAutoencoder | None:
        """The autoencoder that is trained together with the flow; None where nothing of the space is."""
        return None

    def joined(self, loss: Loss, points: Tensor, batch: Batch) -> Loss:
        """The flow's loss together with what trains the space; as it is where nothing of the space is trained.

        Args:
            loss: of the flow, in nats per dimension of the flow's space where the space is trained.
            points: what :meth:`encode_batch` gave, shape (B, *shape).
            batch: that they were made from.
        """
        return loss

    @abstractmethod
    def encode(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Data (B, *D) to what the flow is trained on (B, *shape); every random number comes from `generator`."""

    @abstractmethod
    def encode_indexed(self, x: Tensor, index: Tensor, seed: int) -> Tensor:
        """:meth:`encode` with every random number keyed by (seed, index): the same for any batching.

        Args:
            x: data, shape (B, *D).
            index: sample indices, shape (B,).
            seed: the evaluation seed.
        """

    @abstractmethod
    def encode_mean(self, x: Tensor) -> Tensor:
        """Data (B, *D) to the mean of :meth:`encode` (B, *shape), without noise."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """The flow's space (B, *shape) to data (B, *D)."""

    @abstractmethod
    def log_prob(
        self, x: Tensor, flow_density: Density, index: Tensor, seed: int, denoise: Denoise | None = None
    ) -> Tensor:
        """Log-density of data in nats, or its lower bound, from the flow's density of its own points.

        Args:
            x: data, shape (B, *D).
            flow_density: log-density of the flow's points, (B, *shape) to (B,).
            index: sample indices that key the posterior draws, shape (B,).
            seed: the evaluation seed.
            denoise: what the sampler does to the flow's points before they are decoded; None does nothing. Data space
                has no decoder that it could change.

        Returns:
            Shape (B,).
        """

    def check_training(self, data: FlowDataModule) -> None:  # noqa: B027 - most spaces take any
        """Refuse data that cannot be carried into the space as it is asked for, before they are read.

        Raises:
            ValueError: names what to change.
        """

    def check_likelihood(self) -> None:  # noqa: B027 - most spaces have one
        """Refuse a space whose points have no density.

        Raises:
            ValueError: names what to change.
        """

    def encode_batch(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """:meth:`encode` of a batch; a space that knows the training samples looks them up."""
        return self.encode(batch.x, generator)

    def prepare_training(self, data: object, device: torch.device) -> None:  # noqa: B027 - most spaces have nothing to do
        """Do what pays once before many batches of the training split; nothing unless a space was asked to.

        Args:
            data: the trainer's datamodule.
            device: where training runs.
        """


class PixelSpace(Space):
    """The data space itself, with Gaussian noise on the training points where `noise_std` is above 0.

    Example:
        >>> space, x = PixelSpace((2,)), torch.ones(3, 2)
        >>> torch.equal(space.encode(x, torch.Generator()), x)
        True
        >>> torch.equal(PixelSpace((2,), noise_std=0.1).encode(x, torch.Generator().manual_seed(0)), x)
        False
    """

    def encode(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Data with noise; the data themselves where `noise_std` is 0."""
        if not self.noise_std:
            return x
        return x + self.noise_std * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)

    def encode_indexed(self, x: Tensor, index: Tensor, seed: int) -> Tensor:
        """Data with noise keyed by the index; the data themselves where `noise_std` is 0."""
        if not self.noise_std:
            return x
        noise = indexed_normal(index, self.shape, seed, "augmentation", device=x.device, dtype=x.dtype)
        return x + self.noise_std * noise

    def encode_mean(self, x: Tensor) -> Tensor:
        """Nothing to do."""
        return x

    def decode(self, z: Tensor) -> Tensor:
        """Nothing to do."""
        return z

    def log_prob(
        self, x: Tensor, flow_density: Density, index: Tensor, seed: int, denoise: Denoise | None = None
    ) -> Tensor:
        """The flow's density at `x`; above `noise_std` 0 that is the density of noisy data."""
        return flow_density(x)


class LatentSpace(Space):
    """The latent space of a frozen autoencoder, scaled to unit variance (Rombach et al., 2022, arXiv 2112.10752).

    The flow is trained on draws from q(z | x) = N(mean / scale, variance / scale^2 + noise_std^2): the noise is a part
    of the encoder, so the bound on the likelihood holds with it (Gu et al., 2025, arXiv 2506.06276, sec. 3).

    The autoencoder is not a submodule of the flow: its weights enter neither the optimiser nor the averaged weights
    nor the checkpoint. It follows the data's device.

    Args:
        autoencoder: trained and in evaluation mode.
        noise_std: standard deviation of the noise on scaled latents, in [0, 1e12].
        cache_latents: look the training samples' posteriors up in a file instead of running the encoder, see
            ``latent_cache.py``. Draws and noise stay the same. A budget in operations
            still counts the encoder, so that it buys the same training with and without.

    Raises:
        ValueError: for a negative `noise_std`.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import DataSpec
        >>> from flowbench.networks import KLAutoencoder
        >>> spec = DataSpec("images", "1", (1, 8, 8), levels=17)
        >>> space = LatentSpace(Autoencoder(spec, partial(KLAutoencoder, latent_channels=2, width=8)).eval())
        >>> z = space.encode(torch.zeros(3, 1, 8, 8), torch.Generator().manual_seed(0))
        >>> z.shape, space.decode(z).shape
        (torch.Size([3, 2, 4, 4]), torch.Size([3, 1, 8, 8]))
    """

    def __init__(self, autoencoder: Autoencoder, noise_std: float = 0.0, cache_latents: bool = False) -> None:
        super().__init__(tuple(autoencoder.network.latent_shape), noise_std)
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.cache_latents = cache_latents
        self._cache: LatentCache | None = None

    @cached_property
    def checksum(self) -> str | None:
        """SHA-256 of the autoencoder's weights, the first 16 hex digits."""
        return self.autoencoder.checksum()

    @property
    def spread(self) -> float:
        """See :meth:`Space.spread`: of a constant posterior and the noise together."""
        std = self.autoencoder.network.posterior_std
        return self.noise_std if std is None else math.hypot(std / float(self.autoencoder.latent_std), self.noise_std)

    def _model(self, x: Tensor) -> Autoencoder:
        return self.autoencoder.to(x.device)

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z | x) in scaled latents."""
        model = self._model(x)
        return self._scaled(*model.network.encode(x))

    def _scaled(self, mean: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.autoencoder.latent_std
        std = (0.5 * log_variance).exp() / scale
        return mean / scale, torch.sqrt(std.square() + self.noise_std**2) if self.noise_std else std

    @torch.no_grad()
    def encode(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A draw from q(z | x)."""
        return draw(*self._posterior(x), generator)

    def prepare_training(self, data: object, device: torch.device) -> None:
        """Read or make the file of cached latents, where it is asked for.

        Raises:
            ValueError: when the training data cannot be cached; see :func:`latent_cache`.
        """
        if not self.cache_latents:
            return
        if not isinstance(data, FlowDataModule):
            raise ValueError(f"cache_latents needs a FlowDataModule, got {type(data).__name__}: set it to false")
        self._cache = latent_cache(self.autoencoder, data, device)

    def check_training(self, data: FlowDataModule) -> None:
        """Refuse data whose latents cannot be kept, where they are to be; see :func:`latent_cache`."""
        if self.cache_latents:
            check_cacheable(data)

    def check_likelihood(self) -> None:
        """Refuse a deterministic encoder without noise, whose q(z | x) has no density."""
        if self.autoencoder.network.is_deterministic and not self.noise_std:
            raise ValueError(_no_density(self.noise_std))

    @torch.no_grad()
    def encode_batch(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """A draw from q(z | x); batches of the training stream are looked up where there is a cache."""
        if self._cache is None or batch.position is None or batch.index is None:
            return self.encode(batch.x, generator)
        self._model(batch.x)
        return draw(*self._scaled(*self._cache.take(batch.index, batch.x.device)), generator)

    @torch.no_grad()
    def encode_indexed(self, x: Tensor, index: Tensor, seed: int) -> Tensor:
        """A draw from q(z | x), keyed as that of :meth:`log_prob` is."""
        return self._keyed_draw(*self._posterior(x), index, seed)

    @torch.no_grad()
    def encode_mean(self, x: Tensor) -> Tensor:
        """The mean of q(z | x)."""
        return self._posterior(x)[0]

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """The decoder's mean."""
        model = self._model(z)
        return model.network.decode(z * model.latent_std)

    def _keyed_draw(self, mean: Tensor, std: Tensor, index: Tensor, seed: int) -> Tensor:
        noise = indexed_normal(index, self.shape, seed, "posterior", device=mean.device, dtype=mean.dtype)
        return mean + std * noise

    @torch.no_grad()
    def reconstruct(
        self, x: Tensor, *, index: Tensor | None = None, seed: int = 0, denoise: Denoise | None = None
    ) -> Tensor:
        """Data there and back: what no latent flow can do better than.

        Args:
            x: data, shape (B, *D).
            index: sample indices, shape (B,): reconstruct a draw from q(z | x), noise and `denoise` included, as a
                perfect flow would sample it. None reconstructs the posterior mean: the autoencoder alone.
            seed: keys the draws together with `index`.
            denoise: what the sampler does to the flow's points before they are decoded; None does nothing.

        Returns:
            Data, shape (B, *D), not clamped.
        """
        z, std = self._posterior(x)
        if index is not None:
            z = self._keyed_draw(z, std, index, seed)
        return self.decode(z if denoise is None else denoise(z))

    def log_prob(
        self, x: Tensor, flow_density: Density, index: Tensor, seed: int, denoise: Denoise | None = None
    ) -> Tensor:
        """One-sample evidence lower bound (Kingma & Welling, 2014, arXiv 1312.6114, eq. 3).

        log p(x) >= E_q [log p(x | z) + log p(z) - log q(z | x)]: the bound of exactly what sampling does, with the
        flow as the prior and p(x | z) = N(decode(denoise(z)), decoder_std^2). The draw is keyed by the sample's index.

        Raises:
            ValueError: for a deterministic encoder without noise, whose q(z | x) has no density.
        """
        with torch.no_grad():
            mean, std = self._posterior(x)
            _check_spread(std, self.noise_std)
            z = self._keyed_draw(mean, std, index, seed)
            decoded = self.decode(z if denoise is None else denoise(z))
            likelihood = _normal(decoded, self.autoencoder.network.decoder_std)
            reconstruction = likelihood.log_prob(x).flatten(1).sum(1)
            entropy_term = _normal(mean, std).log_prob(z).flatten(1).sum(1)
        return reconstruction + flow_density(z) - entropy_term


def _normal(mean: Tensor, std: Tensor | float) -> torch.distributions.Normal:
    """Without the check of its arguments, which is read from the device for each."""
    return torch.distributions.Normal(mean, std, validate_args=False)


def _check_spread(std: Tensor, noise_std: float) -> None:
    """One read of the device for each call: no setting says whether a pretrained encoder is deterministic."""
    if not bool((std > 0).all()):
        raise ValueError(_no_density(noise_std))


def _no_density(noise_std: float) -> str:
    return (
        "the likelihood bound needs a posterior with a variance, but this encoder is deterministic and noise_std "
        f"is {noise_std:g}: set noise_std above 0"
    )


def draw(mean: Tensor, std: Tensor, generator: torch.Generator) -> Tensor:
    """A point of a normal distribution, of the mean's shape; gradients reach both."""
    return mean + std * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)


def latent_space(
    autoencoder: Autoencoder | None, family: str, noise_std: float = 0.0, cache_latents: bool = False
) -> LatentSpace:
    """The space of a family that cannot do without an autoencoder.

    Raises:
        ValueError: when there is none, or `noise_std` is negative.
    """
    if autoencoder is None:
        raise ValueError(
            f"{family} lives in an autoencoder's latent space and got none: "
            "add `requires: {autoencoder: <experiment file>}` to the experiment file"
        )
    return LatentSpace(autoencoder, noise_std, cache_latents)
