"""Exact minimum-cost assignment: shortest augmenting paths, first on few points, then on twice as many, up to all.

Dual potentials that are optimal for half of the rows and columns are nearly so for all of them, and searches that
start near the optimum are short. The matched pairs of the half stay tight, so only the other half's rows are searched
for at the next size. Potentials stay feasible, so the last matching is optimal whatever the order of the points; the
order only decides the time, which is least where both halves are alike, as they are in a batch.

The searches, and the bids before them, are those of Jonker and Volgenant (1987, doi 10.1007/BF02278710).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowbench.core.machine_code import numba_njit

__all__ = ["assign"]

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

_SMALLEST = 32  # rows of the first problem at most; half or twice as many take as long
_MAX_BIDS = 4  # rows in a chain that outbid one another; longer chains find less than they cost


class _Dual(NamedTuple):
    """A matching of some rows and columns, and potentials with ``cost >= rows[:, None] + columns``, tight on it.

    Attributes:
        rows: potentials of the rows, shape (N,).
        columns: potentials of the columns, shape (N,).
        row_of: row of every column, -1 for none, shape (N,).
        column_of: column of every row, -1 for none, shape (N,).
    """

    rows: Floats
    columns: Floats
    row_of: Indices
    column_of: Indices


class _Search(NamedTuple):
    """Room for a shortest path in N rows and columns.

    Attributes:
        tree: the columns' distances and their minima, see :func:`_nearest`.
        previous: the row from which each column was reached last, shape (N,).
        potential: that of the columns, -inf where a distance is final, shape (N,).
        done: columns whose distance is final, in that order, shape (N,).
        final: these distances, shape (N,).
    """

    tree: Floats
    previous: Indices
    potential: Floats
    done: Indices
    final: Floats


def assign(cost: Tensor) -> Tensor:
    """The permutation of the rows that costs least, exactly.

    Args:
        cost: costs on the CPU, shape (N, N), finite; computed with in float64.

    Returns:
        int64 row indices, shape (N,): column j is served by row ``index[j]``. A deterministic function of the
        costs.

    Raises:
        ValueError: if the costs are not a finite square matrix.
    """
    if cost.ndim != 2 or len(cost) != cost.shape[1] or not cost.sum().isfinite():
        raise ValueError(f"an assignment needs a finite square matrix of costs, got shape {tuple(cost.shape)}")
    return torch.from_numpy(_solve(cost.detach().double().contiguous().numpy()))


@numba_njit
def _solve(cost: Floats) -> Indices:
    """The optimal row of every column."""
    num = len(cost)
    dual = _Dual(np.empty(num), np.full(num, np.inf), np.full(num, -1), np.full(num, -1))
    size = num
    while size > _SMALLEST:
        size = (size + 1) // 2
    for i in range(size):
        _lower(dual.columns[:size], cost[i, :size], 0.0)
    _match_rows(cost, dual, size)
    while size < num:
        half, size = size, min(2 * size, num)
        for i in range(half):
            _lower(dual.columns[half:size], cost[i, half:size], dual.rows[i])
        _match_rows(cost, dual, size)
    return dual.row_of


@numba_njit
def _lower(columns: Floats, costs: Floats, row: float) -> None:
    """Lower potentials of columns until they are feasible beside a row's."""
    for j in range(columns.size):
        columns[j] = min(columns[j], costs[j] - row)


@numba_njit
def _match_rows(cost: Floats, dual: _Dual, size: int) -> None:
    """Match those of the first `size` rows that are free."""
    leaves = 2
    while leaves < size:
        leaves *= 2
    tree = np.full(2 * leaves, np.inf)
    for i in range(size):
        if dual.column_of[i] < 0:
            _bid(cost, dual, tree, size, i)
    indices, floats = np.empty((2, size), np.int64), np.empty(size)
    search = _Search(tree, indices[0], dual.columns[:size].copy(), indices[1], floats)
    for i in range(size):
        if dual.column_of[i] < 0:
            _augment(cost, dual, search, i)


