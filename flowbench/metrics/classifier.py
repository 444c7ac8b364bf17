"""A small classifier whose penultimate layer serves as a feature space for small images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowbench.core.checks import check_count, check_counts, check_number, check_seed
from flowbench.core.places import expand
from flowbench.core.seeds import generator
from flowbench.core.storage import write_atomic

__all__ = [
    "ClassifierSettings",
    "DigitsCNN",
    "classification_accuracy",
    "classifier_settings",
    "load_classifier",
    "save_classifier",
    "train_classifier",
    "weights_checksum",
]


# Larger pictures are averaged down to this many pixels before the first convolution.
MAX_SIDE = 32


@dataclass(frozen=True)
class ClassifierSettings:
    """Architecture and training of a classifier; a part of what its features are.

    Attributes:
        version: goes into names and seeds, >= 1: raise it when these settings or the training change.
        num_steps: optimiser steps, >= 1.
        width: channels of the first convolution, 1 to 65,536.
        stages: see :class:`DigitsCNN`.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> settings = classifier_settings((1, 8, 8), num_samples=1000)
        >>> settings.options
        {'num_steps': 400, 'width': 32, 'stages': 1}
    """

    version: int
    num_steps: int
    width: int
    stages: int

    def __post_init__(self) -> None:
        check_count("version", self.version)
        check_count("num_steps", self.num_steps)
        check_count("width", self.width, at_most=2**16)
        check_count("stages", self.stages, at_most=16)

    @property
    def options(self) -> dict[str, int]:
        """Keywords for :func:`train_classifier`."""
        return {"num_steps": self.num_steps, "width": self.width, "stages": self.stages}


def classifier_settings(shape: tuple[int, ...], num_samples: int) -> ClassifierSettings:
    """Architecture and training that suit images of a size.

    On one core it takes seconds for 8 x 8 digits, a minute for 28 x 28 grey images and three for 32 x 32 colour ones.

    Args:
        shape: (C, H, W).
        num_samples: training images, >= 1; few are shown 30 times at most, in 400 steps at least.

    Raises:
        ValueError: for a number out of range.
    """
    check_counts("shape", shape, length=3, hint="(C, H, W)")
    check_count("num_samples", num_samples)
    if min(shape[1:]) < 16:
        return ClassifierSettings(version=1, num_steps=400, width=32, stages=1)
    most = max(400, 30 * num_samples // 128)
    if shape[0] == 1:
        return ClassifierSettings(version=2, num_steps=min(1200, most), width=16, stages=2)
    return ClassifierSettings(version=2, num_steps=min(1800, most), width=16, stages=3)


class DigitsCNN(nn.Module):
    """A stack of convolutions and a feature layer, for images from 4 x 4 pixels.

    Args:
        shape: (C, H, W) of the images.
        num_classes: number of classes, >= 2.
        dimension: width of the penultimate layer, the feature dimension, 1 to 65,536.
        width: channels of the first convolution, 1 to 65,536.
        stages: 1 to 16, how often the resolution is halved and the width doubled. More than one brings normalisation of
            batches, and pictures of more than 32 pixels a side are averaged down to 32.

    Attributes:
        test_accuracy: share of test images that are classified correctly, where it was measured; kept in its file.

    Raises:
        ValueError: a shape that is not (C, H, W) with sides of at least 4, or a size out of range.

    Example:
        >>> model = DigitsCNN((1, 8, 8), num_classes=10, dimension=64)
        >>> images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
        >>> model.features(images).shape, model(images).shape
        (torch.Size([3, 64]), torch.Size([3, 10]))
    """

    def __init__(
        self, shape: tuple[int, int, int], num_classes: int, *, dimension: int = 64, width: int = 32, stages: int = 1
    ) -> None:
        super().__init__()
        check_counts("shape", shape, length=3, hint="(C, H, W)")
        if min(shape[1:]) < 4:
            raise ValueError(f"shape must be (C, H, W) with H, W >= 4, got {tuple(shape)}; resize the images")
        check_count("num_classes", num_classes, at_least=2, hint="features need a labelled data set")
        check_count("dimension", dimension, at_most=2**16)
        check_count("width", width, at_most=2**16)
        check_count("stages", stages, at_most=16)
        self.shape = (int(shape[0]), int(shape[1]), int(shape[2]))
        self.num_classes = num_classes
        self.dimension = dimension
        self.width = width
        self.stages = stages
        self.test_accuracy: float | None = None
        layers = self._convolution(shape[0], width, 1)
        for stage in range(stages):
            inner = width << stage
            layers += self._convolution(inner, 2 * inner, 2) + self._convolution(2 * inner, 2 * inner, 1)
        last = nn.Linear(4 * (width << stages), dimension)
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), last)
        self.head = nn.Linear(dimension, num_classes)

    def _convolution(self, inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        normalisation = [nn.BatchNorm2d(outputs)] if self.stages > 1 else []
        return [convolution, *normalisation, nn.SiLU()]

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features.

        Args:
            images: uint8 (B, C, H, W) in 0..255.

        Returns:
            Shape (B, dimension), before the last activation (so no direction is cut off).

        Raises:
            ValueError: another dtype or shape.
        """
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.shape:
            raise ValueError(
                f"images must be uint8 of shape (B, {', '.join(map(str, self.shape))}), "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        x = images.to(self.head.weight.dtype) / 127.5 - 1
        if self.stages > 1 and max(x.shape[2:]) > MAX_SIDE:
            x = F.adaptive_avg_pool2d(x, (min(x.shape[2], MAX_SIDE), min(x.shape[3], MAX_SIDE)))
        return self.trunk(x)

    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, num_classes) of what :meth:`features` gave, (B, dimension)."""
        return self.head(F.silu(features))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of uint8 images (B, C, H, W)."""
        return self.logits(self.features(images))


