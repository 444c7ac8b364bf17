"""A small deterministic autoencoder whose published weights turn photographs into latents an eighth their size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from flowbench.networks.autoencoder import GaussianAutoencoder
from flowbench.networks.blocks import conv3x3
from flowbench.networks.sizes import check_width

__all__ = ["TinyAutoencoder"]

WIDTH = 64
DOWNSAMPLING = 8
# Latents beyond three times this bound are far outside the training data; the decoder squashes them.
LATENT_BOUND = 3.0
POOL_GROUPS = 4


class TinyBlock(nn.Module):
    """Three convolutions around a shortcut, optionally after a pointwise update with normalised channels.

    Args:
        pooled: whether the pointwise update comes first.
    """

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv3x3(WIDTH, WIDTH), nn.ReLU(), conv3x3(WIDTH, WIDTH), nn.ReLU(), conv3x3(WIDTH, WIDTH)
        )
        self.pool = _pointwise(4 * WIDTH) if pooled else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, 64, H, W) to the same shape, non-negative."""
        if self.pool is not None:
            x = x + self.pool(x)
        return relu(self.conv(x) + x)


def _pointwise(hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(WIDTH, hidden, 1, bias=False),
        nn.GroupNorm(POOL_GROUPS, hidden),
        nn.ReLU(),
        nn.Conv2d(hidden, WIDTH, 1, bias=False),
    )


class BoundedLatent(nn.Module):
    """Keeps latents within (-3, 3) smoothly."""

    def forward(self, z: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return LATENT_BOUND * torch.tanh(z / LATENT_BOUND)


class TinyAutoencoder(GaussianAutoencoder):
    """The TAESD family of autoencoders: plain convolutions, no attention, no posterior variance.

    Layers are numbered as in the published state dicts, which load into :attr:`encoder` and :attr:`decoder` as they
    are. The networks work on images in [0, 1]; this class takes model space. The decoder starts untrained.

    Args:
        shape: (3, H, W) of the images, H and W divisible by 8.
        latent_channels: channels of the latent, 1 to 65,536; TAEF2 has 32.
        pooled: whether the blocks at the lowest resolution have the pointwise update; those of TAEF2 do.

    Raises:
        ValueError: another shape, or no latent channel.

    References:
        Bohan, TAESD: Tiny AutoEncoder for Stable Diffusion, https://github.com/madebyollin/taesd (MIT).

    Example:
        >>> autoencoder = TinyAutoencoder((3, 16, 16))
        >>> mean, log_variance = autoencoder.encode(torch.zeros(2, 3, 16, 16))
        >>> mean.shape, autoencoder.is_deterministic, log_variance.max().item()
        (torch.Size([2, 32, 2, 2]), True, -inf)
        >>> autoencoder.decode(mean).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(self, shape: tuple[int, ...], *, latent_channels: int = 32, pooled: bool = True) -> None:
        super().__init__(shape)
        if self.shape[0] != 3 or any(side % DOWNSAMPLING for side in self.shape[1:]):
            raise ValueError(
                f"shape is {self.shape}; the tiny autoencoder takes (3, H, W) with H and W divisible by {DOWNSAMPLING}"
            )
        check_width("latent_channels", latent_channels)
        self.latent_channels = latent_channels
        self.encoder = _encoder(latent_channels, pooled)
        self.decoder = _decoder(latent_channels, pooled)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent, (latent_channels, H / 8, W / 8)."""
        return self.latent_channels, self.shape[1] // DOWNSAMPLING, self.shape[2] // DOWNSAMPLING

    @property
    def is_deterministic(self) -> bool:
        """Always."""
        return True

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The latent of images in [-1, 1] as a mean, and minus infinity as its log-variance."""
        self.check_images(x)
        mean = self.encoder(0.5 * (x + 1.0)).to(x.dtype)
        return mean, torch.full_like(mean, -torch.inf)

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W) in model units, not bounded."""
        self.check_latents(z)
        return 2.0 * self.decoder(z).to(z.dtype) - 1.0

    def encoder_modules(self) -> Iterator[nn.Module]:
        """The encoder."""
        yield self.encoder

    def decoder_modules(self) -> Iterator[nn.Module]:
        """The decoder."""
        yield self.decoder


def _encoder(latent_channels: int, pooled: bool) -> nn.Sequential:
    layers: list[nn.Module] = [conv3x3(3, WIDTH), TinyBlock()]
    for level in range(3):
        layers.append(nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1, bias=False))
        layers += [TinyBlock(pooled and level == 2) for _ in range(3)]
    return nn.Sequential(*layers, conv3x3(WIDTH, latent_channels))


def _decoder(latent_channels: int, pooled: bool) -> nn.Sequential:
    layers: list[nn.Module] = [BoundedLatent(), conv3x3(latent_channels, WIDTH), nn.ReLU()]
    for level in range(3):
        layers += [TinyBlock(pooled and level == 0) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, TinyBlock(), conv3x3(WIDTH, 3))
