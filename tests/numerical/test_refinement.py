"""A refined solve and the error that it estimates, on equations whose solution is known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from flowbench.flows import (
    CosineGrid,
    DormandPrince,
    EDMGrid,
    Euler,
    Heun,
    LogitNormalGrid,
    Midpoint,
    RungeKutta4,
    Solver,
    UniformGrid,
)

TIMES = torch.tensor([0.0, 1.0], dtype=torch.float64)
START = torch.ones(1, 1, dtype=torch.float64)


def end(solver: Solver) -> float:
    """Of dx/dt = x from 1."""
    return solver.solve(lambda t, x: x, START, TIMES).states[-1].item()


TRUTH = math.e


@pytest.mark.parametrize(
    "grid", [UniformGrid(), CosineGrid(), LogitNormalGrid(), EDMGrid(sigma_min=0.05, sigma_max=20)]
)
@pytest.mark.parametrize(("method", "steps"), [(Euler, 200), (Midpoint, 40), (Heun, 40), (RungeKutta4, 40)])
def test_the_difference_to_twice_the_steps_gives_the_error(method, steps, grid):
    solver = method(steps, grid)
    finer = solver.refined()
    estimate = (end(solver) - end(finer.solver)) / (1 - finer.remaining)
    assert estimate == pytest.approx(end(solver) - TRUTH, rel=0.15)
    assert finer.description == "twice the steps"
    assert finer.solver.num_steps == 2 * steps


@pytest.mark.parametrize("grid", [UniformGrid(), CosineGrid(), EDMGrid(), LogitNormalGrid(1.0)])
def test_every_step_of_a_grid_is_halved(grid):
    """More points of EDM's grid never shorten its first and last step; halving does."""
    coarse, fine = (Euler(6, grid), Euler(6, grid).refined().solver)
    ends = [[0.0, *(step.stop for step in solver.steps(TIMES))] for solver in (coarse, fine)]
    assert ends[1][::2] == pytest.approx(ends[0], abs=1e-15)
    assert ends[1][1::2] == pytest.approx([(a + b) / 2 for a, b in pairwise(ends[0])], abs=1e-15)
    twice = fine.refined().solver
    assert [step.stop for step in twice.steps(TIMES)][3::4] == pytest.approx(ends[0][1:], abs=1e-15)
    assert (coarse.num_steps, fine.num_steps, twice.num_steps) == (6, 12, 24)


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_difference_to_a_tenth_of_the_tolerances_is_of_the_size_of_the_error(per_sample):
    solver = DormandPrince(rtol=1e-4, atol=1e-4, per_sample=per_sample)
    finer = solver.refined()
    assert (finer.solver.rtol, finer.solver.atol, finer.solver.per_sample) == (1e-5, 1e-5, per_sample)
    assert (solver.rtol, solver.atol) == (1e-4, 1e-4)
    estimate = abs(end(solver) - end(finer.solver)) / (1 - finer.remaining)
    assert 0.3 < estimate / abs(end(solver) - TRUTH) < 3


def test_a_solver_of_ones_own_has_no_refinement_unless_it_gives_one():
    class Still(Solver):
        order, evaluations_per_step = 1, 1

        def solve(self, field, x, times):
            raise AssertionError("not solved")

        def with_evaluations(self, num_evaluations):
            return self

    assert Still().refined() is None
