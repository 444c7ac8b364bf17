"""Exact assignment against brute force, SciPy and POT; duals, sizes and inputs that make solvers stumble."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from flowbench.data import get_density
from flowbench.flows.coupling import assignment
from flowbench.flows.coupling.assignment import assign
from flowbench.flows.coupling.base import squared_distances
from flowbench.flows.coupling.multiscale import few_directions, near_potentials
from flowbench.seeds import generator

# One size per route: search alone, Sinkhorn potentials, network simplex, coarse to fine.
SIZES = [30, 100, 250, 500]


def clouds(num: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and data: eight Gaussians in two dimensions, else points near a subspace of at most 32."""
    rng = generator(seed, "clouds")
    x0 = torch.randn(num, dim, generator=rng)
    if dim == 2:
        return x0, get_density("eight_gaussians").sample_labelled(num, rng)[0]
    latent = min(dim, 32)
    mixing = torch.randn(latent, dim, generator=rng) / latent**0.5
    return x0, 0.5 * torch.randn(num, latent, generator=rng) @ mixing


def mean_cost(cost: torch.Tensor, index: torch.Tensor) -> float:
    assert sorted(index.tolist()) == list(range(len(cost)))
    return cost[index, torch.arange(len(cost))].mean().item()


def scipy_cost(cost: torch.Tensor) -> float:
    return cost.numpy()[linear_sum_assignment(cost.numpy())].mean()


@given(seed=st.integers(0, 999), num=st.integers(1, 7), integers=st.booleans())
@settings(max_examples=40, deadline=None)
def test_small_problems_match_brute_force(seed: int, num: int, integers: bool):
    cost = torch.randn(num, num, generator=generator(seed), dtype=torch.float64)
    cost = (3 * cost).round() if integers else cost
    best = min(cost[list(p), range(num)].mean().item() for p in permutations(range(num)))
    assert mean_cost(cost, assign(cost)) == pytest.approx(best, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("num", SIZES)
@pytest.mark.parametrize("dim", [1, 2, 3, 64])
def test_every_route_is_exact(num: int, dim: int):
    cost = squared_distances(*clouds(num, dim))
    assert mean_cost(cost, assign(cost)) == pytest.approx(scipy_cost(cost), rel=1e-12)


@pytest.mark.parametrize("num", [100, 250, 500])
def test_every_route_is_exact_whatever_the_costs(num: int, monkeypatch: pytest.MonkeyPatch):
    """The potentials only decide the time: with few directions assumed or denied, on costs of no geometry."""
    rng = generator(num)
    ties = torch.randint(0, 5, (num, num), generator=rng).double()
    heavy = torch.randn(num, num, generator=rng, dtype=torch.float64).exp() ** 3
    shifted = 1e6 * torch.randn(num, 1, generator=rng, dtype=torch.float64) + heavy
    for cost in (ties, heavy, shifted, -heavy):
        best = scipy_cost(cost)
        for few in (True, False):
            monkeypatch.setattr(assignment, "few_directions", lambda _, few=few: few)
            assert mean_cost(cost, assign(cost)) == pytest.approx(best, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("num", [1, 2, 30, 100, 250, 500])
def test_equal_points_and_repeated_points(num: int):
    assert mean_cost(torch.zeros(num, num, dtype=torch.float64), assign(torch.zeros(num, num).double())) == 0
    repeated = torch.arange(num).remainder(3).double()[:, None].expand(-1, 2)
    shuffled = repeated[torch.randperm(num, generator=generator(0))]
    cost = squared_distances(repeated, shuffled)
    assert mean_cost(cost, assign(cost)) == 0


@pytest.mark.parametrize("num", SIZES)
def test_the_answer_is_a_function_of_the_costs(num: int):
    for cost in (squared_distances(*clouds(num, 2)), torch.randint(0, 3, (num, num), generator=generator(1)).double()):
        first, kept = assign(cost), cost.clone()
        assert torch.equal(first, assign(cost.clone()))
        assert torch.equal(first, assign(cost.T.contiguous().T))
        assert torch.equal(cost, kept)


@pytest.mark.parametrize("num", [250, 500])
def test_a_failing_simplex_changes_no_cost(num: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ot, "emd", lambda a, b, cost, **_: (np.zeros(cost.shape), {"warning": "split"}))
    cost = squared_distances(*clouds(num, 2))
    assert mean_cost(cost, assign(cost)) == pytest.approx(scipy_cost(cost), rel=1e-12)


def test_directions_are_counted():
    assert few_directions(squared_distances(*clouds(200, 2)).numpy())
    assert not few_directions(squared_distances(*clouds(200, 64)).numpy())
    assert not few_directions(np.zeros((40, 40)))


def test_near_potentials_are_close_to_the_optimum():
    cost = squared_distances(*clouds(600, 2)).numpy()
    found = near_potentials(cost, 2)
    best = ot.emd2([], [], cost)
    upper = cost[found.matched, np.arange(600)].mean()
    rows = (cost - found.columns).min(1)
    lower = rows.mean() + (cost - rows[:, None]).min(0).mean()
    assert 0.995 * best < lower <= best + 1e-9
    assert best - 1e-9 <= upper < 1.005 * best


def test_bad_costs_are_refused():
    for cost in (torch.zeros(2, 3), torch.zeros(2), torch.full((2, 2), float("nan"))):
        with pytest.raises(ValueError, match="finite square matrix"):
            assign(cost.double())


@pytest.mark.slow
@pytest.mark.parametrize("num", [128, 256, 512, 1024, 2048])
@pytest.mark.parametrize("dim", [2, 64, 784, 3072])
def test_large_problems_cost_what_pot_says(num: int, dim: int):
    """Distances included: ours may multiply in float32, the reference is float64 throughout."""
    x0, x1 = clouds(num, dim)
    reference = torch.cdist(x0.double(), x1.double()).square()
    best = ot.emd2([], [], reference.numpy(), numItermax=10**8)
    assert mean_cost(reference, assign(squared_distances(x0, x1))) == pytest.approx(best, rel=1e-9)
