"""Autoencoders that others trained: TAEF2, and diffusers' AutoencoderKL (Stable Diffusion's among them)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from flowbench.core.checks import check_counts, check_number
from flowbench.core.places import expand
from flowbench.data import Batch, DataSpec
from flowbench.families.latents.autoencoder import Autoencoder, AutoencoderFactory
from flowbench.metrics import psnr
from flowbench.networks import GaussianAutoencoder, TinyAutoencoder
from flowbench.training.config import EMAConfig, TrainingConfig
from flowbench.training.count import Count
from flowbench.training.module import Loss

__all__ = ["TAEF2", "DiffusersAutoencoder", "PretrainedAutoencoder"]

# Nothing is reconstructed to the last bit of float32, but a constant image comes close.
MIN_SQUARED_ERROR = 1e-12


class TAEF2(TinyAutoencoder):
    """The tiny autoencoder of FLUX.2's latents with its published weights: 32 channels at an eighth of the size.

    Its encoder is deterministic, so a likelihood bound needs noise on the latents.

    Args:
        shape: (3, H, W) of the images, H and W divisible by 8.
        weights: folder with ``taef2_encoder.pth`` and ``taef2_decoder.pth``, from github.com/madebyollin/taesd.

    Raises:
        ValueError: for another shape, or files that are missing or hold something else.
    """

    def __init__(self, shape: tuple[int, ...], *, weights: str) -> None:
        super().__init__(shape, latent_channels=32)
        for name, module in (("encoder", self.encoder), ("decoder", self.decoder)):
            _load_weights(module, expand(weights) / f"taef2_{name}.pth")


def _load_weights(module: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"there are no weights at {path}: get the file from github.com/madebyollin/taesd")
    try:
        module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # on arbitrary bytes the unpickler raises anything
        raise ValueError(f"{path} does not hold the weights of TAEF2 ({type(error).__name__}): get it anew") from None


class DiffusersAutoencoder(GaussianAutoencoder):
    """``diffusers.AutoencoderKL`` from a folder; the package is not a dependency.

    Its `scaling_factor` is not used: the scale of the latents is measured on the data.

    Args:
        shape: (C, H, W) of the images, C as the network takes it, H and W divisible by its downsampling.
        path: folder with ``config.json`` and the weights; nothing is downloaded.
        latents: (channels, downsampling) where you know them beforehand, (4, 8) of Stable Diffusion's: a network with
            others is refused, and on the meta device, where models are only counted, no file is read.

    Raises:
        ValueError: when diffusers is not installed, the folder holds no AutoencoderKL, or the shape does not fit.
    """

    def __init__(self, shape: tuple[int, ...], *, path: str, latents: tuple[int, int] | None = None) -> None:
        super().__init__(shape)
        if latents is not None:
            check_counts(
                "latents", latents, length=2, at_most=2**16, hint="channels, and how often a side is shortened"
            )
        if latents is not None and torch.get_default_device().type == "meta":
            self.latent_channels, self.downsampling = latents
            self._check_sides("the declared autoencoder")
            return
        self.vae = _read_diffusers(expand(path))
        config = self.vae.config
        self.downsampling = 2 ** (len(config.block_out_channels) - 1)
        self.latent_channels = int(config.latent_channels)
        if latents not in (None, (self.latent_channels, self.downsampling)):
            raise ValueError(
                f"latents are declared as {latents}, but the autoencoder in {path} has {self.latent_channels} channels "
                f"at 1/{self.downsampling} of the size: make them agree"
            )
        self._check_sides(f"the autoencoder in {path}")
        if self.shape[0] != config.in_channels:
            raise ValueError(f"the autoencoder in {path} takes {config.in_channels} channels, got {self.shape[0]}")

    def _check_sides(self, name: str) -> None:
        if len(self.shape) != 3 or any(side % self.downsampling for side in self.shape[1:]):
            raise ValueError(
                f"shape is {self.shape}; {name} takes (C, H, W) with H and W divisible by {self.downsampling}"
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent, (latent channels, H, W over the downsampling)."""
        return self.latent_channels, self.shape[1] // self.downsampling, self.shape[2] // self.downsampling

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the network's posterior."""
        self.check_images(x)
        posterior = self.vae.encode(x).latent_dist
        return posterior.mean.to(x.dtype), posterior.logvar.to(x.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) in model units, not bounded."""
        self.check_latents(z)
        return self.vae.decode(z).sample.to(z.dtype)

    def encoder_modules(self) -> Iterator[nn.Module]:
        """The encoder and, where there is one, the convolution after it."""
        yield self.vae.encoder
        if self.vae.quant_conv is not None:
            yield self.vae.quant_conv

    def decoder_modules(self) -> Iterator[nn.Module]:
        """The decoder and, where there is one, the convolution before it."""
        yield self.vae.decoder
        if self.vae.post_quant_conv is not None:
            yield self.vae.post_quant_conv


def _read_diffusers(path: Path) -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ValueError("DiffusersAutoencoder needs the package diffusers: pip install diffusers") from None
    if not (path / "config.json").is_file():
        raise ValueError(f"there is no config.json in {path}: give the folder of an AutoencoderKL, e.g. MODEL/vae")
    options = {"local_files_only": True, "use_safetensors": True, "low_cpu_mem_usage": False}
    try:
        return AutoencoderKL.from_pretrained(str(path), **options).float()
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise ValueError(f"{path} holds no diffusers.AutoencoderKL in safetensors: {reason}") from None


class PretrainedAutoencoder(Autoencoder):
    """A frozen autoencoder whose decoder variance and latent scale are measured on the training images.

    The decoder's variance that maximises the likelihood is the mean squared error, in closed form (Rybkin et al., 2021,
    arXiv 2006.13202, sec. 3.2), and the scale is the latents' root mean square. Both are means over the batches
    drawn: gradient descent on half the squared distance to each batch's value with step 1/t is their running mean,
    exactly, so ``flowbench fit`` with a few steps is the measurement, and its checkpoint serves like that of a
    trained autoencoder.

    Args:
        spec: the data's shape and value grid.
        network: builds the autoencoder from the data's shape, e.g. :class:`TAEF2`.
        noise_std: noise on scaled latents under which the decoder's error is measured, in [0, 1e12]: the flow's own,
            for a tight bound of its likelihood. It does not change the decoder.

    Raises:
        ValueError: for negative noise.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import Batch, DataSpec
        >>> from flowbench.networks import KLAutoencoder
        >>> network = partial(KLAutoencoder, latent_channels=2, width=8)
        >>> spec = DataSpec("images", "1", (1, 8, 8), levels=17)
        >>> measured = PretrainedAutoencoder(spec, network)  # a network with trained weights in place of this one
        >>> sorted(measured.training_loss(Batch(torch.zeros(3, 1, 8, 8)), torch.Generator().manual_seed(0)).metrics)
        ['latent_second_moment', 'psnr', 'squared_error']
    """

    def __init__(self, spec: DataSpec, network: AutoencoderFactory, *, noise_std: float = 0.0) -> None:
        super().__init__(spec, network, training=TrainingConfig(ema=EMAConfig(decay=0.0)))
        check_number("noise_std", noise_std, at_least=0, hint="0 adds none")
        self.noise_std = noise_std
        self.network.requires_grad_(False)
        self.squared_error = nn.Parameter(torch.ones(()))
        self.second_moment = nn.Parameter(torch.ones(()))

    def train(self, mode: bool = True) -> PretrainedAutoencoder:
        """The network stays in evaluation mode."""
        super().train(mode)
        self.network.eval()
        return self

    def count(self) -> Count:
        """Refused: most of it was trained before.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"flows and autoencoders can be counted; {type(self).__name__} builds on a trained one")

    def training_loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Half the squared distance of the two means from this batch's values."""
        error, moment, ratio = self._measure(batch.x, generator)
        total = 0.5 * ((self.squared_error - error).square() + (self.second_moment - moment).square())
        return Loss(total, {"psnr": ratio, "squared_error": error, "latent_second_moment": moment})

    @torch.no_grad()
    def _measure(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Mean squared error of the decoder, second moment of the latents, and mean PSNR of one batch."""
        mean, log_variance = self.network.encode(x)
        moment = (mean.square() + log_variance.exp()).mean()
        std = torch.sqrt(log_variance.exp() + self.noise_std**2 * moment)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        x_hat = self.network.decode(mean + std * noise)
        return (x - x_hat).square().mean(), moment, psnr(x, x_hat.clamp(-1, 1)).float().mean()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Steps 1, 1/2, 1/3, ...: gradient descent as a running mean."""
        optimizer = torch.optim.SGD([self.squared_error, self.second_moment], lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (step + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Never: a clipped mean is no mean."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then hand the means to where they are used."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.network.log_sigma.copy_(0.5 * self.squared_error.clamp(min=MIN_SQUARED_ERROR).log())
            self.latent_second_moment.copy_(self.second_moment)