@numba_njit
def _bid(cost: Floats, dual: _Dual, tree: Floats, size: int, row: int) -> None:
    """Give a free row its nearest column, at a price that makes it no nearer than the second; then the outbid row.

    Where two columns are nearest and the first is taken the chain ends: searches settle ties.
    """
    distance = tree[tree.size // 2 :][:size]
    for _ in range(_MAX_BIDS):
        for j in range(size):
            distance[j] = cost[row, j] - dual.columns[j]
        column = _nearest(tree)
        least, second, former = tree[1], _second(tree, column), dual.row_of[column]
        dual.rows[row] = second
        dual.columns[column] -= second - least
        if former >= 0 and second <= least:
            return
        dual.row_of[column], dual.column_of[row] = row, column
        if former < 0:
            return
        dual.column_of[former] = -1
        row = former


@numba_njit
def _second(tree: Floats, leaf: int) -> float:
    """The least of the other leaves."""
    least, width = np.inf, tree.size // 4
    while width > 0:
        sibling = leaf - width if leaf >= width else leaf + width
        least = min(least, tree[2 * width + sibling])
        leaf %= width
        width //= 2
    return least


@numba_njit
def _augment(cost: Floats, dual: _Dual, search: _Search, start: int) -> None:
    """Match a free row, and matched ones anew, along the shortest path to a free column in reduced costs."""
    size = search.final.size
    distance = search.tree[search.tree.size // 2 :][:size]
    distance[:] = np.inf
    row, reached, num_done, num_ties = start, 0.0, 0, 0
    while True:
        _relax(distance, search, cost[row, :size], row, reached - dual.rows[row])
        column = _nearest(search.tree)
        num_ties = num_ties + 1 if distance[column] <= reached else 0
        reached = distance[column]
        if num_ties % 8 == 7:  # many equal costs; a look at each tie would cost more than it saves
            column = _free(distance, dual.row_of, column)
        if dual.row_of[column] < 0:
            break
        search.potential[column], distance[column] = -np.inf, np.inf
        search.done[num_done], search.final[num_done] = column, reached
        num_done += 1
        row = dual.row_of[column]
    _raise_potentials(dual, search, start, reached, num_done)
    row = -1
    while row != start:
        row = search.previous[column]
        dual.row_of[column] = row
        dual.column_of[row], column = column, dual.column_of[row]


@numba_njit
def _raise_potentials(dual: _Dual, search: _Search, start: int, reached: float, num_done: int) -> None:
    """Make the pairs on all shortest paths tight."""
    dual.rows[start] += reached
    for k in range(num_done):
        column, slack = search.done[k], reached - search.final[k]
        dual.columns[column] -= slack
        search.potential[column] = dual.columns[column]
        dual.rows[dual.row_of[column]] += slack


@numba_njit
def _relax(distance: Floats, search: _Search, costs: Floats, row: int, offset: float) -> None:
    """Shorten distances by what they are through a row."""
    for j in range(distance.size):
        through = costs[j] - search.potential[j] + offset
        nearer = through < distance[j]
        distance[j] = through if nearer else distance[j]
        search.previous[j] = row if nearer else search.previous[j]


@numba_njit
def _nearest(tree: Floats) -> int:
    """An index of the least leaf.

    Node k in a level of h nodes is ``tree[h + k]`` and holds the lesser of nodes k and k + h of the next level, so
    that a level is one vectorised pass over the two halves of the next one; the index is found on the way back.
    """
    width = tree.size // 4
    while width > 0:
        for k in range(width):
            tree[width + k] = min(tree[2 * width + k], tree[3 * width + k])
        width //= 2
    node, width = 0, 1
    while 4 * width <= tree.size:
        if tree[2 * width + node] != tree[1]:
            node += width
        width *= 2
    return node


@numba_njit
def _free(distance: Floats, row_of: Indices, column: int) -> int:
    """A free column as near as `column`, or else that one."""
    for j in range(distance.size):
        if row_of[j] < 0 and distance[j] == distance[column]:
            return j
    return column
