"""The autoencoder that latent families share, with its own training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from flowbench.core.checks import check_number, check_scale
from flowbench.core.contract import returned, shaped
from flowbench.core.distributed import sum_over_processes, world_size
from flowbench.data import Batch, DataSpec
from flowbench.families.latents.decoder_losses import AdversarialConfig, PerceptualConfig
from flowbench.metrics import psnr
from flowbench.networks import GaussianAutoencoder
from flowbench.networks.discriminator import hinge_discriminator_loss, hinge_generator_loss
from flowbench.training.checkpoint import load_checkpoint
from flowbench.training.config import TrainingConfig
from flowbench.training.ema import ExponentialMovingAverage
from flowbench.training.module import Loss, TrainingModule

__all__ = ["Autoencoder", "AutoencoderFactory", "load_autoencoder", "load_trained"]

AutoencoderFactory = Callable[[tuple[int, ...]], GaussianAutoencoder]
Module = TypeVar("Module", bound=TrainingModule)
DISCRIMINATOR = "discriminator"


class Autoencoder(TrainingModule):
    """A KL autoencoder with a calibrated decoder, trained by its evidence lower bound.

    The decoder's variance is learned (Rybkin et al., 2021, arXiv 2006.13202), so `kl_weight=1` without further terms is
    the bound itself. A perceptual and an adversarial term trade some of it for looks (Esser et al., 2021, arXiv
    2012.09841; Rombach et al., 2022, arXiv 2112.10752); the variance stays calibrated to the error that
    they leave, so the latent families' likelihoods go on to mean something.

    Args:
        spec: the data's shape and value grid.
        network: builds the autoencoder from the data's shape, e.g. ``flowbench.networks.KLAutoencoder``.
        kl_weight: weight of the KL term, in [1e-12, 1e12]; below 1 favours reconstruction.
        latent_std_decay: decay of the running standard deviation of the latents, in [0, 1).
        perceptual: a distance in the feature maps of a fixed network; None for none.
        adversarial: a discriminator of patches; None for none. Where operations are counted for a budget, it counts
            from the first step.
        training: optimiser, averaged weights (a discriminator is not averaged) and compilation; None: the defaults.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import Batch, DataSpec
        >>> from flowbench.networks import KLAutoencoder
        >>> spec = DataSpec("images", "1", (1, 8, 8), levels=17)
        >>> autoencoder = Autoencoder(spec, partial(KLAutoencoder, latent_channels=2, width=8))
        >>> loss = autoencoder.training_loss(Batch(torch.zeros(3, 1, 8, 8)), torch.Generator().manual_seed(0))
        >>> loss.total.shape, sorted(loss.metrics)
        (torch.Size([]), ['kl', 'psnr', 'reconstruction_nll'])
    """

    latent_second_moment: Tensor

    def __init__(
        self,
        spec: DataSpec,
        network: AutoencoderFactory,
        *,
        kl_weight: float = 1.0,
        latent_std_decay: float = 0.98,
        perceptual: PerceptualConfig | None = None,
        adversarial: AdversarialConfig | None = None,
        training: TrainingConfig | None = None,
    ) -> None:
        super().__init__(spec, training=training)
        check_scale("kl_weight", kl_weight, hint="1 is the evidence lower bound")
        check_number("latent_std_decay", latent_std_decay, at_least=0, below=1)
        self.network = network(spec.shape)
        self.kl_weight = kl_weight
        self.latent_std_decay = latent_std_decay
        self.perceptual = perceptual
        self.adversarial = adversarial
        self._distance = perceptual.build() if perceptual else None
        self.discriminator = adversarial.build(spec.shape) if adversarial else None
        self.register_buffer("latent_second_moment", torch.ones(()))

    @property
    def decoder_noise_std(self) -> float:
        """Standard deviation of the noise on scaled latents that the decoder was trained to remove; 0 for none."""
        return 0.0

    @property
    def latent_std(self) -> Tensor:
        """Root mean square of the latents over the training data, a scalar: the scale factor of the latent space."""
        return self.latent_second_moment.sqrt()

    @property
    def ema(self) -> ExponentialMovingAverage | None:
        """The averaged weights of the network; the discriminator is no part of what is evaluated."""
        if self._ema is None and self.ema_decay > 0:
            self._ema = ExponentialMovingAverage(nn.ModuleDict({"network": self.network}), self.ema_decay)
        return self._ema

    def compiled_modules(self) -> list[nn.Module]:
        """Encoder and decoder: the network's own ``forward`` is never called."""
        return [*self.network.encoder_modules(), *self.network.decoder_modules()]

    # ---- loss -----------------------------------------------------------------------------------------

    def training_loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Negative evidence lower bound in nats per dimension, with the KL term weighted, and the terms for looks."""
        mean, log_variance = returned(self.network.encode(batch.x), tuple, self.network, "encode")
        shaped(mean, (len(batch), *self.network.latent_shape), self.network, "encode")
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        if self.training:
            self._track_scale(mean, log_variance)
        loss = self.decoding_loss(batch.x, self.network.sample(mean, log_variance, noise))
        kl = self.network.kl(mean, log_variance).mean()
        total = loss.total + self.kl_weight * kl / self.spec.num_dims
        return Loss(total, {"kl": kl.detach(), **loss.metrics})

    def decoding_loss(self, x: Tensor, latent: Tensor) -> Loss:
        """Loss of the decoder alone, in nats per dimension: its likelihood and, where given, the terms for looks.

        Args:
            x: images, shape (B, C, H, W).
            latent: what is decoded, in the network's units, shape (B, *latent_shape).

        Returns:
            The loss with the reconstruction's negative log-likelihood (nats per image) and its PSNR (dB) as parts.
        """
        x_hat = shaped(self.network.decode(latent), tuple(x.shape), self.network, "decode")
        nll = self.network.gaussian_nll(x, x_hat).mean()
        total = nll / self.spec.num_dims
        metrics = {"reconstruction_nll": nll.detach(), "psnr": psnr(x, x_hat.detach().clamp(-1, 1)).float().mean()}
        if self.perceptual is not None and self._distance is not None:
            distance = self._distance(x, x_hat).mean()
            total = total + self.perceptual.weight * distance
            metrics["perceptual"] = distance.detach()
        # Held-out data are scored by what has a meaning on its own; a discriminator's output has none.
        if self.training and self.discriminator is not None:
            adversarial = self._adversarial_loss(self.discriminator, x, x_hat)
            total = total + adversarial.total
            return Loss(total, {**metrics, **adversarial.metrics})
        return Loss(total, metrics)

    def _adversarial_loss(self, discriminator: nn.Module, x: Tensor, x_hat: Tensor) -> Loss:
        """Both sides of the game in one scalar, each blind to the other's weights."""
        assert self.adversarial is not None
        if self._budget_share() < self.adversarial.start:
            # Distributed training wants a gradient for every parameter at every step.
            return Loss(0.0 * sum((p.sum() for p in discriminator.parameters()), start=x_hat.new_zeros(())))
        frozen = {name: value.detach() for name, value in discriminator.named_parameters()}
        for_decoder = hinge_generator_loss(torch.func.functional_call(discriminator, frozen, (x_hat,)))
        for_discriminator = hinge_discriminator_loss(discriminator(x), discriminator(x_hat.detach()))
        metrics = {"adversarial": for_decoder.detach(), DISCRIMINATOR: for_discriminator.detach()}
        return Loss(self.adversarial.weight * for_decoder + for_discriminator, metrics)

    def _budget_share(self) -> float:
        """Share of the training budget used up; all of it where nothing is trained, as when operations are counted."""
        return 1.0 if self._trainer is None else self._next_progress()

    @torch.no_grad()
    def _track_scale(self, mean: Tensor, log_variance: Tensor) -> None:
        second_moment = sum_over_processes((mean.square() + log_variance.exp()).mean()) / world_size()
        self.latent_second_moment.lerp_(second_moment, 1.0 - self.latent_std_decay)

    # ---- identity -------------------------------------------------------------------------------------

    def checksum(self) -> str:
        """SHA-256 over names and values of the weights without the discriminator's, the first 16 hex digits."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            if not name.startswith(f"{DISCRIMINATOR}."):
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def load_trained(module: Module, checkpoint: str | Path) -> Module:
    """Load averaged weights, where there are, into a freshly built module.

    Args:
        module: built from the configuration that trained the checkpoint.
        checkpoint: a file that ``flowbench fit`` wrote.

    Returns:
        `module`, in evaluation mode; its weights are the averaged ones. An autoencoder's discriminator has done its
        work and is dropped.

    Raises:
        ValueError: when the file is missing, corrupt or of another model.
    """
    state = load_checkpoint(module, checkpoint)
    if "ema" in state:
        module.load_state_dict(state["ema"]["shadow"], strict=False)
    if isinstance(module, Autoencoder):
        module.discriminator = None
    return module.eval()


def load_autoencoder(module: Autoencoder, checkpoint: str | Path) -> Autoencoder:
    """:func:`load_trained` of an autoencoder."""
    return load_trained(module, checkpoint)