def _check_labelled_images(images: Tensor, labels: Tensor, num_classes: int) -> None:
    if images.ndim != 4 or images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 of shape (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
    if labels.shape != (len(images),) or labels.is_floating_point() or not len(images):
        raise ValueError(f"labels must be integers of shape ({len(images)},), got {labels.dtype} {tuple(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"labels must lie in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}")


def train_classifier(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    seed: int,
    *,
    num_steps: int = 400,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    dimension: int = 64,
    width: int = 32,
    stages: int = 1,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> DigitsCNN:
    """Train :class:`DigitsCNN` with AdamW and a cosine schedule; the same arguments give the same weights.

    Runs on the CPU in float32 on one thread with its own generator, whatever the caller's threads, default
    dtype, autocast, global seed or gradient mode are.

    Args:
        images: uint8 (N, C, H, W) in 0..255; the training split only. May be a view of a memory map: only the
            batches become floats.
        labels: integers in 0..num_classes - 1, shape (N,).
        num_classes: number of classes, >= 2.
        seed: seed of initialisation and order, >= 0.
        num_steps: optimiser steps, >= 1.
        batch_size: samples in a step, >= 1.
        learning_rate: of the first step, in [0, 1000]; falls to 0. 0 leaves the drawn weights.
        dimension: width of the feature layer, 1 to 65,536.
        width: channels of the first convolution, 1 to 65,536.
        stages: see :class:`DigitsCNN`.
        report: called after every step with the number of steps that are done and of all.

    Returns:
        The trained module on the CPU, in evaluation mode, its parameters without gradient.

    Raises:
        ValueError: images that are not uint8 (N, C, H, W), labels that do not fit, or a number out of range.
    """
    check_count("num_classes", num_classes, at_least=2, hint="features need a labelled data set")
    check_seed("seed", seed)
    check_count("num_steps", num_steps)
    check_count("batch_size", batch_size)
    check_number("learning_rate", learning_rate, at_least=0, at_most=1000)
    _check_labelled_images(images, labels, num_classes)
    with _reproducible():
        # A clone, because tensors made in the caller's inference mode take no part in autograd.
        images, labels = images.cpu(), labels.cpu().long().clone()
        options = {"dimension": dimension, "width": width, "stages": stages}
        model = _initialised(tuple(images.shape[1:]), num_classes, seed, options)
        if stages > 1:  # a quarter faster; the smallest network keeps the rounding that its published features have
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        draw = generator(seed, "classifier", "order")
        for step in range(num_steps):
            index = torch.randint(len(images), (batch_size,), generator=draw)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(images[index]), labels[index], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
            report(step + 1, num_steps)
    return model.eval().requires_grad_(False)


def classification_accuracy(model: DigitsCNN, images: Tensor, labels: Tensor, batch_size: int = 512) -> float:
    """Share of uint8 images (N, C, H, W) that are classified as their label (N,)."""
    check_count("batch_size", batch_size)
    device = model.head.weight.device
    with torch.no_grad():
        predicted = [model(part.to(device)).argmax(dim=1).cpu() for part in images.split(batch_size)]
    return float((torch.cat(predicted) == labels.cpu()).double().mean())


def weights_checksum(model: nn.Module) -> str:
    """SHA-256 (hex) of all parameters and buffers with names, dtypes and shapes; the same on every device."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_classifier(path: str | Path, model: DigitsCNN) -> str:
    """Write weights, architecture, test accuracy and checksum to one file, atomically.

    Returns:
        The weights' SHA-256.
    """
    checksum = weights_checksum(model)
    content = {
        "shape": list(model.shape),
        "num_classes": model.num_classes,
        "dimension": model.dimension,
        "width": model.width,
        "stages": model.stages,
        "test_accuracy": model.test_accuracy,
        "sha256": checksum,
        "weights": {name: value.cpu() for name, value in model.state_dict().items()},
    }
    write_atomic(path, lambda file: torch.save(content, file))
    return checksum


def load_classifier(path: str | Path, expected_checksum: str | None = None) -> DigitsCNN:
    """Read what :func:`save_classifier` wrote, without running code from the file.

    Args:
        path: the file.
        expected_checksum: SHA-256 that the weights must have; None checks only the file against itself.

    Returns:
        The module on the CPU, in evaluation mode, its parameters without gradient.

    Raises:
        ValueError: the file is missing, damaged or not a classifier, or the checksum does not agree.
    """
    path = expand(path)
    if not path.is_file():
        raise ValueError(f"no classifier weights at {path}; train them with train_classifier")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        # Files of the first version name neither stages nor an accuracy.
        options = {"dimension": content["dimension"], "width": content["width"], "stages": content.get("stages", 1)}
        model = _empty(tuple(content["shape"]), content["num_classes"], options)
        model.load_state_dict(content["weights"])
        model.test_accuracy = content.get("test_accuracy")
        stored = content["sha256"]
    except Exception as error:  # on arbitrary bytes the unpickler raises anything: IndexError, UnicodeDecodeError, ...
        raise ValueError(
            f"cannot read classifier weights {path} ({type(error).__name__}); delete and retrain"
        ) from None
    checksum = weights_checksum(model)
    if checksum != stored or expected_checksum not in (None, checksum):
        wanted = expected_checksum or stored
        raise ValueError(f"classifier weights {path} have sha256 {checksum}, expected {wanted}; delete and retrain")
    return model.eval().requires_grad_(False)


@contextmanager
def _reproducible() -> Iterator[None]:
    """One thread, gradients on, autocast and inference mode off; the caller's settings come back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)


def _empty(shape: tuple[int, ...], num_classes: int, options: dict[str, int]) -> DigitsCNN:
    """A float32 module with undefined weights; made on meta, so the global generator is not touched."""
    channels, height, breadth = shape
    with torch.device("meta"):
        model = DigitsCNN((channels, height, breadth), num_classes, **options)
    return model.to(torch.float32).to_empty(device="cpu")


def _initialised(shape: tuple[int, ...], num_classes: int, seed: int, options: dict[str, int]) -> DigitsCNN:
    model = _empty(shape, num_classes, options)
    draw = generator(seed, "classifier", "init")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=draw)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return model
