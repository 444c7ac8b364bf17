"""EfficientNet-lite0: a small ImageNet network, the light feature space for colour pictures on a CPU."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowbench.metrics.features import exact_inference, fold_normalisations, in_batches
from flowbench.metrics.weights import EFFICIENTNET_SHA256, efficientnet_weights

__all__ = ["EfficientNetFeatures", "EfficientNetLite0"]

# More images at a time leave the caches of a CPU.
CPU_BATCH = 32
SIDE = 224

# Repeats, kernel, stride of the first, expansion and width of every stage (Tan & Le, 2019, table 1; the lite variant
# keeps the widths, drops squeeze-and-excitation and uses ReLU6).
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

# The registry's names. In the first block, which does not expand, _bn1 still follows the depthwise convolution.
BLOCK_NAMES = {
    "_blocks": "blocks",
    "_expand_conv": "expand.conv",
    "_bn0": "expand.bn",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.bn",
    "_project_conv": "project.conv",
    "_bn2": "project.bn",
}
OUTER_NAMES = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.bn",
    "_conv_head": "top.conv",
    "_bn1": "top.bn",
    "_fc": "classifier",
}


class ConvNorm(nn.Module):
    """Convolution with TensorFlow's SAME padding, and normalisation.

    Args:
        inputs: channels in.
        outputs: channels out.
        kernel: side of the kernel in pixels.
        stride: 1 or 2; sides of the input are even where it is 2.
        groups: as in ``nn.Conv2d``.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        before = (kernel - stride) // 2
        # At stride 2 TensorFlow pads one pixel more at the end than at the beginning.
        self.pad = (before, before + 1, before, before + 1) if stride == 2 else None
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, 0 if self.pad else before, groups=groups, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        return self.bn(self.conv(x if self.pad is None else F.pad(x, self.pad)))


class MBConv(nn.Module):
    """Mobile inverted bottleneck (Sandler et al., 2018, arXiv 1801.04381) without squeeze-and-excitation.

    Args:
        inputs: channels in.
        outputs: channels out.
        kernel: side of the depthwise kernel in pixels.
        stride: of the depthwise convolution.
        expansion: hidden channels per channel in; 1 has no expanding convolution.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expand = ConvNorm(inputs, hidden) if expansion > 1 else None
        self.depthwise = ConvNorm(hidden, hidden, kernel, stride, groups=hidden)
        self.project = ConvNorm(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        hidden = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        out = self.project(F.relu6(self.depthwise(hidden), inplace=True))
        return x + out if self.residual else out


class EfficientNetLite0(nn.Module):
    """EfficientNet-lite0 (Tan & Le, 2019, arXiv 1905.11946, in its published lite variant): 4.7 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 32, 3, 2)
        blocks, width = [], 32
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for index in range(repeats):
                blocks.append(MBConv(width, outputs, kernel, stride if index == 0 else 1, expansion))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.top = ConvNorm(width, 1280)
        self.classifier = nn.Linear(1280, 1000)

    def features(self, x: Tensor) -> Tensor:
        """Pooled features (B, 1280) of normalised pictures (B, 3, 224, 224)."""
        return F.relu6(self.top(self.blocks(F.relu6(self.stem(x))))).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """ImageNet logits (B, 1000) of normalised pictures (B, 3, 224, 224)."""
        return self.classifier(self.features(x))


class EfficientNetFeatures:
    """Pooled features of EfficientNet-lite0, trained on ImageNet.

    Pictures of any size are scaled to 224 x 224 (bilinear between pixel centres, antialiased when they shrink, not
    rounded), then mapped by (x - 127) / 128.

    Args:
        path: file of weights; None searches as :func:`flowbench.metrics.weights.efficientnet_weights` does.
        device: where the network runs.

    Raises:
        ValueError: no weights, or wrong ones.
    """

    name = "efficientnet-lite0"
    protocol = "efficientnet-lite0/bilinear-224"
    dimension = 1280

    def __init__(self, path: str | Path | None = None, *, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        weights = efficientnet_weights(path)
        self.origin = weights.origin
        self.checksum = hashlib.sha256(f"{EFFICIENTNET_SHA256}|{self.protocol}".encode()).hexdigest()
        with torch.device("meta"):
            network = EfficientNetLite0()
        network.load_state_dict(_renamed(weights.state), assign=True)
        fold_normalisations(network).to(self.device)
        self._network = network

    def __call__(self, images: Tensor) -> Tensor:
        """Features of pictures.

        Args:
            images: uint8 (N, 1 or 3, H, W) in 0..255; grey ones are replicated.

        Returns:
            float32 (N, 1280) on ``device``.

        Raises:
            ValueError: another dtype or shape.
        """
        return in_batches(self._features, images, self.device, CPU_BATCH)

    def logits(self, images: Tensor) -> Tensor:
        """ImageNet logits, for an Inception-like score.

        Args:
            images: uint8 (N, 1 or 3, H, W) in 0..255.

        Returns:
            float32 (N, 1000) on ``device``.
        """
        with exact_inference(self.device):
            return self._network.classifier(self(images))

    def _features(self, pictures: Tensor) -> Tensor:
        if not len(pictures):
            return torch.empty(0, self.dimension, device=self.device)
        scaled = F.interpolate(pictures.float(), (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        normal = (scaled - 127) / 128
        return self._network.features(normal.contiguous(memory_format=torch.channels_last))


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The registry's names to ours."""
    renamed = {}
    for name, value in state.items():
        parts = BLOCK_NAMES if name.startswith("_blocks.") else OUTER_NAMES
        renamed[".".join(parts.get(part, part) for part in name.split("."))] = value
    return renamed
