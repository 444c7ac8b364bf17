"""Couplings against brute force, sorting, POT and invariances of optimal transport."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from flowbench.core.seeds import generator
from flowbench.flows import (
    Coupling,
    IndependentCoupling,
    OptimalTransportCoupling,
    SinkhornCoupling,
    squared_distances,
)
from flowbench.flows.coupling import exact as exact_coupling
from flowbench.flows.coupling.conditional import ConditionalCoupling
from flowbench.flows.coupling.entropic import SchrodingerBridgeCoupling, UnbalancedCoupling
from flowbench.flows.coupling.partial import PartialCoupling

COUPLINGS = [
    IndependentCoupling(),
    OptimalTransportCoupling(),
    SinkhornCoupling(),
    SinkhornCoupling(kappa=0.5, cost="norm"),
    SchrodingerBridgeCoupling(sigma=1.0),
    UnbalancedCoupling(),
    PartialCoupling(0.7),
    ConditionalCoupling(),
]
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
    monkeypatch.setattr(exact_coupling.ot, "emd", lambda *a, **k: solver(*a, **{**k, "numItermax": 1}))
    with pytest.warns(match="numItermax"), pytest.raises(RuntimeError, match="use equal batch sizes"):
        exact(*clouds(0, 30, 20), generator(0))


@pytest.mark.parametrize("rule", COUPLINGS, ids=repr)
@pytest.mark.parametrize("sizes", [(8, 8), (8, 5), (5, 8), (1, 1)])
def test_every_coupling_returns_repeatable_indices(rule: Coupling, sizes):
    if isinstance(rule, ConditionalCoupling) and sizes[0] != sizes[1]:
        pytest.skip("needs batches of one size")
    x0 = torch.randn(sizes[0], 1, 2, 2, generator=generator(0, "x0"), requires_grad=True)
    x1 = torch.randn(sizes[1], 1, 2, 2, generator=generator(0, "x1"))
    label = torch.arange(sizes[1]) % 3
    state = torch.random.get_rng_state()
    index = rule(x0, x1, generator(7), label)
    assert index.dtype == torch.int64
    assert index.shape == (sizes[1],)
    assert 0 <= index.min()
    assert index.max() < sizes[0]
    assert torch.equal(index, rule(x0, x1, generator(7), label))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("rule", COUPLINGS, ids=repr)
@pytest.mark.parametrize("num", [1, 6])
def test_equal_points_and_single_points_are_paired(rule: Coupling, num: int):
    x = torch.ones(num, 2)
    index = rule(x, x, generator(0), torch.zeros(num, dtype=torch.int64))
    assert index.shape == (num,)
    if num == 1:
        assert index.tolist() == [0]
    if not isinstance(rule, SinkhornCoupling | UnbalancedCoupling):
        assert sorted(index.tolist()) == list(range(num))


@pytest.mark.parametrize("rule", COUPLINGS[1:], ids=repr)
def test_bad_batches_are_refused_in_one_line(rule: Coupling):
    x0, x1 = clouds(0, 4, 4)
    label = torch.zeros(4, dtype=torch.int64)
    for batches, match in (
        ((x0, x1[:, :1]), "points of one shape"),
        ((x0, x1[:0]), "non-empty"),
        ((x0, x1 * float("nan")), "non-finite"),
        ((x0 * float("inf"), x1), "non-finite"),
    ):
        with pytest.raises(ValueError, match=match) as error:
            rule(*batches, generator(0), label)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("rule", COUPLINGS[:-1], ids=repr)
def test_couplings_without_conditions_ignore_them(rule: Coupling):
    x0, x1 = clouds(0, 6, 6)
    condition = torch.randn(6, 3, generator=generator(1))
    assert torch.equal(rule(x0, x1, generator(2)), rule(x0, x1, generator(2), condition))


def test_independent_coupling_leaves_equal_batches_alone():
    x0, x1 = clouds(0, 6, 6)
    rng = generator(0)
    state = rng.get_state()
    assert torch.equal(IndependentCoupling()(x0, x1, rng), torch.arange(6))
    assert torch.equal(rng.get_state(), state)


@pytest.mark.parametrize("offset", [0.0, 0.3, 1e4])
@pytest.mark.parametrize("dim", [3, 600])
def test_distances_of_float32_points_match_differences(dim: int, offset: float):
    x0, x1 = (x.float() + offset for x in clouds(0, 20, 30, dim))
    reference = (x0.double()[:, None] - x1.double()).square().sum(2)
    error = (squared_distances(x0, x1) - reference) / reference.mean()
    in_float32 = dim > 512 and offset < 1
    # How rounding errors of a product add up is the processor's choice; they grow like the root of the dimension.
    allowed = dim**0.5 * torch.finfo(torch.float32).eps if in_float32 else 1e-12
    assert error.abs().max() < allowed
    # An assignment does not feel what a whole row or column is off by.
    felt = error - error.mean(0) - error.mean(1, keepdim=True) + error.mean()
    assert felt.abs().max() < allowed


@pytest.mark.parametrize("dim", [3, 600])
def test_distances_keep_their_derivatives_and_their_digits_under_autocast(dim: int):
    x0, x1 = (x.float() for x in clouds(0, 20, 30, dim))
    with torch.autocast("cpu", torch.bfloat16):
        low = squared_distances(x0, x1)
        with torch.backends.mkldnn.flags(enabled=False):
            lower = squared_distances(x0, x1)
    plain = squared_distances(x0, x1)
    torch.testing.assert_close(low, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(lower, plain, rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(squared_distances(x0.requires_grad_(), x1).sum(), x0)
    torch.testing.assert_close(grad, 2 * (30 * x0 - x1.sum(0)).detach(), rtol=1e-4, atol=1e-3)
    _, tangent = torch.func.jvp(lambda x: squared_distances(x, x1).sum(), (x0.detach(),), (torch.ones_like(x0),))
    assert tangent.item() == pytest.approx(grad.sum().item(), rel=1e-3)


def test_far_points_of_many_dimensions_keep_their_digits():
    """A float32 product of points far from the origin would leave no digit of their distances."""
    x0, x1 = (x.float() + 1e4 for x in clouds(3, 40, 40, 600))
    near0, near1 = x0.double() - 1e4, x1.double() - 1e4
    assert torch.equal(exact(x0, x1, generator(0)), exact(near0, near1, generator(0)))


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 16])
def test_torchcfm_pairs_the_same(dim: int):
    """Peer: the plan of torchcfm's exact sampler is our permutation over B."""
    optimal_transport = pytest.importorskip("torchcfm.optimal_transport")
    x0, x1 = (x.float() for x in clouds(0, 64, 64, dim))
    plan = optimal_transport.OTPlanSampler("exact").get_map(x0, x1)
    index = exact(x0, x1, generator(0)).numpy()
    ours = np.zeros((64, 64))
    ours[index, np.arange(64)] = 1 / 64
    np.testing.assert_allclose(plan, ours, atol=1e-9)


@pytest.mark.slow
def test_torchcfm_has_the_same_entropic_plan():
    optimal_transport = pytest.importorskip("torchcfm.optimal_transport")
    x0, x1 = (x.float() for x in clouds(0, 32, 32))
    plan = optimal_transport.OTPlanSampler("sinkhorn", reg=2 * 1.5**2).get_map(x0, x1)
    ours = SchrodingerBridgeCoupling(sigma=1.5, tolerance=1e-9).plan(x0, x1)
    np.testing.assert_allclose(plan, ours.numpy(), atol=1e-6)
