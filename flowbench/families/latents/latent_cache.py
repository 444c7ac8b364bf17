"""Latents of the training split on disk, so that a latent flow's training does not run the encoder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowbench.core.autocast import autocast_off
from flowbench.core.cache import ensure, identity_key, read_tensors, write_tensors
from flowbench.core.places import cached
from flowbench.data import DataSpec, FlowDataModule

if TYPE_CHECKING:
    from flowbench.families.latents.autoencoder import Autoencoder

__all__ = ["LatentCache", "check_cacheable", "latent_cache"]

ENCODING_BATCH = 256


@dataclass(frozen=True)
class LatentCache:
    """Posteriors of a training split, in a memory map.

    Attributes:
        mean: posterior means in the network's units, (N, *latent_shape).
        log_variance: their log-variances, same shape; minus infinity for a deterministic encoder.
        scale: the latents' root mean square, by which a flow divides them; a scalar.
        channel_mean: mean of each latent channel over the split, (C,).
        channel_std: standard deviation of draws from the posteriors in each channel, (C,).
    """

    mean: Tensor
    log_variance: Tensor
    scale: Tensor
    channel_mean: Tensor
    channel_std: Tensor

    def take(self, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Posterior means and log-variances of some samples.

        Args:
            index: positions in the training split, int64 (B,), on any device.
            device: where the result lies.
        """
        rows = index.cpu()
        return self.mean.index_select(0, rows).to(device), self.log_variance.index_select(0, rows).to(device)

    def means(self, index: Tensor) -> Tensor:
        """Posterior means of some samples as a flow sees them, divided by `scale`, on the CPU.

        Args:
            index: positions in the training split, int64 (B,), on any device.
        """
        return self.mean.index_select(0, index.cpu()) / self.scale


def latent_cache(autoencoder: Autoencoder, data: FlowDataModule, device: torch.device) -> LatentCache:
    """Read the cache of a dataset's training split, or make it once per machine.

    Quantised images are encoded at their bins' centres: the file depends on no seed. What it gives differs from
    encoding on the fly by the dequantisation noise alone, half a grey level at most, and not at all with
    ``dequantize: none`` or continuous data.

    Args:
        autoencoder: trained; moved to `device`.
        data: whose training split is encoded.
        device: where the encoder runs.

    Raises:
        ValueError: for random flips, whose mirror images have no place in the file; a damaged file; a cache that
            cannot be written.
    """
    check_cacheable(data)
    identity = _identity(autoencoder, data)
    path = _path(identity)
    ensure(path, lambda: write_tensors(path, identity, _encoded(autoencoder, data, device)))
    return LatentCache(**read_tensors(path, identity, "the cached latents"))


def check_cacheable(data: FlowDataModule) -> None:
    """Refuse data whose latents differ from visit to visit.

    Raises:
        ValueError: for random flips.
    """
    if data.random_flip:
        raise ValueError(
            "cached latents know the images as they are, but data.random_flip is true: turn one of them off"
        )


def _identity(autoencoder: Autoencoder, data: FlowDataModule) -> dict[str, Any]:
    network = autoencoder.network
    return {
        **data.spec.identity,
        "num_samples": len(data.split("train")),
        "autoencoder": autoencoder.checksum(),
        "network": type(network).__qualname__,
        "latent_shape": list(network.latent_shape),
    }


def _path(identity: dict[str, Any]) -> Path:
    parts = (identity[key] for key in ("dataset", "version", "num_samples", "autoencoder"))
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(map(str, (*parts, identity_key(identity, 8)))))
    return cached("latents", f"{name}.pt")


@torch.no_grad()
def _encoded(autoencoder: Autoencoder, data: FlowDataModule, device: torch.device) -> dict[str, Tensor]:
    network = autoencoder.to(device).network
    values = data.split("train").values
    shape = (len(values), *network.latent_shape)
    mean, log_variance = torch.empty(shape), torch.empty(shape)
    with autocast_off(device):
        for start in range(0, len(values), ENCODING_BATCH):
            rows = slice(start, start + ENCODING_BATCH)
            mean[rows], log_variance[rows] = network.encode(_model_values(data.spec, values[rows]).to(device))
    second_moment = (mean.double().square() + log_variance.double().exp()).mean(dim=(0, 2, 3))
    channel_mean = mean.double().mean(dim=(0, 2, 3))
    return {
        "mean": mean,
        "log_variance": log_variance,
        "scale": autoencoder.latent_std.detach().cpu(),
        "channel_mean": channel_mean.float(),
        "channel_std": (second_moment - channel_mean.square()).sqrt().float(),
    }


def _model_values(spec: DataSpec, values: Tensor) -> Tensor:
    return values if spec.levels is None else spec.to_model(values)
