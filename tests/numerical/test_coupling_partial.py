"""Partial transport against brute force and POT, and the coupling of what it leaves."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.core.seeds import generator
from flowbench.flows import OptimalTransportCoupling, squared_distances
from flowbench.flows.coupling.partial import PartialCoupling, _partial_assignment


def clouds(seed: int, num_source: int, num_data: int, dim: int = 2):
    rng = generator(seed, "clouds")
    draw = {"generator": rng, "dtype": torch.float64}
    return torch.randn(num_source, dim, **draw), 1 + 2 * torch.randn(num_data, dim, **draw)


@given(seed=st.integers(0, 999), num=st.integers(1, 5), data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_cheapest_pairs_match_brute_force(seed: int, num: int, data):
    pairs = data.draw(st.integers(1, num))
    cost = squared_distances(*clouds(seed, num, num))
    index = _partial_assignment(cost, pairs)
    kept = (index >= 0).nonzero().squeeze(1)
    assert len(kept) == pairs == len(set(index[kept].tolist()))
    best = min(
        cost[list(rows), list(columns)].sum().item()
        for columns in combinations(range(num), pairs)
        for rows in permutations(range(num), pairs)
    )
    assert cost[index[kept], kept].sum().item() == pytest.approx(best, rel=1e-12)


def test_the_cheapest_pairs_cost_what_pot_says():
    cost = squared_distances(*clouds(0, 40, 40))
    index = _partial_assignment(cost, 30)
    kept = (index >= 0).nonzero().squeeze(1)
    reference = ot.partial.partial_wasserstein2(ot.unif(40), ot.unif(40), cost.numpy(), m=0.75)
    assert cost[index[kept], kept].sum().item() / 40 == pytest.approx(float(reference), rel=1e-9)


def test_full_mass_is_optimal_transport_and_little_mass_is_mostly_chance():
    x0, x1 = clouds(1, 30, 30)
    assert torch.equal(PartialCoupling(1.0)(x0, x1, generator(0)), OptimalTransportCoupling()(x0, x1, generator(0)))
    first, second = (PartialCoupling(0.5)(x0, x1, generator(seed)) for seed in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(30))
    optimal = _partial_assignment(squared_distances(x0, x1), 15)
    kept = optimal >= 0
    assert torch.equal(first[kept], optimal[kept])
    assert torch.equal(second[kept], optimal[kept])
    assert (first != second).sum() > 5


def test_an_outlier_is_left_to_chance():
    x0, x1 = clouds(2, 20, 20)
    x1[3] += 50
    drawn = {PartialCoupling(0.8)(x0, x1, generator(seed))[3].item() for seed in range(40)}
    assert len(drawn) == 4


def test_unequal_batches_draw_from_the_completed_plan():
    x0, x1 = clouds(4, 6, 4)
    plan = ot.partial.partial_wasserstein(ot.unif(6), ot.unif(4), squared_distances(x0, x1).numpy(), m=0.6)
    full = plan + np.outer(1 / 6 - plan.sum(1), 1 / 4 - plan.sum(0)) / 0.4
    np.testing.assert_allclose(full.sum(0), 1 / 4)
    np.testing.assert_allclose(full.sum(1), 1 / 6)
    counts, rng, repeats = np.zeros((6, 4)), generator(0, "draws"), 800
    for _ in range(repeats):
        counts[PartialCoupling(0.6)(x0, x1, rng).numpy(), np.arange(4)] += 1
    np.testing.assert_allclose(counts / repeats, 4 * full, atol=5 * (0.25 / repeats) ** 0.5)


@pytest.mark.parametrize("mass", [0.0, -0.1, 1.1, float("nan")])
def test_bad_masses_are_refused(mass: float):
    with pytest.raises(ValueError, match=r"mass must be a number in"):
        PartialCoupling(mass)
