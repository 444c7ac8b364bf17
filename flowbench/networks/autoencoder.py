"""Variational autoencoders for images: the first stage of latent flows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from flowbench.core.checks import check_count, check_scale
from flowbench.networks.blocks import ResidualBlock, conv3x3, group_norm
from flowbench.networks.sizes import check_layers, check_shape, check_width

__all__ = ["GaussianAutoencoder", "KLAutoencoder"]

# Bounds of the posterior's log-variance: exp stays finite in float32 and the KL keeps a gradient in between.
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0

# A decoder that starts as wide as the data (log_sigma = 0) lets the KL win: the posterior collapses to the
# prior and takes hundreds of steps to come back. Of the starts 0, -1, -2, -3 on the 8 x 8 digits, -2 (a
# standard deviation of 0.14 in model units) has the lowest loss after 400 steps.
INITIAL_LOG_SIGMA = -2.0


class GaussianAutoencoder(nn.Module, ABC):
    """An encoder with a Gaussian posterior and a decoder that is a Gaussian of one standard deviation.

    q(z | x) = N(mean(x), exp(log_variance(x))), p(x | z) = N(decode(z), exp(log_sigma)^2). A subclass gives
    :meth:`encode`, :meth:`decode`, :attr:`latent_shape` and the modules of both sides.

    Args:
        shape: (C, H, W) of the images.

    Attributes:
        log_sigma: logarithm of the decoder's standard deviation in model units, a scalar parameter.

    Example:
        >>> mean, log_variance = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
        >>> GaussianAutoencoder.kl(mean, log_variance)  # 16 coordinates of mean 1: half a nat each
        tensor([8.])
        >>> GaussianAutoencoder.sample(mean, log_variance, noise=torch.full_like(mean, 0.5)).mean()
        tensor(1.5000)
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        check_shape(shape, 3)
        self.shape = tuple(int(size) for size in shape)
        self.log_sigma = nn.Parameter(torch.tensor(INITIAL_LOG_SIGMA))

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent, (latent channels, height, width)."""

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters of the posterior q(z | x).

        Args:
            x: images in [-1, 1], shape (B, C, H, W).

        Returns:
            Mean and log-variance, each of shape (B, *latent_shape), in the dtype of ``x`` whatever autocast does to
            the network. The log-variance of a deterministic encoder is minus infinity.

        Raises:
            ValueError: ``x`` does not have the shape of the images.
        """

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Mean of p(x | z) in model units, not bounded.

        Args:
            z: latents, shape (B, *latent_shape).

        Returns:
            Images, shape (B, C, H, W), in the dtype of ``z``.

        Raises:
            ValueError: ``z`` does not have the shape of the latents.
        """

    @abstractmethod
    def encoder_modules(self) -> Iterator[nn.Module]:
        """What :meth:`encode` consists of."""

    @abstractmethod
    def decoder_modules(self) -> Iterator[nn.Module]:
        """What :meth:`decode` consists of."""

    @property
    def posterior_std(self) -> float | None:
        """Standard deviation of q(z | x) where it is a constant; None where the encoder learns it."""
        return None

    @property
    def is_deterministic(self) -> bool:
        """Whether the posterior is a point: its log-variance is minus infinity."""
        return False

    @property
    def decoder_std(self) -> Tensor:
        """Standard deviation of the decoder's Gaussian in model units, a positive scalar."""
        return self.log_sigma.exp()

    def check_images(self, x: Tensor) -> None:
        """ValueError where ``x`` is not (B, *shape)."""
        self._check(x, self.shape, "x")

    def check_latents(self, z: Tensor) -> None:
        """ValueError where ``z`` is not (B, *latent_shape)."""
        self._check(z, self.latent_shape, "z")

    def _check(self, value: Tensor, shape: tuple[int, ...], name: str) -> None:
        if tuple(value.shape[1:]) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; this {type(self).__name__} takes (B, *{shape})")

    @staticmethod
    def sample(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
        """Reparameterised posterior sample ``mean + exp(log_variance / 2) * noise``.

        Args:
            mean: posterior mean, shape (B, *latent_shape).
            log_variance: posterior log-variance, same shape.
            noise: standard normal noise, same shape.

        Returns:
            Latents, shape (B, *latent_shape).
        """
        return mean + torch.exp(0.5 * log_variance) * noise

    @staticmethod
    def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
        """KL(q(z | x) || N(0, 1)) of the posterior.

        Args:
            mean: posterior mean, shape (B, *latent_shape).
            log_variance: posterior log-variance, same shape.

        Returns:
            Divergences in nats, summed over the latent, shape (B,).

        References:
            Kingma and Welling (2013), arXiv:1312.6114, appendix B.
        """
        per_dim = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return per_dim.flatten(1).sum(1)

    def reconstruction_nll(self, x: Tensor, z: Tensor) -> Tensor:
        """-log p(x | z) in nats, summed over the image.

        Args:
            x: images, shape (B, C, H, W).
            z: latents, shape (B, *latent_shape).

        Returns:
            Negative log-likelihoods, shape (B,).
        """
        return self.gaussian_nll(x, self.decode(z))

    def gaussian_nll(self, x: Tensor, decoded: Tensor) -> Tensor:
        """-log p(x | z) in nats, summed over the image, from the decoder's mean.

        Args:
            x: images, shape (B, C, H, W).
            decoded: what :meth:`decode` made of the latents, same shape.

        Returns:
            Negative log-likelihoods, shape (B,).
        """
        standardised = (x - decoded) * torch.exp(-self.log_sigma)
        per_dim = 0.5 * standardised.square() + self.log_sigma + 0.5 * math.log(2 * math.pi)
        return per_dim.flatten(1).sum(1)

    def elbo_terms(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The two terms of the negative ELBO; averaged over the noise, their sum is at least -log p(x).

        Args:
            x: images in [-1, 1], shape (B, C, H, W).
            noise: standard normal noise, shape (B, *latent_shape).

        Returns:
            ``reconstruction_nll`` and ``kl`` in nats, each of shape (B,).
        """
        mean, log_variance = self.encode(x)
        z = self.sample(mean, log_variance, noise)
        return {"reconstruction_nll": self.reconstruction_nll(x, z), "kl": self.kl(mean, log_variance)}

    def forward(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Same as :meth:`elbo_terms`."""
        return self.elbo_terms(x, noise)


def _stack(channels: int, num_res_blocks: int) -> list[nn.Module]:
    return [ResidualBlock(channels, channels) for _ in range(num_res_blocks)]


class KLAutoencoder(GaussianAutoencoder):
    """Convolutional VAE with a Gaussian decoder of one learned standard deviation.

    q(z | x) = N(mean(x), exp(log_variance(x))), p(z) = N(0, 1), p(x | z) = N(decode(z), exp(log_sigma)^2).
    ``log_sigma`` is trained with the weights, so that -(reconstruction_nll + kl) is a lower bound on log p(x)
    and not a sum with a chosen balance.

    Args:
        shape: (C, H, W) of the images; H and W are divisible by 2**downsamplings.
        latent_channels: channels of the latent, 1 to 65,536.
        width: channels at full resolution, 1 to 65,536; doubled per downsampling up to four times.
        downsamplings: how often height and width are halved, 0 to 16; 0 keeps them.
        num_res_blocks: residual blocks per resolution, in encoder and decoder, 1 to 1,000.
        posterior_std: a constant standard deviation of q(z | x), in [1e-12, 1e12], in place of a learned one.

    Raises:
        ValueError: ``shape`` is not (C, H, W) divisible by 2**downsamplings, or a size is out of range.

    References:
        Kingma and Welling (2013), "Auto-Encoding Variational Bayes", arXiv:1312.6114; Rombach et al. (2021),
        "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752, section 3.1;
        Rybkin et al. (2020), "Simple and Effective VAE Training with Calibrated Decoders", arXiv:2006.13202.

    Example:
        >>> autoencoder = KLAutoencoder((1, 8, 8), latent_channels=2, width=8)
        >>> autoencoder.latent_shape
        (2, 4, 4)
        >>> x, noise = torch.zeros(3, 1, 8, 8), torch.zeros(3, 2, 4, 4)
        >>> {name: tuple(term.shape) for name, term in autoencoder.elbo_terms(x, noise).items()}
        {'reconstruction_nll': (3,), 'kl': (3,)}
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        latent_channels: int = 4,
        width: int = 64,
        downsamplings: int = 1,
        num_res_blocks: int = 1,
        posterior_std: float | None = None,
    ) -> None:
        check_width("latent_channels", latent_channels)
        check_width("width", width)
        check_count("downsamplings", downsamplings, at_least=0, at_most=16)
        check_layers("num_res_blocks", num_res_blocks)
        check_scale("posterior_std", posterior_std, or_none=True, hint="None learns it")
        super().__init__(shape)
        self.downsamplings = downsamplings
        self.latent_channels = latent_channels
        self._posterior_std = posterior_std
        if self.shape[1] % 2**downsamplings or self.shape[2] % 2**downsamplings:
            raise ValueError(
                f"shape is {self.shape} with {downsamplings} downsamplings; give (C, H, W) with H and W "
                f"divisible by {2**downsamplings}, or fewer downsamplings"
            )
        widths = [width * min(2**level, 4) for level in range(downsamplings + 1)]
        self.encoder = self._build_encoder(widths, num_res_blocks)
        self.decoder = self._build_decoder(widths[::-1], num_res_blocks)

    def _build_encoder(self, widths: list[int], num_res_blocks: int) -> nn.Sequential:
        layers: list[nn.Module] = [conv3x3(self.shape[0], widths[0]), *_stack(widths[0], num_res_blocks)]
        for before, after in pairwise(widths):
            layers += [ResidualBlock(before, after, resample="down"), *_stack(after, num_res_blocks)]
        outputs = 2 if self.posterior_std is None else 1
        return nn.Sequential(
            *layers, group_norm(widths[-1]), nn.SiLU(), conv3x3(widths[-1], outputs * self.latent_channels)
        )

    def _build_decoder(self, widths: list[int], num_res_blocks: int) -> nn.Sequential:
        layers: list[nn.Module] = [
            conv3x3(self.latent_channels, widths[0]),
            *_stack(widths[0], num_res_blocks),
        ]
        for before, after in pairwise(widths):
            layers += [ResidualBlock(before, after, resample="up"), *_stack(after, num_res_blocks)]
        return nn.Sequential(*layers, group_norm(widths[-1]), nn.SiLU(), conv3x3(widths[-1], self.shape[0]))

    @property
    def posterior_std(self) -> float | None:
        """See :class:`GaussianAutoencoder`."""
        return self._posterior_std

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent, (latent_channels, H / 2**downsamplings, W / 2**downsamplings)."""
        return (
            self.latent_channels,
            self.shape[1] >> self.downsamplings,
            self.shape[2] >> self.downsamplings,
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x); a learned log-variance is clamped to [-30, 20]."""
        self.check_images(x)
        found = self.encoder(x).to(x.dtype)
        if self.posterior_std is not None:
            return found, torch.full_like(found, 2 * math.log(self.posterior_std))
        mean, log_variance = found.chunk(2, dim=1)
        return mean, log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)

    def decode(self, z: Tensor) -> Tensor:
        """Mean of p(x | z) in model units, not bounded."""
        self.check_latents(z)
        x_hat: Tensor = self.decoder(z).to(z.dtype)
        return x_hat

    def encoder_modules(self) -> Iterator[nn.Module]:
        """The encoder."""
        yield self.encoder

    def decoder_modules(self) -> Iterator[nn.Module]:
        """The decoder."""
        yield self.decoder
