"""Building blocks shared by the image networks: self-attention and residual convolutions."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, scaled_dot_product_attention, silu

from flowbench.core.checks import check_count

__all__ = ["ResidualBlock", "SelfAttention", "SpatialAttention", "conv3x3", "group_norm", "zeroed"]


Layer = TypeVar("Layer", bound=nn.Module)


def zeroed(layer: Layer) -> Layer:
    """Set every parameter of a layer to zero, so that the branch it ends starts as zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with the most groups that divide the channels: at most 32, of at least 4 channels.

    One channel per group would be instance normalisation, which erases the mean brightness of a feature map.
    """
    groups = max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels // g >= 4))
    return nn.GroupNorm(groups, channels, eps=1e-6)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class SelfAttention(nn.Module):
    """Multi-head self-attention without mask: (B, N, width) -> (B, N, width).

    Args:
        width: token size.
        num_heads: number of heads; divides ``width``.

    Raises:
        ValueError: ``num_heads`` does not divide ``width``.

    References:
        Vaswani et al. (2017), arXiv:1706.03762, section 3.2.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        check_count("num_heads", num_heads, at_most=width, hint=f"it must divide the width {width}")
        if width % num_heads:
            raise ValueError(f"num_heads is {num_heads}; give a divisor of the width {width}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Attend over the tokens, shape (B, N, width)."""
        batch, num_tokens, width = x_BND.shape
        qkv = self.qkv(x_BND).reshape(batch, num_tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = scaled_dot_product_attention(query, key, value)
        attended: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, num_tokens, width))
        return attended


class SpatialAttention(nn.Module):
    """Residual self-attention over the cells of a feature map: (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: channels of the feature map.
        num_heads: number of heads; divides ``channels``.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.attention = SelfAttention(channels, num_heads)
        zeroed(self.attention.output)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the cells, shape (B, C, H, W)."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        return x + self.attention(tokens).transpose(1, 2).reshape(x.shape)


Resample = Literal["up", "down"] | None


def _resample(x: Tensor, resample: Resample) -> Tensor:
    if resample == "up":
        return interpolate(x, scale_factor=2.0, mode="nearest")
    return avg_pool2d(x, 2) if resample == "down" else x


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut; can be conditioned, and can halve or double height and width.

    The conditioning scales and shifts the features after the second normalisation. The second convolution
    starts at zero, so a block starts as its shortcut.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        embedding_width: size of the conditioning vector, or None for a block without conditioning.
        dropout: dropout rate in [0, 1) before the second convolution.
        resample: "up" doubles (nearest), "down" halves (average) height and width, in branch and shortcut.

    References:
        Dhariwal and Nichol (2021), "Diffusion Models Beat GANs on Image Synthesis", arXiv:2105.05233.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_width: int | None = None,
        dropout: float = 0.0,
        resample: Resample = None,
    ) -> None:
        super().__init__()
        self.resample: Resample = resample
        self.norm_in = group_norm(in_channels)
        self.conv_in = conv3x3(in_channels, out_channels)
        self.norm_out = group_norm(out_channels)
        self.modulation = None if embedding_width is None else nn.Linear(embedding_width, 2 * out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeroed(conv3x3(out_channels, out_channels))
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Transform a feature map.

        Args:
            x: feature map, shape (B, in_channels, H, W).
            embedding: conditioning vectors (B, embedding_width), for a conditioned block only.

        Returns:
            Feature map, shape (B, out_channels, H', W').
        """
        hidden = self.norm_out(self.conv_in(_resample(silu(self.norm_in(x)), self.resample)))
        if self.modulation is not None and embedding is not None:
            scale, shift = self.modulation(silu(embedding))[:, :, None, None].chunk(2, dim=1)
            hidden = torch.addcmul(shift, hidden, 1 + scale)
        update: Tensor = self.conv_out(self.dropout(silu(hidden)))
        return update + self.shortcut(_resample(x, self.resample))
