"""Feature extractors: what turns uint8 images, or points, into the vectors that the metrics compare."""

from __future__ import annotations

import hashlib
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flowbench.metrics.classifier import DigitsCNN, weights_checksum

__all__ = ["ClassifierFeatures", "FeatureExtractor", "IdentityFeatures", "extract"]


@runtime_checkable
class FeatureExtractor(Protocol):
    """A fixed map from samples to features. Any object with these five members serves.

    Attributes:
        name: what a metric's row shows, e.g. ``digits-cnn`` in ``fd[digits-cnn]``.
        dimension: D, the width of a feature vector.
        checksum: SHA-256 (hex) of the weights and of everything else that changes the features.
        protocol: what protocol strings show: network, resize, and precision where it is not float32.
    """

    name: str
    dimension: int
    checksum: str
    protocol: str

    def __call__(self, images: Tensor) -> Tensor:
        """Features.

        Args:
            images: uint8 (N, C, H, W) in 0..255 (points: float (N, *D)).

        Returns:
            float32 (N, dimension), without gradient.
        """
        ...


class ClassifierFeatures:
    """Penultimate features of a trained :class:`DigitsCNN`.

    Not an ``nn.Module``, so a metric or LightningModule that holds it keeps the weights out of checkpoints,
    EMA and DDP. Images go to the device of the model.

    Args:
        model: the trained classifier; put into evaluation mode.
        name: shown in rows.
    """

    def __init__(self, model: DigitsCNN, name: str = "digits-cnn") -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = self.protocol = name
        self.dimension = model.dimension
        self.checksum = weights_checksum(model)

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, dimension) of uint8 images (N, C, H, W), float32 on the model's device."""
        device = self.model.head.weight.device
        # Metrics are compared across precisions of training, so autocast must not reach the feature network.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return self.model.features(images.to(device)).float()


class IdentityFeatures:
    """Raw coordinates: for vectors and 2-D points (or pixels, flattened).

    Args:
        dimension: number of coordinates of a sample.
        name: shown in rows.
    """

    def __init__(self, dimension: int, name: str = "identity") -> None:
        if dimension < 1:
            raise ValueError(f"dimension must be at least 1, got {dimension}")
        self.name = self.protocol = name
        self.dimension = dimension
        self.checksum = hashlib.sha256(f"identity-{dimension}".encode()).hexdigest()

    def __call__(self, images: Tensor) -> Tensor:
        """Samples (N, *D) flattened to float32 (N, dimension).

        Raises:
            ValueError: prod(D) is not ``dimension``.
        """
        flat = images.detach().reshape(len(images), -1) if len(images) else images.new_empty(0, self.dimension)
        if flat.shape[1] != self.dimension:
            raise ValueError(f"samples have {flat.shape[1]} coordinates, expected {self.dimension}")
        return flat.float()


def extract(extractor: FeatureExtractor, images: Tensor, batch_size: int = 512) -> Tensor:
    """Features of many samples, batch by batch, on the CPU.

    Args:
        extractor: the feature extractor.
        images: samples as the extractor takes them, N first.
        batch_size: samples at a time.

    Returns:
        float32 (N, dimension) on the CPU.

    Raises:
        ValueError: no samples, a batch size below 1, or an extractor whose output is not (N, dimension).
    """
    if not len(images) or batch_size < 1:
        raise ValueError(f"extract needs samples and batch_size >= 1, got {len(images)} and {batch_size}")
    features = torch.cat([extractor(part).float().cpu() for part in images.split(batch_size)])
    if features.shape != (len(images), extractor.dimension):
        raise ValueError(
            f"extractor {extractor.name} gave shape {tuple(features.shape)}, promised ({len(images)}, "
            f"{extractor.dimension})"
        )
    return features
