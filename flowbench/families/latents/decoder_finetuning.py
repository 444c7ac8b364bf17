"""Fine-tuning an autoencoder's decoder to remove the noise that a flow learns on its latents."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from flowbench.core.checks import check_scale
from flowbench.data import Batch, DataSpec, FlowDataModule
from flowbench.families.latents.autoencoder import Autoencoder, AutoencoderFactory
from flowbench.families.latents.decoder_losses import AdversarialConfig, PerceptualConfig
from flowbench.training.config import TrainingConfig
from flowbench.training.count import Count
from flowbench.training.module import Loss

__all__ = ["DecoderFineTuning"]


class DecoderFineTuning(Autoencoder):
    """A trained autoencoder whose decoder learns to decode noisy latents: D(E(x) + noise_std eps) -> x.

    The encoder and the scale of the latents stay as they are, so a flow trained on the original's latents can be
    decoded by the result. The decoder's variance is trained with it, hence calibrated to the error that noise leaves.
    The checkpoint serves wherever an autoencoder is required.

    References:
        Gu et al. (2025), STARFlow: Scaling Latent Normalizing Flows, arXiv 2506.06276, eq. 7.

    Args:
        spec: the data's shape and value grid.
        network: builds the same network as the experiment that trained the autoencoder.
        noise_std: standard deviation of the noise on latents of unit variance, in [1e-12, 1e12]: the flow's own.
        autoencoder: trained; an experiment file names it under ``requires``. A checkpoint of this class is loaded
            without it.
        perceptual: a distance in the feature maps of a fixed network; None for none.
        adversarial: a discriminator of patches; None for none.
        training: optimiser, averaged weights and compilation; None takes the defaults.

    Raises:
        ValueError: for noise that is not positive, or an autoencoder of another architecture.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import Batch, DataSpec
        >>> from flowbench.networks import KLAutoencoder
        >>> network = partial(KLAutoencoder, latent_channels=2, width=8)
        >>> spec = DataSpec("images", "1", (1, 8, 8), levels=17)
        >>> tuned = DecoderFineTuning(spec, network, noise_std=0.3, autoencoder=Autoencoder(spec, network).eval())
        >>> tuned.decoder_noise_std
        0.3
        >>> tuned.training_loss(Batch(torch.zeros(3, 1, 8, 8)), torch.Generator().manual_seed(0)).total.shape
        torch.Size([])
    """

    def __init__(
        self,
        spec: DataSpec,
        network: AutoencoderFactory,
        *,
        noise_std: float,
        autoencoder: Autoencoder | None = None,
        perceptual: PerceptualConfig | None = None,
        adversarial: AdversarialConfig | None = None,
        training: TrainingConfig | None = None,
    ) -> None:
        super().__init__(
            spec,
            network,
            perceptual=perceptual,
            adversarial=adversarial,
            training=training,
        )
        check_scale("noise_std", noise_std, hint="without noise there is nothing to fine-tune for")
        self._noise_std = noise_std
        self._started = autoencoder is not None
        if autoencoder is not None:
            self._start_from(autoencoder)
        self._freeze_encoder()

    def _start_from(self, autoencoder: Autoencoder) -> None:
        try:
            self.network.load_state_dict(autoencoder.network.state_dict())
        except RuntimeError:
            raise ValueError(
                "the required autoencoder has another architecture than model.init_args.network: use its own settings, "
                "e.g. by `base: [<its experiment file>]`"
            ) from None
        self.latent_second_moment.copy_(autoencoder.latent_second_moment)

    def _freeze_encoder(self) -> None:
        self.network.requires_grad_(False)
        self.network.log_sigma.requires_grad_(True)
        for module in self.network.decoder_modules():
            module.requires_grad_(True)

    @property
    def decoder_noise_std(self) -> float:
        """Standard deviation of the noise on scaled latents that the decoder was trained to remove."""
        return self._noise_std

    @property
    def checkpoint_identity(self) -> dict[str, Any]:
        """The noise besides: a decoder for other noise is another decoder."""
        return {**super().checkpoint_identity, "decoder_noise_std": self.decoder_noise_std}

    def check_training(self, data: FlowDataModule, trainer: L.Trainer | None = None) -> None:
        """Refuse to fine-tune what was never trained."""
        super().check_training(data, trainer)
        self._check_started()

    def setup(self, stage: str) -> None:
        """Refuse to fine-tune what was never trained.

        Raises:
            ValueError: when there is no autoencoder to start from.
        """
        super().setup(stage)
        if stage == "fit":
            self._check_started()

    def _check_started(self) -> None:
        if not self._started:
            raise ValueError(
                "DecoderFineTuning starts from a trained autoencoder and got none: "
                "add `requires: {autoencoder: <experiment file>}` to the experiment file"
            )

    def count(self) -> Count:
        """Refused: most of it was trained before.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"flows and autoencoders can be counted; {type(self).__name__} builds on a trained one")

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Begin with the variance that fits the noise, in closed form on the first batch.

        The noise multiplies the decoder's error at once; the optimiser would spend hundreds of steps to learn it.
        """
        if self.trainer.global_step or batch_idx:
            return
        latent = self._noisy_latent(batch.x, self.step_generator(batch_idx))
        with torch.no_grad():
            error = (batch.x - self.network.decode(latent)).square().mean()
            self.network.log_sigma.copy_(0.5 * self.trainer.strategy.reduce(error, reduce_op="mean").log())

    def training_loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """The decoder's loss on noisy latents of the batch, in nats per dimension."""
        return self.decoding_loss(batch.x, self._noisy_latent(batch.x, generator))

    @torch.no_grad()
    def _noisy_latent(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """What the flow is trained on, in the network's units."""
        mean, log_variance = self.network.encode(x)
        std = torch.sqrt(log_variance.exp() + (self.decoder_noise_std * self.latent_std) ** 2)
        return mean + std * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
