"""Time grids against their formulas in NumPy and SciPy, and how fixed-step solvers lay them over a solve."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from flowbench.flows.solver.fixed_step import Euler, Heun, Midpoint, RungeKutta4
from flowbench.flows.solver.time_grid import CosineGrid, EDMGrid, LogitNormalGrid, TimeGrid, UniformGrid

GRIDS = [UniformGrid(), EDMGrid(), EDMGrid(1.0, 0.01, 5.0), CosineGrid(), LogitNormalGrid(), LogitNormalGrid(-0.5, 2.0)]
UNIT = torch.tensor([0.0, 1.0], dtype=torch.float64)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=repr)


def field(t, x):
    return torch.sin(3 * x) + t


def points():
    return torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2)


@every_grid
@given(num_steps=st.integers(1, 200))
@settings(max_examples=20, deadline=None)
def test_points_increase_from_zero_to_one(grid: TimeGrid, num_steps: int):
    found = grid.points(num_steps)
    assert found.dtype == torch.float64
    assert found.shape == (num_steps + 1,)
    assert (found[0], found[-1]) == (0, 1)
    assert (found.diff() > 0).all()


def test_formulas():
    n = 10
    i = np.arange(n)
    levels = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    expected = np.append(1 / (1 + levels), 1.0)
    assert levels[0] == pytest.approx(80)
    found = EDMGrid().points(n).numpy()
    np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-12)
    # The linear path at the grid's times has those noise levels: sigma / alpha = (1 - t) / t.
    np.testing.assert_allclose((1 - found[1:-1]) / found[1:-1], levels[1:], rtol=1e-9)
    even = np.linspace(0, 1, n + 1)
    np.testing.assert_allclose(CosineGrid().points(n), (1 - np.cos(np.pi * even)) / 2, atol=1e-15)
    np.testing.assert_allclose(
        LogitNormalGrid(0.3, 0.8).points(n)[1:-1], 1 / (1 + np.exp(-0.3 - 0.8 * norm.ppf(even[1:-1]))), rtol=1e-12
    )
    np.testing.assert_allclose(UniformGrid().points(n), even, rtol=1e-15)


def test_the_logarithms_of_noise_levels_are_even_for_large_rho():
    levels = np.log(1 / EDMGrid(rho=1e6).points(12)[1:-1].numpy() - 1)
    np.testing.assert_allclose(np.diff(levels), np.diff(levels).mean(), rtol=1e-3)


@every_grid
@pytest.mark.parametrize("method", [Euler, Midpoint, Heun, RungeKutta4])
@pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, 0.0), (0.2, 0.8)])
def test_the_field_is_evaluated_at_the_stage_times(grid: TimeGrid, method, times):
    solver, seen = method(5, grid), []
    times = torch.tensor(times, dtype=torch.float64)
    solver.solve(lambda t, x: seen.append(t.item()) or field(t, x), points(), times)
    assert seen == solver.stage_times(times)
    ends = [step.stop for step in solver.steps(times)]
    assert ends[-1] == times[-1].item()
    assert min(times) <= min(seen) <= max(seen) <= max(times)


@every_grid
def test_the_same_points_forward_and_backward(grid: TimeGrid):
    forward, backward = (Euler(7, grid).steps(t) for t in (UNIT, UNIT.flip(0)))
    assert [s.stop for s in forward] == [s.start for s in reversed(backward)]
    assert [s.start for s in forward] == [s.stop for s in reversed(backward)]
    assert all(a.size == pytest.approx(-b.size) for a, b in zip(forward, reversed(backward), strict=True))


def test_a_solve_takes_the_steps_of_its_grid():
    x, ends = points(), EDMGrid().points(6).tolist()
    for a, b in pairwise(ends):
        x = x + (b - a) * field(torch.tensor(a).double(), x)
    torch.testing.assert_close(Euler(6, EDMGrid()).solve(field, points(), UNIT).states[-1], x)


@pytest.mark.parametrize("grid", [UniformGrid(), CosineGrid()], ids=repr)
def test_grids_that_refine_everywhere_keep_the_order(grid: TimeGrid):
    truth = RungeKutta4(2000).solve(field, points(), UNIT).states[-1]
    steps = np.array([64, 128, 256])
    errors = [(Heun(int(n), grid).solve(field, points(), UNIT).states[-1] - truth).abs().max().item() for n in steps]
    assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(2, abs=0.3)


def test_budgets_keep_the_grid_and_names_tell_it():
    grid = EDMGrid(sigma_max=10.0)
    assert repr(RungeKutta4(3, grid)) == (
        "RungeKutta4(num_steps=3, grid=EDMGrid(rho=7, sigma_min=0.002, sigma_max=10))"
    )
    assert repr(RungeKutta4(3, UniformGrid())) == repr(RungeKutta4(3)) == "RungeKutta4(num_steps=3)"
    for budget in (1, 2, 8):
        assert RungeKutta4(3, grid).with_evaluations(budget).grid is grid
    assert repr(Heun(3, grid).with_evaluations(8)) == repr(Heun(4, grid))


def test_what_a_grid_cannot_do_is_refused():
    with pytest.raises(ValueError, match="cannot stop at 3 times: ask for the first and the last only"):
        Euler(4, CosineGrid()).solve(field, points(), torch.linspace(0, 1, 3))
    with pytest.raises(ValueError, match=r"std=1e-12\) must give 501 strictly increasing points"):
        Euler(500, LogitNormalGrid(20.0, 1e-12)).solve(field, points(), UNIT)
    for arguments, message in (({"rho": 0}, "rho must be"), ({"sigma_min": 90}, "sigma_min < sigma_max")):
        with pytest.raises(ValueError, match=message):
            EDMGrid(**arguments)
    with pytest.raises(ValueError, match=r"std must be a number in .*, got 0"):
        LogitNormalGrid(std=0)
    with pytest.raises(ValueError, match="mean must be a number in"):
        LogitNormalGrid(mean=float("nan"))
