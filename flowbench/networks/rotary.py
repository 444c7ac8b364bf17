"""Rotary position embedding for sequences and for image grids.

References:
    Su et al. (2021), RoFormer, arXiv:2104.09864; the axial 2-D form: Heo et al. (2024), Rotary Position
    Embedding for Vision Transformer, arXiv:2403.13298.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

__all__ = ["RotaryTable", "follow_weights", "grid_positions", "rotary_table", "rotate"]


class RotaryTable(nn.Module):
    """The rotary table of a sequence or a grid, as a buffer that no checkpoint holds.

    Whenever its memory is new it is computed again: in the precision of its dtype after a change of dtype, and where a
    network built on the meta device gets memory (``to_empty``), which no checkpoint would fill.

    Args:
        num_tokens: positions of the sequence.
        head_dim: channels E of one head, as in :func:`rotary_table`.
        grid: (rows, columns) for 2-D positions; None: 1-D.
        extent: as in :func:`grid_positions`.
        first: leave out the positions before this one.

    Attributes:
        table: cosines and sines, shape (2, num_tokens - first, E / 2).
    """

    table: Tensor

    def __init__(
        self,
        num_tokens: int,
        head_dim: int,
        grid: tuple[int, int] | None = None,
        extent: float | None = None,
        first: int = 0,
    ) -> None:
        super().__init__()
        self.num_tokens, self.head_dim, self.grid, self.extent, self.first = num_tokens, head_dim, grid, extent, first
        self.register_buffer("table", torch.empty(2, num_tokens - first, head_dim // 2), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Compute the table in float64 and write it to where it lies."""
        with torch.device("cpu"):
            grid = self.grid
            positions = torch.arange(self.num_tokens)[:, None] if grid is None else grid_positions(*grid, self.extent)
            table = rotary_table(positions, self.head_dim)[:, self.first :]
        self.table.copy_(table)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.table
        super()._apply(fn, recurse)
        if self.table is not before:
            self.reset_parameters()
        return self


def follow_weights(network: Any, incompatible_keys: object = None) -> None:
    """Give a network's ``rotary`` table memory beside its ``embed`` layer's.

    A hook for the end of ``load_state_dict``, which with ``assign=True`` takes a network off the meta device without
    :meth:`torch.nn.Module.to_empty`.
    """
    rotary, weight = network.rotary, network.embed.weight
    if rotary is not None and rotary.table.is_meta and not weight.is_meta:
        rotary.to_empty(device=weight.device)


def grid_positions(height: int, width: int, extent: float | None = None) -> Tensor:
    """Row and column of every cell of a grid in raster order, float64, shape (height * width, 2).

    Args:
        height: rows of the grid.
        width: columns of the grid.
        extent: side length that a square grid shall span whatever its number of cells: positions are multiplied
            by ``extent / sqrt(height * width)``, so that grids of other resolutions and aspect ratios stay within
            the angles seen in training (STARFlow, arXiv:2506.06276). None: one unit per cell.
    """
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions = torch.stack([rows.flatten(), columns.flatten()], dim=-1).double()
    return positions if extent is None else positions * (extent / math.sqrt(height * width))


def rotary_table(positions: Tensor, head_dim: int, *, base: float = 10_000.0) -> Tensor:
    """Cosines and sines of the rotation at every position.

    The channel pairs are shared out evenly among the axes; within an axis of P pairs, pair p turns by
    ``position * base ** (-p / P)``.

    Args:
        positions: coordinates, any scale, shape (S, A) for A axes.
        head_dim: channels of one head, a multiple of 2 * A.
        base: ratio between the fastest and (nearly) the slowest frequency.

    Returns:
        float64 table of shape (2, S, head_dim / 2): cosines, then sines. Angles are taken in float64, so a
        large position costs no precision whatever the dtype of the network.

    Raises:
        ValueError: if head_dim cannot be shared out among the axes.
    """
    num_axes = positions.shape[-1]
    if head_dim % (2 * num_axes):
        raise ValueError(
            f"head_dim must be a multiple of {2 * num_axes} for {num_axes}-D rotary positions, got {head_dim}"
        )
    pairs = head_dim // (2 * num_axes)
    frequencies = base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = (positions.double()[..., None] * frequencies).flatten(1)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn channel pairs (p, p + E/2) of the heads by the angles of a table.

    Args:
        x: queries or keys, shape (..., S, E).
        table: cosines and sines from :func:`rotary_table`, shape (2, S, E / 2).

    Returns:
        The rotated tensor in the dtype of ``x``; the products are taken in the wider of both dtypes.
    """
    cosine, sine = table
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1).to(x.dtype)
