"""Points of a flow as tokens, and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flowbench.flows import patchify, unpatchify

__all__ = ["TokenLayout"]


@dataclass(frozen=True)
class TokenLayout:
    """Images are cut into patches, a token each; points of R^d are d tokens of one number.

    Attributes:
        shape: of one point.
        patch_size: side of a patch, which divides the height and width of images; 1 for points.

    Raises:
        ValueError: for points with patches.

    Example:
        >>> layout = TokenLayout((1, 4, 4), patch_size=2)
        >>> layout.num_tokens, layout.token_dim, layout.grid
        (4, 4, (2, 2))
        >>> x = torch.arange(16.0).view(1, 1, 4, 4)
        >>> torch.equal(layout.points(layout.tokens(x)), x)
        True
    """

    shape: tuple[int, ...]
    patch_size: int = 1

    def __post_init__(self) -> None:
        if len(self.shape) == 1 and self.patch_size != 1:
            raise ValueError(f"points have no patches: set patch_size=1, got {self.patch_size}")

    @cached_property
    def _sizes(self) -> tuple[int, int]:
        # Of no images, and on the meta device too: only the shape counts.
        return tuple(self.tokens(torch.zeros(0, *self.shape)).shape[1:])  # type: ignore[return-value]

    @property
    def num_tokens(self) -> int:
        """Tokens N of a point."""
        return self._sizes[0]

    @property
    def token_dim(self) -> int:
        """Numbers D of a token."""
        return self._sizes[1]

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the tokens of an image; None for points of R^d."""
        if len(self.shape) == 1:
            return None
        rows, columns = (size // self.patch_size for size in self.shape[1:])
        return rows, columns

    def tokens(self, x: Tensor) -> Tensor:
        """Points (B, *shape) to tokens (B, N, D)."""
        return x.unsqueeze(-1) if x.ndim == 2 else patchify(x, self.patch_size)

    def points(self, x_BND: Tensor) -> Tensor:
        """Tokens (B, N, D) to points (B, *shape)."""
        if len(self.shape) == 1:
            return x_BND.squeeze(-1)
        channels, height, width = self.shape
        return unpatchify(x_BND, self.patch_size, (channels, height, width))
