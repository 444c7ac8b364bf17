"""Feature extractors: what turns uint8 images, or points, into the vectors that the metrics compare."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from flowbench.core.autocast import autocast_off
from flowbench.core.checks import check_count
from flowbench.metrics.classifier import DigitsCNN, weights_checksum

__all__ = [
    "ClassifierFeatures",
    "FeatureExtractor",
    "IdentityFeatures",
    "NormFeatures",
    "as_rgb",
    "exact_inference",
    "extract",
    "fold_normalisations",
    "in_batches",
]


@runtime_checkable
class FeatureExtractor(Protocol):
    """A fixed map from samples to features. Any object with these five members serves.

    Attributes:
        name: what a metric's row shows, e.g. ``digits-cnn`` in ``fd[digits-cnn]``.
        dimension: D, the width of a feature vector.
        checksum: SHA-256 (hex) of the weights and of everything else that changes the features.
        protocol: what protocol strings show: network, resize, and precision where it is not float32.

    Example:
        >>> class Brightness:
        ...     name, dimension, checksum, protocol = "brightness", 1, "0" * 64, "mean of pixels"
        ...     def __call__(self, images):
        ...         return images.float().flatten(1).mean(dim=1, keepdim=True)
        >>> extract(Brightness(), torch.full((2, 3, 8, 8), 127, dtype=torch.uint8))
        tensor([[127.],
                [127.]])
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

    Attributes:
        test_accuracy: share of test images that the classifier recognises, or None where it was not measured.

    Example:
        >>> features = ClassifierFeatures(DigitsCNN((1, 8, 8), num_classes=10))
        >>> features.name, features.dimension
        ('digits-cnn', 64)
        >>> images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
        >>> features(images).shape, features.classify(features(images)).shape
        (torch.Size([3, 64]), torch.Size([3]))
    """

    def __init__(self, model: DigitsCNN, name: str = "digits-cnn") -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = self.protocol = name
        self.dimension = model.dimension
        self.checksum = weights_checksum(model)
        self.test_accuracy = model.test_accuracy

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, dimension) of uint8 images (N, C, H, W), float32 on the model's device."""
        device = self.model.head.weight.device
        with exact_inference(device):
            return self.model.features(images.to(device)).float()

    def classify(self, features: Tensor) -> Tensor:
        """The most likely class of each sample, int64 (N,), from its features (N, dimension), on the CPU."""
        device = self.model.head.weight.device
        with exact_inference(device):
            return self.model.logits(features.to(device)).argmax(dim=1).cpu()


class IdentityFeatures:
    """Raw coordinates: for vectors and 2-D points (or pixels, flattened).

    Args:
        dimension: number of coordinates of a sample, >= 1.
        name: shown in rows.

    Example:
        >>> features = IdentityFeatures(dimension=2)
        >>> features(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[1., 2.],
                [3., 4.]])
    """

    def __init__(self, dimension: int, name: str = "identity") -> None:
        check_count("dimension", dimension)
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


class NormFeatures:
    """The root mean square of each sample in model space: its norm over the square root of its dimension.

    A single number, so that the norms of many images can be kept where their pixels cannot. Pictures are taken from
    0..255 to [-1, 1]; a mean grey has norm 0.

    Args:
        name: shown in rows.
    """

    dimension = 1

    def __init__(self, name: str = "norm") -> None:
        self.name = self.protocol = name
        self.checksum = hashlib.sha256(b"norm-root-mean-square").hexdigest()

    def __call__(self, images: Tensor) -> Tensor:
        """Root mean squares (N, 1) of uint8 images (N, C, H, W) or points (N, *D), summed in float64."""
        x = images.detach().double().flatten(1)
        if images.dtype == torch.uint8:
            x = x / 127.5 - 1
        return x.square().mean(dim=1, keepdim=True).sqrt().float()


def as_rgb(images: Tensor) -> Tensor:
    """Check pictures and replicate grey ones to three channels, as networks trained on colour pictures want.

    Args:
        images: uint8 (N, 1 or 3, H, W) in 0..255.

    Returns:
        uint8 (N, 3, H, W); grey pictures are a view.

    Raises:
        ValueError: another dtype, dimension or number of channels.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 of shape (N, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}")
    return images.expand(-1, 3, -1, -1)


@contextmanager
def exact_inference(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, and convolutions in true float32, whatever the caller trains with.

    Metrics are compared across precisions of training, so the caller's settings must not reach a feature network.
    (On a GPU torch lets convolutions use TF32 by default.)
    """
    convolution = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolution.fp32_precision
    convolution.fp32_precision = "ieee"
    try:
        with torch.no_grad(), autocast_off(device):
            yield
    finally:
        convolution.fp32_precision = before


def in_batches(network: Callable[[Tensor], Tensor], images: Tensor, device: torch.device, cpu_batch: int) -> Tensor:
    """Outputs of a network that takes RGB pictures, exact and without gradients.

    Args:
        network: maps uint8 (B, 3, H, W) on `device` to (B, F).
        images: uint8 (N, 1 or 3, H, W); grey ones are replicated.
        device: where the network runs.
        cpu_batch: pictures at a time on a CPU, so that activations stay in its caches; a GPU takes all at once.

    Raises:
        ValueError: images of another dtype or shape.
    """
    pictures = as_rgb(images)
    size = cpu_batch if device.type == "cpu" else max(len(pictures), 1)
    with exact_inference(device):
        return torch.cat([network(part.to(device)) for part in pictures.split(size)])


def fold_normalisations(network: nn.Module) -> nn.Module:
    """Prepare a convolutional network for inference: what it computes changes by rounding only.

    Every submodule with a convolution ``conv`` followed by a normalisation ``bn`` gets the second folded into the
    first, and weights are laid out channels last, which halves the time of a CPU.

    Args:
        network: changed in place.

    Returns:
        The network, in evaluation mode, its parameters without gradient.
    """
    network.eval().requires_grad_(False)
    for block in network.modules():
        convolution, normalisation = getattr(block, "conv", None), getattr(block, "bn", None)
        if isinstance(convolution, nn.Conv2d) and isinstance(normalisation, nn.BatchNorm2d):
            block.add_module("conv", fuse_conv_bn_eval(convolution, normalisation))
            block.add_module("bn", nn.Identity())
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def extract(extractor: FeatureExtractor, images: Tensor, batch_size: int = 512) -> Tensor:
    """Features of many samples, batch by batch, on the CPU.

    Args:
        extractor: the feature extractor.
        images: samples as the extractor takes them, N first.
        batch_size: samples at a time, >= 1.

    Returns:
        float32 (N, dimension) on the CPU.

    Raises:
        ValueError: no samples, a batch size below 1, or an extractor whose output is not (N, dimension).
    """
    check_count("batch_size", batch_size)
    if not len(images):
        raise ValueError("extract needs samples, got none: draw some first")
    features = torch.cat([extractor(part).float().cpu() for part in images.split(batch_size)])
    if features.shape != (len(images), extractor.dimension):
        raise ValueError(
            f"extractor {extractor.name} gave shape {tuple(features.shape)}, promised ({len(images)}, "
            f"{extractor.dimension})"
        )
    return features
