"""Distances between many points by matrix multiplication, with every decision that rounding could turn made exactly.

``|x|^2 + |y|^2 - 2 <x, y>`` is an order of magnitude faster than summing squared differences, and wrong in the last
digits: coinciding points are not at distance 0, ties break by chance. So the product only sorts pairs into "surely
nearer", "surely farther" and "too close to call" by a bound on its rounding error; pairs of the last kind, few as a
rule, are computed from differences in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Block", "Neighbours", "distance_blocks", "exact_distances"]

_EPS, _TINY = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny
_PAIR_VALUES = 1 << 23  # coordinates gathered at a time for exact distances
_DENSE = 0.02  # share of unclear pairs from which the whole block is cheaper than gathering pairs


class Neighbours(NamedTuple):
    """Neighbours of each query: distances, float64, and indices, int64, of equal shapes, N first.

    Example:
        >>> queries, references = torch.tensor([[0.9], [5.0]]), torch.tensor([[0.0], [1.0], [3.0]])
        >>> neighbours = nearest_neighbours(queries, references)
        >>> neighbours.distances.flatten(), neighbours.indices.flatten()
        (tensor([0.1000, 2.0000], dtype=torch.float64), tensor([1, 2]))
    """

    distances: Tensor
    indices: Tensor


class Block:
    """Squared distances of some rows to all points, with a bound on the error of each.

    Args:
        rows: shape (C, D), float64.
        points: shape (M, D), float64.
        squared: approximate squared distances, shape (C, M).
        row_error: shape (C,).
        point_error: shape (M,). The exactly computed squared distance of pair (i, j), itself rounded, lies within
            ``row_error[i] + point_error[j]`` of ``squared[i, j]``.
    """

    def __init__(self, rows: Tensor, points: Tensor, squared: Tensor, row_error: Tensor, point_error: Tensor) -> None:
        self.rows, self.points, self.squared = rows, points, squared
        self.row_error, self.point_error = row_error, point_error

    def within_points(self, radii: Tensor, closed: bool) -> Tensor:
        """Which rows lie in the balls around the points: bool (C, M) for radii (M,)."""
        square, slack = _square(radii)
        return self._within(square, slack + self.point_error, radii, self.row_error[:, None], closed)

    def within_rows(self, radii: Tensor, closed: bool) -> Tensor:
        """Which points lie in the balls around the rows: bool (C, M) for radii (C,)."""
        square, slack = _square(radii[:, None])
        return self._within(square, slack + self.row_error[:, None], radii[:, None], self.point_error, closed)

    def nearest(self, k: int) -> Neighbours:
        """The k nearest points of each row, nearest first, equal distances by index: both of shape (C, k)."""
        upper = (self.squared + self.point_error).kthvalue(k, dim=1).values + self.row_error
        # Written so that NaN, from coordinates whose squares overflow, counts as "too close to call".
        candidates = ~((self.squared - self.point_error) > (upper + self.row_error)[:, None])
        count = candidates.sum(dim=1)
        row, column = candidates.nonzero(as_tuple=True)
        place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        distances = self.squared.new_full((len(count), int(count.max())), torch.inf)
        columns = column.new_zeros(distances.shape)
        distances[row, place] = self._exact(row, column)
        columns[row, place] = column
        found, order = distances.sort(dim=1, stable=True)
        return Neighbours(found[:, :k], columns.gather(1, order[:, :k]))

    def _within(self, square: Tensor, error: Tensor, radii: Tensor, other_error: Tensor, closed: bool) -> Tensor:
        inside = self.squared - (square - error) < -other_error
        outside = self.squared - (square + error) > other_error
        row, column = (~(inside | outside)).nonzero(as_tuple=True)
        if len(row):
            distance, radius = self._exact(row, column), radii.expand(self.squared.shape)[row, column]
            inside[row, column] = distance <= radius if closed else distance < radius
        return inside

    def _exact(self, row: Tensor, column: Tensor) -> Tensor:
        if len(row) > _DENSE * self.squared.numel():
            return _by_differences(self.rows, self.points)[row, column]
        return exact_distances(self.rows, self.points, row, column)


def distance_blocks(x: Tensor, y: Tensor, chunk_size: int = 1024) -> Iterator[Block]:
    """Blocks of ``chunk_size`` rows of ``x`` (N, D) against all of ``y`` (M, D), both float64."""
    # Distances do not change when both are shifted; the error bound shrinks with the norms.
    centre = y.mean(dim=0)
    points = y - centre
    # Of the product: D roundings of terms bounded by |x||y|; of the norms and of the exact sum: as many. The factor
    # leaves room for the shift's own rounding and for any order of summation.
    factor = 4 * (x.shape[1] + 16) * _EPS
    underflow = factor / _EPS * _TINY
    squares = points.square().sum(dim=1)
    for rows in x.split(chunk_size):
        shifted = rows - centre
        row_squares = shifted.square().sum(dim=1)
        squared = (shifted @ points.T).mul_(-2).add_(squares).add_(row_squares[:, None])
        yield Block(rows, y, squared, factor * row_squares + underflow, factor * squares + underflow)


def exact_distances(x: Tensor, y: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Distances of the pairs (row, column) from differences, shape (P,); equal points are at exactly 0.

    Bit for bit what the full matrix of differences would hold, in either order of the two points.
    """
    size = max(1, _PAIR_VALUES // max(1, x.shape[1]))
    parts = [
        _by_differences(x[i].unsqueeze(1), y[j].unsqueeze(1)).flatten()
        for i, j in zip(row.split(size), column.split(size), strict=True)
    ]
    return torch.cat(parts) if parts else x.new_empty(0)


def _by_differences(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _square(radii: Tensor) -> tuple[Tensor, Tensor]:
    """Squared radii, and what rounding of the root and of the square may have moved them by."""
    square = radii.square()
    return square, 8 * _EPS * square + _TINY
