"""The semidiscrete dual against quantiles, a linear program, brute force and counting."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import norm
from torch.utils.flop_counter import FlopCounterMode

from flowbench.core.seeds import generator
from flowbench.flows import SemidiscreteDual, SemidiscretePotential, chi_squared
from flowbench.flows.coupling import semidiscrete


def normal(dim: int, mean: float = 0.0, std: float = 1.0):
    return lambda num, rng: mean + std * torch.randn(num, dim, generator=rng)


def cloud(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    return 1.0 + 0.5 * torch.randn(num, dim, generator=generator(seed, "cloud"))


def fitted(points: torch.Tensor, draw, steps: int = 1500, **options) -> SemidiscreteDual:
    dual = SemidiscreteDual(points, draw, **{"batch": 512, **options})
    for _ in range(steps):
        dual.step()
    return dual


def test_on_a_line_cells_end_at_the_quantiles_of_the_source():
    """Points of N(1, 2^2) go to the k-th of N points between its quantiles (k - 1) / N and k / N."""
    points = torch.tensor([[-3.0], [0.5], [1.0], [6.0]])
    g = fitted(points, normal(1, 1.0, 2.0), steps=1500, batch=2048).solved().potential
    boundary = (g[:-1] - g[1:]) / points.double().diff(dim=0).squeeze(1)
    expected = norm(1.0, 2.0).ppf([0.25, 0.5, 0.75])
    np.testing.assert_allclose(boundary.numpy(), expected, atol=1e-2 * 2.0)


def test_two_points_halve_the_source():
    points = torch.tensor([[-3.0], [0.5]])
    g = fitted(points, normal(1, 1.0, 1.0), steps=1500, batch=2048).solved().potential
    assert float(g[0] - g[1]) / 3.5 == pytest.approx(1.0, abs=1e-2)


def test_every_point_is_drawn_alike():
    """Within three standard deviations of a multinomial law, where g = 0 is far outside."""
    points, num = cloud(10, 3), 20_000
    noise = torch.randn(num, 3, generator=generator(1, "fresh"))
    spread = 3 * math.sqrt(num * 0.1 * 0.9)
    counts = fitted(points, normal(3), batch=1024).solved().assign(noise).bincount(minlength=10)
    assert float((counts - num / 10).abs().max()) < spread
    before = SemidiscretePotential(points, torch.zeros(10)).assign(noise).bincount(minlength=10)
    assert float((before - num / 10).abs().max()) > 10 * spread


def test_a_constant_changes_no_pair_and_points_are_found_by_brute_force(monkeypatch):
    points, g = cloud(50, 4).double(), torch.randn(50, generator=generator(0, "g"), dtype=torch.float64)
    noise = torch.randn(30, 4, generator=generator(0, "x"), dtype=torch.float64)
    score = (noise.numpy()[:, None] * points.numpy()[None]).sum(2) + g.numpy()
    expected = torch.from_numpy(score.argmax(1))
    for scores in (2**24, 7 * 30, 1):  # all points at once, seven at a time, one
        monkeypatch.setattr(semidiscrete, "MAX_SCORES", scores)
        assert torch.equal(SemidiscretePotential(points, g).assign(noise), expected)
        assert torch.equal(SemidiscretePotential(points, g + 17.5).assign(noise), expected)
    value = SemidiscretePotential(points, g).dual_value(noise)
    assert value == pytest.approx(g.mean().item() - score.max(1).mean(), rel=1e-12)


def test_a_single_point_takes_all():
    dual = fitted(torch.ones(1, 2), normal(2), steps=3)
    assert dual.solved().assign(torch.randn(5, 2, generator=generator(0))).tolist() == [0] * 5
    assert dual.chi2() == pytest.approx(0.0, abs=1e-12)
    assert dual.solved().potential.item() == 0


def test_the_dual_is_that_of_a_linear_program():
    """Weak duality holds for any g on the same noise; after the fit the gap is small."""
    points = cloud(12, 2)
    solved = fitted(points, normal(2), batch=1024, steps=1000).solved()
    noise = torch.randn(2000, 2, generator=generator(5, "program"))
    cost = -(noise @ solved.points.T).double().numpy()
    optimum = ot.emd2(ot.unif(2000), ot.unif(12), cost, numItermax=10_000_000)
    value, start = solved.dual_value(noise), SemidiscretePotential(solved.points, torch.zeros(12)).dual_value(noise)
    scale = abs(optimum - start)
    assert value <= optimum + 1e-6 * abs(optimum)
    assert optimum - value < 0.02 * scale
    # And the plan of the program is the assignment, but for noise at the cells' borders.
    plan = ot.emd(ot.unif(2000), ot.unif(12), cost, numItermax=10_000_000)
    assert np.mean(plan.argmax(1) == solved.assign(noise).numpy()) > 0.9


def test_pairs_are_shorter_than_those_of_batches():
    """The same 64 points, each batch all of them: fresh noise finds a nearer point than a permutation gives it."""
    points = cloud(64, 8)
    solved = fitted(points, normal(8), batch=512, steps=600).solved()
    batches, looked_up = [], []
    for seed in range(40):
        noise = torch.randn(64, 8, generator=generator(seed, "batch"))
        cost = torch.cdist(noise, points).square().double().numpy()
        batches.append(cost[linear_sum_assignment(cost)].mean())
        looked_up.append((noise - points[solved.assign(noise)]).square().sum(1).mean().item())
    gap = np.array(batches) - np.array(looked_up)
    assert gap.mean() > 3 * gap.std(ddof=1) / math.sqrt(len(gap))


def test_units_and_place_of_the_points_do_not_matter():
    points, noise = cloud(20, 3).double(), torch.randn(500, 3, generator=generator(0, "x")).double()
    plain = fitted(points, normal(3), steps=100).solved()
    for other in (8.0 * points, points - 100.0):
        assert torch.equal(fitted(other, normal(3), steps=100).solved().assign(noise), plain.assign(noise))


def test_the_estimate_of_chi_squared_has_its_mean():
    """Few draws of unequal shares, many times; the plain plug-in estimate is biased by (N - 1) / B."""
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    expected = float(((shares - 0.25) ** 2 / 0.25).sum())
    rng, found, plugged = np.random.default_rng(0), [], []
    for _ in range(4000):
        counts = rng.multinomial(6, shares.numpy())
        found.append(chi_squared(torch.from_numpy(counts)))
        plugged.append(float(((counts / 6 - 0.25) ** 2 / 0.25).sum()))
    error = np.std(found, ddof=1) / math.sqrt(len(found))
    assert np.mean(found) == pytest.approx(expected, abs=4 * error)
    assert np.mean(plugged) > expected + 10 * error
    with pytest.raises(ValueError, match="at least 2 draws, got 1"):
        chi_squared(torch.tensor([1, 0]))


def test_the_average_is_nearer_to_equal_shares_than_the_last_iterate():
    points = cloud(200, 5)
    averaged, last = (fitted(points, normal(5), steps=300, ema=ema).chi2() for ema in (0.99, 0.0))
    assert averaged < 0.1
    assert last > 3 * averaged


def test_an_ascent_goes_on_from_its_state():
    points = cloud(30, 2)
    whole, first = fitted(points, normal(2), steps=40), fitted(points, normal(2), steps=25)
    second = SemidiscreteDual(points, normal(2), batch=512)
    second.load_state_dict(first.state_dict())
    for _ in range(15):
        second.step()
    assert torch.equal(second.solved().potential, whole.solved().potential)
    assert (second.steps, second.flops) == (whole.steps, whole.flops)
    with pytest.raises(ValueError, match="the state has 30 points, expected 29"):
        SemidiscreteDual(points[1:], normal(2)).load_state_dict(first.state_dict())


def test_operations_are_those_that_are_carried_out():
    points = cloud(40, 6)
    dual = SemidiscreteDual(points, normal(6), batch=128)
    with FlopCounterMode(display=False) as counter:
        for _ in range(3):
            dual.step()
        dual.chi2()
    assert dual.flops == counter.get_total_flops() > 3 * 2 * 128 * 40 * 6


def test_mistakes_are_one_line():
    points = cloud(3, 2)
    with pytest.raises(
        ValueError, match=r"one number per data point, got points \(3, 2\) and a potential of shape \(2"
    ):
        SemidiscretePotential(points, torch.zeros(2))
    with pytest.raises(ValueError, match="NaN or infinity"):
        SemidiscretePotential(points, torch.full((3,), math.nan))
