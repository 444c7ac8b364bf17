"""Couplings against brute force, sorting, POT and invariances of optimal transport."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from flowbench.flows import (
    Coupling,
    IndependentCoupling,
    OptimalTransportCoupling,
    SinkhornCoupling,
    coupling,
    sinkhorn_plan,
    squared_distances,
)
from flowbench.seeds import generator

COUPLINGS = [IndependentCoupling(), OptimalTransportCoupling(), SinkhornCoupling()]
seeds = st.integers(0, 999)
exact = OptimalTransportCoupling()


def clouds(seed: int, num_source: int, num_data: int, dim: int = 2):
    rng = generator(seed, "clouds")
    draw = {"generator": rng, "dtype": torch.float64}
    return torch.randn(num_source, dim, **draw), 1 + 2 * torch.randn(num_data, dim, **draw)


def pairing_cost(x0, x1) -> float:
    return (x0 - x1).square().flatten(1).sum(1).mean().item()


@given(seed=seeds, num=st.integers(1, 7), dim=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_exact_coupling_is_the_best_permutation(seed: int, num: int, dim: int):
    x0, x1 = clouds(seed, num, num, dim)
    index = exact(x0, x1, generator(0))
    assert sorted(index.tolist()) == list(range(num))
    best = min(pairing_cost(x0[list(p)], x1) for p in permutations(range(num)))
    assert pairing_cost(x0[index], x1) == pytest.approx(best, rel=1e-12)
    assert pairing_cost(x0[index], x1) <= squared_distances(x0, x1).mean().item() + 1e-12


@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_exact_coupling_costs_what_pot_says(seed: int):
    x0, x1 = clouds(seed, 40, 40, 5)
    reference = ot.emd2([], [], cdist(x0.numpy(), x1.numpy(), "sqeuclidean"))
    assert pairing_cost(x0[exact(x0, x1, generator(0))], x1) == pytest.approx(reference, rel=1e-9)


@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_exact_coupling_sorts_the_line(seed: int):
    x0, x1 = clouds(seed, 30, 30, 1)
    index = exact(x0, x1, generator(0))
    order = x1.flatten().argsort()
    assert torch.equal(x0[index].flatten()[order], x0.flatten().sort().values)


@given(seed=seeds, offset=st.floats(-1e4, 1e4))
@settings(max_examples=20, deadline=None)
def test_exact_coupling_ignores_order_rotation_and_translation(seed: int, offset: float):
    x0, x1 = clouds(seed, 12, 12, 3)
    index = exact(x0, x1, generator(0))
    rng = generator(seed, "change")
    shuffle0, shuffle1 = (torch.randperm(12, generator=rng) for _ in range(2))
    shuffled = exact(x0[shuffle0], x1[shuffle1], generator(0))
    assert torch.equal(shuffle0[shuffled], index[shuffle1])
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=rng, dtype=torch.float64))[0]
    assert torch.equal(exact(x0 @ rotation, x1 @ rotation, generator(0)), index)
    assert torch.equal(exact(x0 + offset, x1 + offset, generator(0)), index)
    assert torch.equal(exact(x0, x1 + offset, generator(0)), index)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_equal_clouds_pair_with_themselves(dim: int):
    x = clouds(dim, 20, 20, dim)[1]
    assert torch.equal(exact(x, x, generator(0)), torch.arange(20))


@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_exact_coupling_is_cyclically_monotone_and_its_paths_never_cross(seed: int):
    x0, x1 = clouds(seed, 10, 10)
    x0 = x0[exact(x0, x1, generator(0))]
    cost = squared_distances(x0, x1)
    for i, j in combinations(range(10), 2):
        assert cost[i, i] + cost[j, j] <= cost[i, j] + cost[j, i] + 1e-9
    for i, j, k in permutations(range(10), 3):
        assert cost[i, i] + cost[j, j] + cost[k, k] <= cost[i, j] + cost[j, k] + cost[k, i] + 1e-9
    for t in torch.linspace(0, 0.99, 25):
        assert torch.pdist((1 - t) * x0 + t * x1).min() > 0


def test_unequal_batches_draw_from_the_exact_plan():
    x0, x1 = clouds(4, 9, 6)
    plan = ot.emd(ot.unif(9), ot.unif(6), squared_distances(x0, x1).numpy())
    counts = np.zeros((9, 6))
    rng = generator(0, "draws")
    for _ in range(600):
        index = exact(x0, x1, rng)
        assert index.shape == (6,)
        counts[index.numpy(), np.arange(6)] += 1
    assert not counts[plan == 0].any()
    np.testing.assert_allclose(counts / 3600, plan, atol=5 * np.sqrt(0.25 / 600) / 6)


def test_pot_that_gives_up_is_an_error(monkeypatch):
    solver = ot.emd
    monkeypatch.setattr(coupling.ot, "emd", lambda *a, **k: solver(*a, **{**k, "numItermax": 1}))
    with pytest.warns(match="numItermax"), pytest.raises(RuntimeError, match="use equal batch sizes"):
        exact(*clouds(0, 30, 20), generator(0))


@given(seed=seeds, epsilon=st.sampled_from([0.05, 0.2, 1.0, 5.0]))
@settings(max_examples=20, deadline=None)
def test_sinkhorn_is_pots_plan_with_the_right_marginals(seed: int, epsilon: float):
    x0, x1 = clouds(seed, 12, 9)
    cost = squared_distances(x0, x1)
    cost = cost / cost.mean()
    plan = sinkhorn_plan(cost, epsilon, 1e-10, 100_000)
    torch.testing.assert_close(plan.sum(0), torch.full_like(plan[0], 1 / 9))
    assert (plan.sum(1) - 1 / 12).abs().sum() < 1e-9
    reference = ot.sinkhorn(ot.unif(12), ot.unif(9), cost.numpy(), epsilon, stopThr=1e-12, numItermax=100_000)
    np.testing.assert_allclose(plan.numpy(), reference, atol=1e-8)


def test_sinkhorn_runs_from_exact_to_independent():
    x0, x1 = clouds(1, 10, 10)
    cost = squared_distances(x0, x1) / squared_distances(x0, x1).mean()
    costs = [(sinkhorn_plan(cost, e, 1e-4, 50_000) * cost).sum().item() for e in (0.01, 0.05, 0.5, 5, 1e4)]
    assert costs == sorted(costs)
    optimum = ot.emd2([], [], cost.numpy())
    # The entropy of a plan is worth at most epsilon log N.
    assert optimum - 1e-3 <= costs[0] <= optimum + 0.01 * math.log(10) + 1e-3
    assert costs[-1] == pytest.approx(cost.mean().item(), rel=1e-3)
    torch.testing.assert_close(sinkhorn_plan(7 * cost, 7 * 0.3, 1e-9), sinkhorn_plan(cost, 0.3, 1e-9))


def test_sinkhorn_matches_the_gaussian_closed_form():
    """Between N(0, a^2) and N(0, b^2) on a grid: C = (sqrt(4 a^2 b^2 + s^4) - s^2) / 2, s^2 = epsilon / 2."""
    a, b, epsilon, num = 1.0, 1.5, 1.28, 600
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(num).double() + 0.5) / num)
    quantiles = quantiles / quantiles.square().mean().sqrt()
    x0, x1 = a * quantiles[:, None], b * quantiles[:, None]
    plan = sinkhorn_plan(squared_distances(x0, x1), epsilon, 1e-8)
    covariance = (x0.T @ plan @ x1).item()
    s2 = epsilon / 2
    assert covariance == pytest.approx(((4 * a**2 * b**2 + s2**2) ** 0.5 - s2) / 2, rel=2e-3)


def test_sinkhorn_draws_follow_the_columns_of_the_plan():
    x0, x1 = clouds(2, 5, 4)
    cost = squared_distances(x0, x1)
    plan = sinkhorn_plan(cost / cost.mean(), 0.5)
    counts, rng, repeats = torch.zeros(5, 4, dtype=torch.float64), generator(0, "draws"), 2000
    for _ in range(repeats):
        counts[SinkhornCoupling(0.5)(x0, x1, rng), torch.arange(4)] += 1
    torch.testing.assert_close(counts / repeats, 4 * plan, atol=5 * (0.25 / repeats) ** 0.5, rtol=0)


def test_sinkhorn_that_does_not_converge_names_the_remedy():
    with pytest.raises(ValueError, match=r"after 3 iterations: raise epsilon \(now 0.001\) or max_iter"):
        SinkhornCoupling(0.001, 1e-6, max_iter=3)(*clouds(0, 20, 20), generator(0))


@pytest.mark.parametrize("rule", COUPLINGS, ids=repr)
@pytest.mark.parametrize("sizes", [(8, 8), (8, 5), (5, 8), (1, 1)])
def test_every_coupling_returns_repeatable_indices(rule: Coupling, sizes):
    x0 = torch.randn(sizes[0], 1, 2, 2, generator=generator(0, "x0"), requires_grad=True)
    x1 = torch.randn(sizes[1], 1, 2, 2, generator=generator(0, "x1"))
    state = torch.random.get_rng_state()
    index = rule(x0, x1, generator(7))
    assert index.dtype == torch.int64
    assert index.shape == (sizes[1],)
    assert 0 <= index.min()
    assert index.max() < sizes[0]
    assert torch.equal(index, rule(x0, x1, generator(7)))
    assert torch.equal(state, torch.random.get_rng_state())


def test_independent_coupling_leaves_equal_batches_alone():
    x0, x1 = clouds(0, 6, 6)
    rng = generator(0)
    state = rng.get_state()
    assert torch.equal(IndependentCoupling()(x0, x1, rng), torch.arange(6))
    assert torch.equal(rng.get_state(), state)
    assert exact(x0[:1], x1[:1], rng).tolist() == [0]


def test_identical_points_do_not_break_sinkhorn():
    x = torch.ones(4, 2)
    assert SinkhornCoupling()(x, x, generator(0)).shape == (4,)


def test_bad_batches_are_refused():
    x0, x1 = clouds(0, 4, 4)
    with pytest.raises(ValueError, match="points of one shape"):
        exact(x0, x1[:, :1], generator(0))
    with pytest.raises(ValueError, match="non-empty"):
        exact(x0, x1[:0], generator(0))
    with pytest.raises(ValueError, match="non-finite"):
        exact(x0, x1 * float("nan"), generator(0))
    with pytest.raises(ValueError, match="epsilon must be positive"):
        SinkhornCoupling(epsilon=0)
