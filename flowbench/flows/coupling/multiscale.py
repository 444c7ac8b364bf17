"""Nearly optimal potentials of an assignment between points in few dimensions, from coarse to fine.

Rows and columns are grouped into cells of neighbours; the assignment of the cells, found in the same way, says where
the mass goes and gives potentials. A sparse problem of the promising pairs starts from both; its potentials are nearly
those of the full problem. Schmitzer 2016, arXiv 1510.05466, refines sparse problems likewise.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import ot
from numpy.typing import NDArray
from scipy.sparse import coo_array

__all__ = ["Matrix", "Potentials", "SimplexError", "few_directions", "near_potentials", "simplex"]

Matrix = NDArray[np.float64]
Indices = NDArray[np.int64]

_CELL = 4  # points per cell
_DENSE = 300  # problems up to this size go to the dense solver
_NUM_PROBES = 16
_NUM_CANDIDATES = 16  # pairs per row and per column in the first sparse problem
_ONE_ROUND = 1200  # up to this size a second sparse problem costs more than the final search gains by it
_MAX_DIRECTIONS = 4.0


class SimplexError(RuntimeError):
    """The network simplex did not find a permutation."""


class Potentials(NamedTuple):
    """A permutation and its dual potentials: ``cost >= rows[:, None] + columns`` on the pairs that were allowed.

    Attributes:
        matched: row of every column, shape (N,).
        rows: potentials of the rows, shape (N,).
        columns: potentials of the columns, shape (N,).
    """

    matched: Indices
    rows: Matrix
    columns: Matrix


def few_directions(cost: Matrix) -> bool:
    """Whether the rows' points vary in few directions, by the participation ratio of probed costs."""
    spread = np.linalg.eigvalsh(_covariance(_probes(cost)))
    total = spread.sum()
    return bool(total > 0 and total**2 <= _MAX_DIRECTIONS * (spread**2).sum())


def simplex(cost: Matrix | coo_array) -> Potentials:
    """POT's network simplex on a dense matrix or a sparse array, whose missing pairs are forbidden.

    Raises:
        SimplexError: if the plan is no permutation.
    """
    num = cost.shape[0]
    plan, log = ot.emd(ot.unif(num), ot.unif(num), cost, numItermax=10**9, log=True, check_marginals=False)
    if isinstance(plan, np.ndarray):
        index = plan.argmax(0)
    else:
        kept = plan.data > 0.5 / num
        index = np.zeros(num, np.int64)
        index[plan.col[kept]] = plan.row[kept]
    if log["warning"] is not None or len(np.unique(index)) != num:
        raise SimplexError(f"the network simplex failed on an assignment of {num} points: {log['warning']}")
    return Potentials(index.astype(np.int64), log["u"], log["v"])


def near_potentials(cost: Matrix, rounds: int | None = None) -> Potentials:
    """A cheap permutation and nearly optimal potentials; close where :func:`few_directions` holds.

    Args:
        cost: finite costs, shape (N, N).
        rounds: sparse problems solved at the finest level, each with the pairs that the last one missed; None
            chooses by N.

    Returns:
        The optimum of the last sparse problem.
    """
    num = len(cost)
    if num <= _DENSE:
        return simplex(np.ascontiguousarray(cost))
    rounds = rounds or (1 if num <= _ONE_ROUND else 2)
    rows, columns = _cells(_probes(cost)), _cells(_probes(cost.T))
    cells = num // _CELL
    pooled: Matrix = cost[rows[: cells * _CELL : _CELL]]
    for part in range(1, _CELL):
        pooled += cost[rows[part : cells * _CELL : _CELL]]
    pooled /= _CELL
    # The pairs of a coarse level need not be optimal: one round each.
    coarse = near_potentials(pooled[:, columns[: cells * _CELL]].reshape(cells, cells, _CELL).mean(2), 1)
    pooled -= coarse.rows[:, None]
    reduced = cost - pooled.min(0)
    reduced -= reduced.min(1)[:, None]
    reduced -= reduced.min(0)
    mask = np.zeros(num * num, bool)
    mask[_smallest_pairs(reduced)] = True
    mask[_matched_cells(rows, columns, coarse.matched)] = True
    found = _sparse(cost, mask)
    for _ in range(rounds - 1):
        np.subtract(cost, found.columns, out=reduced)
        reduced -= found.rows[:, None]
        mask |= (reduced < 0).ravel()
        found = _sparse(cost, mask)
    return found


def _sparse(cost: Matrix, mask: NDArray[np.bool_]) -> Potentials:
    pairs = np.flatnonzero(mask)
    return simplex(coo_array((cost.ravel()[pairs], np.divmod(pairs, len(cost))), shape=cost.shape))


def _smallest_pairs(reduced: Matrix) -> Indices:
    """Flat indices of the smallest entry in each of several stretches of every row, and of every column."""
    num = len(reduced)
    starts = np.linspace(0, num, _NUM_CANDIDATES + 1).astype(np.int64)
    lines = np.arange(num)
    by_row = [lines * num + low + reduced[:, low:high].argmin(1) for low, high in pairwise(starts)]
    by_column = [(low + reduced[low:high].argmin(0)) * num + lines for low, high in pairwise(starts)]
    return np.concatenate(by_row + by_column)


def _matched_cells(rows: Indices, columns: Indices, index: Indices) -> Indices:
    """Flat indices of all pairs inside matched cells, and of the points left over: they hold a perfect matching."""
    num, cells = len(rows), len(index)
    grouped_rows = rows[: cells * _CELL].reshape(cells, _CELL)[index]
    grouped_columns = columns[: cells * _CELL].reshape(cells, _CELL)
    inside = grouped_rows[:, :, None] * num + grouped_columns[:, None, :]
    return np.concatenate([inside.ravel(), rows[cells * _CELL :] * num + columns[cells * _CELL :]])


def _probes(cost: Matrix) -> Matrix:
    """Costs to a few columns, centred both ways: for squared distances, linear functions of the row's point."""
    num = len(cost)
    probes = cost[:, np.arange(_NUM_PROBES) * num // _NUM_PROBES]
    probes = probes - probes.mean(1, keepdims=True)
    return probes - probes.mean(0)


def _covariance(probes: Matrix) -> Matrix:
    return probes.T @ probes


def _cells(probes: Matrix) -> Indices:
    """An order of the points in which every ``_CELL`` in a row are neighbours: strips across the main directions."""
    num = len(probes)
    plane = probes @ np.linalg.eigh(_covariance(probes))[1][:, -2:]
    strips = max(1, round((num / _CELL) ** 0.5))
    strip = np.empty(num, np.int64)
    strip[np.argsort(plane[:, 1], kind="stable")] = np.arange(num) * strips // num
    return np.lexsort((plane[:, 0], strip))
