from __future__ import annotations

import itertools

import numpy as np
import ot
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.core.seeds import generator
from flowbench.metrics import sliced_wasserstein2, wasserstein2, wasserstein2_squared
from flowbench.metrics.transport import _quantile_pieces


def normal(num, dim, *name):
    return torch.randn(num, dim, generator=generator(11, *name), dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(num=st.integers(1, 6), dim=st.integers(1, 3), seed=st.integers(0, 999))
def test_equals_the_best_of_all_permutations(num, dim, seed):
    x, y = normal(num, dim, "x", seed), normal(num, dim, "y", seed)
    best = min(float((x - y[list(p)]).square().sum(dim=1).mean()) for p in itertools.permutations(range(num)))
    assert wasserstein2_squared(x, y) == pytest.approx(best, rel=1e-9)
    assert wasserstein2(x, y) == pytest.approx(best**0.5, rel=1e-9)
    assert wasserstein2(x, y, squared=True) == pytest.approx(best, rel=1e-9)


def test_equals_assignment_for_hundreds():
    x, y = normal(300, 3, "x"), normal(300, 3, "y") + 1
    cost = ((x.numpy()[:, None] - y.numpy()[None]) ** 2).sum(-1)
    rows, columns = scipy.optimize.linear_sum_assignment(cost)
    assert wasserstein2_squared(x, y) == pytest.approx(cost[rows, columns].mean(), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 12), m=st.integers(1, 12), seed=st.integers(0, 999))
def test_one_dimension_unequal_sizes_equals_repeated_sorted_points(n, m, seed):
    x, y = normal(n, 1, "x", seed), normal(m, 1, "y", seed)
    a = np.repeat(np.sort(x.numpy().ravel()), m)
    b = np.repeat(np.sort(y.numpy().ravel()), n)
    expected = np.mean((a - b) ** 2)
    assert wasserstein2_squared(x, y) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    sliced = sliced_wasserstein2(x, y, 3, generator(0, "s"), squared=True)
    assert sliced == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_pieces_cover_the_unit_interval():
    left, right, width = _quantile_pieces(4, 6, torch.device("cpu"))
    assert float(width.sum()) == pytest.approx(1.0)
    for index, size in ((left, 4), (right, 6)):
        mass = torch.zeros(size, dtype=torch.float64).index_add_(0, index, width)
        torch.testing.assert_close(mass, torch.full((size,), 1 / size, dtype=torch.float64))


def test_duplicates_change_nothing_for_unequal_sizes():
    x, y = normal(20, 2, "x"), normal(15, 2, "y")
    assert wasserstein2(x.repeat(3, 1), y) == pytest.approx(wasserstein2(x, y), rel=1e-8)
    sliced = [sliced_wasserstein2(z, y, 20, generator(0, "s")) for z in (x, x.repeat(3, 1))]
    assert sliced[0] == pytest.approx(sliced[1], rel=1e-9)


def test_sliced_equals_pot():
    x, y = normal(80, 4, "x"), 2 * normal(110, 4, "y") + 0.5
    value = sliced_wasserstein2(x, y, 100, generator(0, "s"))
    directions = torch.randn(100, 4, generator=generator(0, "s"), dtype=torch.float64)
    directions = (directions / directions.norm(dim=1, keepdim=True)).T.numpy()
    expected = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=directions)
    assert value == pytest.approx(float(expected), rel=1e-9)


def test_metric_axioms_shift_and_permutation():
    x, y = normal(60, 3, "x"), normal(60, 3, "y")
    shift = torch.tensor([1.0, -2.0, 2.0], dtype=torch.float64)
    assert wasserstein2(x, x) == pytest.approx(0.0, abs=1e-9)
    assert wasserstein2(x, x + shift) == pytest.approx(3.0, rel=1e-9)
    assert wasserstein2(x, y) == pytest.approx(wasserstein2(y.flip(0), x), rel=1e-9)
    sliced = sliced_wasserstein2(x, x + shift, 20_000, generator(0, "s"), squared=True)
    assert sliced == pytest.approx(9 / 3, rel=0.03)  # E <theta, m>^2 = |m|^2 / D
    assert sliced_wasserstein2(x, y, 50, generator(0, "s")) <= wasserstein2(x, y)


def test_both_grow_with_noise():
    x, y, noise = normal(200, 2, "x"), normal(200, 2, "y"), normal(200, 2, "noise")
    for metric in (wasserstein2, lambda a, b: sliced_wasserstein2(a, b, 50, generator(0, "s"))):
        values = [metric(x + level * noise, y) for level in (0.0, 1.0, 2.0, 4.0)]
        assert values == sorted(values)


def test_a_plan_that_is_not_optimal_is_an_error(monkeypatch):
    monkeypatch.setattr("flowbench.metrics.transport._MAX_ITERATIONS", 1)
    with (
        pytest.warns(UserWarning, match="numItermax"),
        pytest.raises(RuntimeError, match="optimal transport"),
    ):
        wasserstein2(normal(100, 2, "x"), normal(100, 2, "y"))


def test_users_mistakes_cost_one_line():
    with pytest.raises(ValueError, match="x has 0 samples"):
        wasserstein2(torch.zeros(0, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="y has 1 of 3 rows with NaN"):
        wasserstein2(torch.zeros(3, 2), torch.tensor([[0, 0], [0, 0], [torch.nan, 0]]))
    with pytest.raises(ValueError, match="num_projections"):
        sliced_wasserstein2(torch.zeros(3, 2), torch.zeros(3, 2), 0, torch.Generator())
