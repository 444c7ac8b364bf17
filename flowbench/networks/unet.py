"""Convolutional U-Net for images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from flowbench.core.checks import check_counts, check_number
from flowbench.networks.blocks import Resample, ResidualBlock, SpatialAttention, conv3x3, group_norm, zeroed
from flowbench.networks.sizes import LARGEST_SIDE, check_layers, check_width
from flowbench.networks.velocity import VelocityNetwork

__all__ = ["UNet"]


class UNetStage(nn.Module):
    """A residual block, then attention when ``num_heads`` is given.

    In the decoder, a stage with ``takes_skip`` is fed the matching encoder output as extra input channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_width: int,
        dropout: float,
        num_heads: int | None = None,
        resample: Resample = None,
        takes_skip: bool = False,
    ) -> None:
        super().__init__()
        self.block = ResidualBlock(
            in_channels, out_channels, embedding_width=embedding_width, dropout=dropout, resample=resample
        )
        self.attention = nn.Identity() if num_heads is None else SpatialAttention(out_channels, num_heads)
        self.takes_skip = takes_skip

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Feature map (B, C, H, W) and conditioning (B, embedding_width) -> feature map."""
        hidden: Tensor = self.attention(self.block(x, embedding))
        return hidden


Level = tuple[int, int | None]  # channels of a level and its attention heads (None: no attention)


def _encoder(
    stage: Callable[..., UNetStage], base: int, levels: list[Level], num_res_blocks: int
) -> tuple[nn.ModuleList, list[int]]:
    """The stages from high to low resolution, and the channels of every skip connection, the stem's first."""
    stages, skip_channels = nn.ModuleList(), [base]
    for index, (channels, heads) in enumerate(levels):
        for _ in range(num_res_blocks):
            stages.append(stage(skip_channels[-1], channels, num_heads=heads))
            skip_channels.append(channels)
        if index < len(levels) - 1:
            stages.append(stage(channels, channels, resample="down"))
            skip_channels.append(channels)
    return stages, skip_channels


def _decoder(
    stage: Callable[..., UNetStage], skip_channels: list[int], levels: list[Level], num_res_blocks: int
) -> nn.ModuleList:
    """The stages from low to high resolution; they take the skip connections last in, first out."""
    stages, skips, current = nn.ModuleList(), list(skip_channels), levels[-1][0]
    for index, (channels, heads) in reversed(list(enumerate(levels))):
        for _ in range(num_res_blocks + 1):
            stages.append(stage(current + skips.pop(), channels, num_heads=heads, takes_skip=True))
            current = channels
        if index > 0:
            stages.append(stage(channels, channels, resample="up"))
    return stages


