"""A head that reads the average divergence of a flow from the features of its network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from flowbench.core.checks import check_counts
from flowbench.networks.blocks import zeroed
from flowbench.networks.sizes import MOST_CHANNELS

__all__ = ["DivergenceNetwork"]


class DivergenceNetwork(nn.Module):
    """An MLP with SiLU from all features of a sample to one number; it starts with zero.

    Args:
        feature_shape: shape of one sample's features.
        widths: of the hidden layers, each 1 to 65,536.

    Raises:
        ValueError: a size is out of range.

    References:
        Ai et al. (2025), F2D2, arXiv:2512.02636: two hidden layers, of 32 and 8.

    Example:
        >>> network = DivergenceNetwork((16, 4), widths=[8])
        >>> network(torch.ones(3, 16, 4))
        tensor([0., 0., 0.], grad_fn=<SqueezeBackward1>)
    """

    end_layers: ClassVar[frozenset[str]] = frozenset({"layers"})

    def __init__(self, feature_shape: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        check_counts("feature_shape", feature_shape)
        check_counts("widths", widths, at_most=MOST_CHANNELS)
        sizes = [math.prod(feature_shape), *widths]
        hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, zeroed(nn.Linear(sizes[-1], 1)))

    def forward(self, features: Tensor) -> Tensor:
        """One number a sample, shape (B,), of features (B, *feature_shape)."""
        found: Tensor = self.layers(features.flatten(1))
        return found.squeeze(1)
