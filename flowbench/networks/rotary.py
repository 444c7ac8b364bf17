"""Rotary position embedding for sequences and for image grids.

References:
    Su et al. (2021), RoFormer, arXiv:2104.09864; the axial 2-D form: Heo et al. (2024), Rotary Position
    Embedding for Vision Transformer, arXiv:2403.13298.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["grid_positions", "rotary_table", "rotate"]


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