class UNet(VelocityNetwork):
    """U-Net of residual blocks conditioned by scale and shift, with attention at chosen resolutions.

    Level i works at height H / 2**i with ``channels * channel_multipliers[i]`` channels. The middle, at the
    lowest resolution, always attends. The output convolution starts at zero, hence the velocity does.

    Args:
        shape: (C, H, W); H and W are divisible by 2**(levels - 1).
        num_classes: number of labels, 1 to 1e6, or None for an unconditional network.
        channels: base channels, 1 to 65,536.
        channel_multipliers: one per level, each 1 to 64.
        num_res_blocks: residual blocks per level of the encoder, 1 to 1,000; the decoder has one more.
        attention_resolutions: heights H / 2**i of the levels that attend after every residual block.
        num_heads: heads of every attention, >= 1; divides the channels there.
        dropout: dropout rate in [0, 1).
        condition_channels: channels of a condition on the grid of x, which widen the first layer alone; 0: none.
        second_time: take the end of a jump beside its start; see :meth:`VelocityNetwork.forward`.

    Raises:
        ValueError: a size does not fit the shape, or an attention resolution is not a level's height.

    References:
        Dhariwal and Nichol (2021), "Diffusion Models Beat GANs on Image Synthesis", arXiv:2105.05233;
        Ho et al. (2020), "Denoising Diffusion Probabilistic Models", arXiv:2006.11239, appendix B.

    Example:
        >>> network = UNet((1, 8, 8), num_classes=None, channels=8, num_res_blocks=1, num_heads=2)
        >>> x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> velocity = network(x, t=torch.tensor(0.5))
        >>> velocity.shape, bool((velocity == 0).all())
        (torch.Size([3, 1, 8, 8]), True)
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int | None,
        *,
        channels: int = 64,
        channel_multipliers: Sequence[int] = (1, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (),
        num_heads: int = 4,
        dropout: float = 0.0,
        condition_channels: int = 0,
        second_time: bool = False,
    ) -> None:
        check_width("channels", channels)
        check_counts("channel_multipliers", channel_multipliers, at_most=64)
        check_layers("num_res_blocks", num_res_blocks)
        check_counts("attention_resolutions", attention_resolutions, or_empty=True, at_most=LARGEST_SIDE)
        check_number("dropout", dropout, at_least=0, below=1)
        super().__init__(
            shape,
            num_classes,
            embedding_width=4 * channels,
            condition_channels=condition_channels,
            second_time=second_time,
        )
        _check_levels(self.shape, channel_multipliers)
        heights = [self.shape[1] >> level for level in range(len(channel_multipliers))]
        missing = [height for height in attention_resolutions if height not in heights]
        if missing:
            raise ValueError(f"attention_resolutions has {missing}; the levels have heights {heights}")
        levels: list[Level] = [
            (channels * multiplier, num_heads if height in attention_resolutions else None)
            for multiplier, height in zip(channel_multipliers, heights, strict=True)
        ]
        stage = partial(UNetStage, embedding_width=4 * channels, dropout=dropout)
        lowest, highest = levels[-1][0], levels[0][0]
        self.stem = conv3x3(self.input_channels, channels)
        self.encoder, skip_channels = _encoder(stage, channels, levels, num_res_blocks)
        self.middle = nn.ModuleList([stage(lowest, lowest, num_heads=num_heads), stage(lowest, lowest)])
        self.decoder = _decoder(stage, skip_channels, levels, num_res_blocks)
        self.norm = group_norm(highest)
        self.output = zeroed(conv3x3(highest, self.shape[0]))

    def velocity(self, x: Tensor, embedding: Tensor) -> Tensor:
        """See :meth:`VelocityNetwork.velocity`."""
        return self.read_out(self.features(x, embedding))

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """The last feature map."""
        return (self.output.in_channels, *self.shape[1:])

    def features(self, x: Tensor, embedding: Tensor) -> Tensor:
        """See :meth:`VelocityNetwork.features`."""
        hidden = self.stem(x)
        skips = [hidden]
        for stage in self.encoder:
            hidden = stage(hidden, embedding)
            skips.append(hidden)
        for stage in self.middle:
            hidden = stage(hidden, embedding)
        for stage in self.decoder:
            inputs = torch.cat([hidden, skips.pop()], dim=1) if stage.takes_skip else hidden
            hidden = stage(inputs, embedding)
        return silu(self.norm(hidden))

    def read_out(self, features: Tensor) -> Tensor:
        """See :meth:`VelocityNetwork.read_out`."""
        velocity: Tensor = self.output(features)
        return velocity


def _check_levels(shape: tuple[int, ...], channel_multipliers: Sequence[int]) -> None:
    if len(shape) != 3:
        raise ValueError(f"shape is {shape}; UNet takes images (C, H, W), use MLP for vectors")
    factor = 2 ** (len(channel_multipliers) - 1)
    if shape[1] % factor or shape[2] % factor:
        raise ValueError(
            f"shape is {shape} with {len(channel_multipliers)} levels; make H and W divisible by {factor} "
            "or give fewer channel_multipliers"
        )
