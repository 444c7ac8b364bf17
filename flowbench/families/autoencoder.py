"""The autoencoder that latent families share, with its own training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from flowbench.data import Batch, DataSpec
from flowbench.families.checkpoint import load_checkpoint
from flowbench.families.optimization import OptimizerConfig
from flowbench.families.training import Loss, TrainingModule
from flowbench.networks import KLAutoencoder

__all__ = ["Autoencoder", "load_autoencoder"]

AutoencoderFactory = Callable[[tuple[int, ...]], KLAutoencoder]


class Autoencoder(TrainingModule):
    """A KL autoencoder with a calibrated decoder, trained by its evidence lower bound.

    The decoder's variance is learned (Rybkin et al., 2021, arXiv 2006.13202), so `kl_weight=1` is the bound itself
    and the latent families' likelihoods mean something.

    Args:
        spec: the data's shape and value grid.
        network: builds the autoencoder from the data's shape, e.g. ``flowbench.networks.KLAutoencoder``.
        kl_weight: weight of the KL term, > 0; below 1 favours reconstruction.
        latent_std_decay: decay of the running standard deviation of the latents, in [0, 1).
        optimizer: AdamW and its schedule.
        ema_decay: decay of the averaged weights, in [0, 1).
        compile: compile the network.
    """

    def __init__(
        self,
        spec: DataSpec,
        network: AutoencoderFactory,
        *,
        kl_weight: float = 1.0,
        latent_std_decay: float = 0.98,
        optimizer: OptimizerConfig | None = None,
        ema_decay: float = 0.999,
        compile: bool = False,
    ) -> None:
        super().__init__(spec, optimizer=optimizer, ema_decay=ema_decay, compile=compile)
        if kl_weight <= 0:
            raise ValueError(f"kl_weight must be > 0, got {kl_weight}: 1 is the evidence lower bound")
        self.network = network(spec.shape)
        self.kl_weight = kl_weight
        self.latent_std_decay = latent_std_decay
        self.register_buffer("latent_second_moment", torch.ones(()))
        self.latent_second_moment: Tensor

    @property
    def latent_std(self) -> Tensor:
        """Root mean square of the latents over the training data, a scalar: the scale factor of the latent space."""
        return self.latent_second_moment.sqrt()

    def compiled_modules(self) -> list[nn.Module]:
        """Encoder and decoder: the network's own ``forward`` is never called."""
        return [self.network.encoder, self.network.decoder]

    def training_loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Negative evidence lower bound in nats per dimension, with the KL term weighted."""
        mean, log_variance = self.network.encode(batch.x)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        if self.training:
            self._track_scale(mean, log_variance)
        latent = self.network.sample(mean, log_variance, noise)
        reconstruction = self.network.reconstruction_nll(batch.x, latent).mean()
        kl = self.network.kl(mean, log_variance).mean()
        total = (reconstruction + self.kl_weight * kl) / self.spec.num_dims
        return Loss(total, {"reconstruction_nll": reconstruction.detach(), "kl": kl.detach()})

    @torch.no_grad()
    def _track_scale(self, mean: Tensor, log_variance: Tensor) -> None:
        second_moment = (mean.square() + log_variance.exp()).mean()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(second_moment)
            second_moment /= torch.distributed.get_world_size()
        self.latent_second_moment.lerp_(second_moment, 1.0 - self.latent_std_decay)

    def checksum(self) -> str:
        """SHA-256 over names and values of the weights, the first 16 hex digits."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def load_autoencoder(module: Autoencoder, checkpoint: str | Path) -> Autoencoder:
    """Load averaged weights into a freshly built autoencoder.

    Args:
        module: built from the configuration that trained the checkpoint.
        checkpoint: a file that ``flowbench fit`` wrote.

    Returns:
        `module`, with the averaged weights, in evaluation mode.

    Raises:
        ValueError: when the file is missing, corrupt or of another model.
    """
    state = load_checkpoint(module, checkpoint)
    if "ema" in state:
        module.load_state_dict(state["ema"]["shadow"], strict=False)
    return module.eval()
