"""Entropic, Schroedinger bridge and unbalanced couplings against POT, closed forms and limits."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.core.seeds import generator
from flowbench.flows import SinkhornCoupling, sinkhorn_plan, squared_distances
from flowbench.flows.coupling.entropic import (
    SchrodingerBridgeCoupling,
    UnbalancedCoupling,
    complete_plan,
    unbalanced_plan,
)

seeds = st.integers(0, 999)


def clouds(seed: int, num_source: int, num_data: int, dim: int = 2):
    rng = generator(seed, "clouds")
    draw = {"generator": rng, "dtype": torch.float64}
    return torch.randn(num_source, dim, **draw), 1 + 2 * torch.randn(num_data, dim, **draw)


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


def unless_refused(plan):
    """The plan; None where it is refused."""
    try:
        return plan()
    except ValueError:
        return None


@given(seed=seeds, scale=st.integers(-4, 9), exponent=st.integers(-12, 2))
@settings(max_examples=60, deadline=None)
def test_a_plan_has_its_marginals_or_is_refused_whatever_epsilon(seed: int, scale: int, exponent: int):
    """Where cost / epsilon exceeds what float64 resolves the iterations stand still without having converged."""
    x0, x1 = clouds(seed, 9, 7)
    cost = 10.0**scale * squared_distances(x0, x1)
    plan = unless_refused(lambda: sinkhorn_plan(cost, 10.0**exponent, 1e-3, 200))
    if plan is None:
        return
    assert (plan.sum(1) - 1 / 9).abs().sum() <= 1e-3 + 2e-6
    assert (plan.sum(0) - 1 / 7).abs().sum() <= 1e-3 + 2e-6


@given(seed=seeds, scale=st.integers(-2, 9), exponent=st.integers(-12, 2), penalty=st.integers(-6, 6))
@settings(max_examples=60, deadline=None)
def test_an_unbalanced_plan_is_stationary_or_refused(seed: int, scale: int, exponent: int, penalty: int):
    """epsilon log(P N B) + cost + penalty (log(N rows) + log(B columns)) = 0 wherever there is mass."""
    x0, x1 = clouds(seed, 9, 7)
    cost, epsilon, price = 10.0**scale * squared_distances(x0, x1), 10.0**exponent, 10.0**penalty
    plan = unless_refused(lambda: unbalanced_plan(cost, epsilon, price, 1e-4, 300))
    if plan is None:
        return
    rows, columns = 9 * plan.sum(1), 7 * plan.sum(0)
    assert bool(plan.isfinite().all())
    some = (plan > 1e-12) & (rows[:, None] > 1e-6) & (columns > 1e-6)
    slope = epsilon * (63 * plan).log() + cost + price * (rows.log()[:, None] + columns.log())
    assert (slope[some].abs() <= 0.05 * (price + epsilon) + 1e-6 * cost.max()).all()


def test_a_plan_that_lost_its_mass_to_rounding_is_refused_in_one_line():
    x0, x1 = clouds(0, 30, 30)
    with pytest.raises(ValueError, match=r"plan carries .* of the mass .*below what float64 resolves .*, raise it$"):
        sinkhorn_plan(1e9 * squared_distances(x0, x1), 1e-12)


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


@pytest.mark.slow
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


@pytest.mark.parametrize("epsilon", [0.3, 2.0])
def test_log_domain_is_the_plain_domain(epsilon: float):
    cost = squared_distances(*clouds(5, 7, 9))
    kernel = torch.exp(-cost / epsilon / cost.mean())
    left = torch.ones(7, dtype=torch.float64)
    for _ in range(5000):
        right = 1 / 9 / (kernel.T @ left)
        left = 1 / 7 / (kernel @ right)
    plan = sinkhorn_plan(cost / cost.mean(), epsilon, 1e-12, 50_000)
    torch.testing.assert_close(plan, left[:, None] * kernel * right, atol=1e-12, rtol=1e-8)


def test_epsilon_may_be_absolute_or_per_dimension():
    x0, x1 = clouds(0, 6, 8, 4)
    squared, norm = squared_distances(x0, x1), squared_distances(x0, x1).sqrt()
    for rule, cost, epsilon in (
        (SinkhornCoupling(0.2), squared, 0.2 * squared.mean().item()),
        (SinkhornCoupling(0.2, cost="norm"), norm, 0.2 * norm.mean().item()),
        (SinkhornCoupling(3.0, absolute=True), squared, 3.0),
        (SinkhornCoupling(kappa=0.5, cost="norm"), norm, 0.5 * 4**0.5),
        (SchrodingerBridgeCoupling(sigma=1.5), squared, 2 * 1.5**2),
    ):
        torch.testing.assert_close(rule.plan(x0, x1), sinkhorn_plan(cost, epsilon), atol=1e-12, rtol=1e-9)


def test_kappa_is_that_of_the_gibbs_weight():
    """Independent pairs weighted by exp(-c / epsilon) are the first Sinkhorn kernel of the same kappa."""
    from flowbench.flows import GibbsWeight

    x0, x1 = clouds(3, 5, 5, 3)
    weight = GibbsWeight(kappa=0.7, normalization="raw")(x0, x1).weight
    kernel = torch.exp(-squared_distances(x0, x1).sqrt() / (0.7 * 3**0.5))
    torch.testing.assert_close(weight.double(), kernel.diagonal(), rtol=1e-5, atol=0)
    plan = SinkhornCoupling(kappa=0.7, cost="norm", tolerance=1e-10).plan(x0, x1)
    ratio = (plan / kernel).log()
    torch.testing.assert_close(ratio, ratio[:1] + ratio[:, :1] - ratio[0, 0])


@given(seed=seeds, epsilon=st.sampled_from([0.05, 0.5]), penalty=st.sampled_from([0.1, 1.0, 10.0]))
@settings(max_examples=10, deadline=None)
def test_unbalanced_is_pots_plan(seed: int, epsilon: float, penalty: float):
    x0, x1 = clouds(seed, 8, 6)
    cost = squared_distances(x0, x1)
    cost = cost / cost.mean()
    plan = unbalanced_plan(cost, epsilon, penalty, 1e-11, 100_000)
    reference = ot.unbalanced.sinkhorn_unbalanced(
        ot.unif(8), ot.unif(6), cost.numpy(), epsilon, penalty, numItermax=100_000, stopThr=1e-13
    )
    np.testing.assert_allclose(plan.numpy(), reference, atol=1e-9)


def test_unbalanced_runs_from_independent_to_balanced():
    x0, x1 = clouds(1, 8, 8)
    cost = squared_distances(x0, x1)
    cost = cost / cost.mean()
    free, held = (unbalanced_plan(cost, 0.1, penalty, 1e-9, 20_000) for penalty in (1e-3, 1e4))
    assert free.sum() < 0.2
    torch.testing.assert_close(held, sinkhorn_plan(cost, 0.1, 1e-9), atol=1e-4, rtol=0)


def test_unbalanced_leaves_an_outlier_to_chance():
    x0, x1 = clouds(2, 40, 40)
    x1[0] += 30
    cost = squared_distances(x0, x1)
    plan = unbalanced_plan(cost / cost.mean(), 0.05, 0.5)
    mass = 40 * plan.sum(0)
    assert mass[0] < 0.01
    assert mass[1:].min() > 0.2
    counts, rng, repeats = torch.zeros(40), generator(0, "draws"), 400
    for _ in range(repeats):
        counts[UnbalancedCoupling(0.5)(x0, x1, rng)[0]] += 1
    expected = complete_plan(plan)[:, 0] * 40
    torch.testing.assert_close(counts.double() / repeats, expected, atol=5 * (0.06 / repeats) ** 0.5, rtol=0)


def test_completed_plans_have_uniform_marginals():
    plan = torch.rand(5, 7, generator=generator(0), dtype=torch.float64)
    plan = plan / plan.sum(1).max() / 10
    full = complete_plan(plan)
    torch.testing.assert_close(full.sum(0), torch.full((7,), 1 / 7, dtype=torch.float64))
    torch.testing.assert_close(full.sum(1), torch.full((5,), 1 / 5, dtype=torch.float64))
    assert (full >= plan).all()


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: SinkhornCoupling(epsilon=0), "epsilon must be a number in"),
        (lambda: SinkhornCoupling(epsilon=-1.0), "epsilon must be a number in"),
        (lambda: SinkhornCoupling(kappa=0.0), "kappa must be a number in"),
        (lambda: SinkhornCoupling(0.1, kappa=0.1), "not both"),
        (lambda: SinkhornCoupling(absolute=True), "needs an epsilon"),
        (lambda: SinkhornCoupling(kappa=1.0, absolute=True), "needs an epsilon"),
        (lambda: SinkhornCoupling(cost="cosine"), 'cost must be "squared" or "norm"'),
        (lambda: SinkhornCoupling(max_iter=0), "max_iter must be a whole number in"),
        (lambda: SchrodingerBridgeCoupling(sigma=0.0), "sigma must be a number in"),
        (lambda: UnbalancedCoupling(penalty=0.0), "penalty must be a number in"),
        (lambda: UnbalancedCoupling(epsilon=float("inf")), "epsilon must be a number in"),
    ],
)
def test_bad_options_are_refused(build, match: str):
    with pytest.raises(ValueError, match=match) as error:
        build()
    assert "\n" not in str(error.value)
