"""Solvers for the flow's ordinary differential equation dx/dt = v(t, x).

A fixed-step method is a Butcher tableau with an order, on a time grid; the adaptive method is Dormand and Prince's.
Every solver counts the evaluations of the field, so that methods are compared at equal cost.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from flowbench.core.checks import check_count, check_numbers
from flowbench.flows.solver.base import (
    Field,
    Refinement,
    Solution,
    Solver,
    SolverStats,
    checked_times,
    commit,
    evaluate,
)
from flowbench.flows.solver.time_grid import TimeGrid, UniformGrid

__all__ = [
    "ButcherTableau",
    "Euler",
    "FixedStepSolver",
    "Heun",
    "Midpoint",
    "RungeKutta4",
    "Step",
]


@dataclass(frozen=True)
class ButcherTableau:
    """An explicit Runge-Kutta method.

    Attributes:
        a: strictly lower triangle, row i with i entries.
        b: weights of the stages.
        c: times of the stages in a unit step.
        order: the global error is O(h^order), 1 to 20.

    Raises:
        ValueError: for a coefficient outside of [-1e12, 1e12], or parts of other lengths.

    Example:
        >>> midpoint = ButcherTableau(a=((), (0.5,)), b=(0.0, 1.0), c=(0.0, 0.5), order=2)
        >>> midpoint == Midpoint(num_steps=1).tableau
        True
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    order: int

    def __post_init__(self) -> None:
        check_count("order", self.order, at_most=20)
        check_numbers("b", self.b)
        check_numbers("c", self.c, length=len(self.b), hint="a time for each stage")
        for stage, row in enumerate(self.a):
            if stage:
                check_numbers(f"a[{stage}]", row, length=stage)
            elif row:
                raise ValueError(f"a[0] must be empty, got {row!r}: the first stage has no slopes before it")
        if len(self.a) != len(self.b):
            raise ValueError(f"a must have a row for each of {len(self.b)} stages, got {len(self.a)}")


# Time grids hold a number for each step.
MOST_STEPS = 10**6


class Step(NamedTuple):
    """One step in time; ``size`` is negative backward."""

    start: float
    stop: float
    size: float

    def time(self, share: float) -> float:
        """A time inside the step: exactly ``start`` at 0 and ``stop`` at 1."""
        return (1 - share) * self.start + share * self.stop


class FixedStepSolver(Solver):
    """Explicit Runge-Kutta methods with fixed steps; a method is a subclass with a tableau.

    Args:
        num_steps: steps over the whole solve, 1 to 1e6, shared out evenly among the intervals between the requested
            times; a multiple of their number.
        grid: where the steps end between the first and the last time, the same points forward and backward; None is
            :class:`UniformGrid`, the only one that can stop at times between the two.

    Example:
        >>> class Ralston(FixedStepSolver):
        ...     tableau = ButcherTableau(a=((), (2 / 3,)), b=(0.25, 0.75), c=(0.0, 2 / 3), order=2)
        >>> solution = Ralston(num_steps=1).solve(lambda t, x: x, torch.ones(1, 1), torch.tensor([0.0, 1.0]))
        >>> round(solution.states[-1].item(), 4)  # 1 + 1 + 1 / 2
        2.5
    """

    def __init__(self, num_steps: int, grid: TimeGrid | None = None) -> None:
        check_count("num_steps", num_steps, at_most=MOST_STEPS)
        self.num_steps = num_steps
        self.grid = grid or UniformGrid()

    @property
    @abstractmethod
    def tableau(self) -> ButcherTableau:
        """Coefficients of the method; a class attribute will do."""

    @property
    def order(self) -> int:  # type: ignore[override]
        """Order of convergence."""
        return self.tableau.order

    @property
    def evaluations_per_step(self) -> int:  # type: ignore[override]
        """Evaluations of the field that one step costs: the stages of the tableau."""
        return len(self.tableau.b)

    def solve(self, field: Field, x: Tensor, times: Tensor) -> Solution:
        """Integrate with ``num_steps`` steps of the grid; see :meth:`Solver.solve`."""
        steps = self.steps(times)
        stride = len(steps) // (len(times) - 1)
        states, before = [x], x
        # The walk waits after each step, so that a commit comes before the next step's first evaluation.
        for done, (step, state) in enumerate(zip(steps, self._walk(field, x, steps), strict=True), 1):
            commit(field, step.start, before)
            before = state
            if done % stride == 0:
                states.append(state)
        return Solution(torch.stack(states), SolverStats(self.num_steps * self.evaluations_per_step, self.num_steps, 0))

    def steps(self, times: Tensor) -> list[Step]:
        """The steps of a solve through ``times``, in the order in which they are taken.

        Raises:
            ValueError: if the times are not monotonic, the steps cannot be shared out, or the grid cannot stop at them.
        """
        requested = checked_times(times)
        count, rest = divmod(self.num_steps, len(requested) - 1)
        if rest:
            raise ValueError(
                f"num_steps must be a multiple of the {len(requested) - 1} intervals between the requested times,"
                f" got {self.num_steps}"
            )
        uniform = isinstance(self.grid, UniformGrid)
        if len(requested) > 2 and not uniform:
            raise ValueError(
                f"{self.grid!r} cannot stop at {len(requested)} times: ask for the first and the last only, or use"
                " UniformGrid"
            )
        shares = self._shares(count)
        return [step for start, stop in pairwise(requested) for step in _spread(shares, start, stop, uniform)]

    def stage_times(self, times: Tensor) -> list[float]:
        """Every time at which a solve through ``times`` evaluates the field, in the order of the evaluations."""
        return [step.time(c) for step in self.steps(times) for c in self.tableau.c]

    def with_evaluations(self, num_evaluations: int) -> Solver:
        """The same method and grid with as many steps as the budget buys; see :meth:`Solver.with_evaluations`."""
        steps, rest = divmod(num_evaluations, self.evaluations_per_step)
        if rest or steps < 1:
            raise ValueError(
                f"{type(self).__name__} takes {self.evaluations_per_step} evaluations per step and cannot use"
                f" exactly {num_evaluations}: choose a positive multiple"
            )
        return self._with_steps(steps)

    def refined(self) -> Refinement:
        """Twice the steps: every step of the grid is halved, so that any grid becomes finer everywhere."""
        finer = self._with_steps(2 * self.num_steps)
        if not isinstance(self.grid, UniformGrid):
            finer.grid = _HalvedGrid(self.grid)
        return Refinement(finer, 0.5**self.order, "twice the steps")

    def _with_steps(self, num_steps: int) -> FixedStepSolver:
        changed = copy.copy(self)
        changed.num_steps = num_steps
        return changed

    def _shares(self, count: int) -> list[float]:
        points = self.grid.points(count).double().tolist()
        increasing = all(a < b for a, b in pairwise(points))
        if len(points) != count + 1 or not increasing or (points[0], points[-1]) != (0.0, 1.0):
            raise ValueError(
                f"{self.grid!r} must give {count + 1} strictly increasing points from 0 to 1: use fewer steps or"
                " another grid"
            )
        return points

    def _walk(self, field: Field, x: Tensor, steps: list[Step]) -> Iterator[Tensor]:
        """The state after each step."""
        for step in steps:
            slopes: list[Tensor] = []
            for row, c in zip(self.tableau.a, self.tableau.c, strict=True):
                slopes.append(evaluate(field, step.time(c), _advance(x, step.size, row, slopes)))
            x = _advance(x, step.size, self.tableau.b, slopes)
            yield x

    def __repr__(self) -> str:
        grid = "" if isinstance(self.grid, UniformGrid) else f", grid={self.grid!r}"
        return f"{type(self).__name__}(num_steps={self.num_steps}{grid})"


class Euler(FixedStepSolver):
    """Euler's method, order 1, one evaluation per step.

    Example:
        >>> solution = Euler(num_steps=2).solve(lambda t, x: x, torch.ones(1, 1), torch.tensor([0.0, 1.0]))
        >>> solution.states[-1]  # (1 + 1 / 2)^2, where the exact value is e
        tensor([[2.2500]])
        >>> solution.stats.network_evaluations
        2
    """

    tableau = ButcherTableau(a=((),), b=(1.0,), c=(0.0,), order=1)


class _TwoStageSolver(FixedStepSolver):
    def with_evaluations(self, num_evaluations: int) -> Solver:
        """As :meth:`FixedStepSolver.with_evaluations`; a single evaluation buys one Euler step."""
        return Euler(1, self.grid) if num_evaluations == 1 else super().with_evaluations(num_evaluations)


class Midpoint(_TwoStageSolver):
    """The explicit midpoint method, order 2, two evaluations per step.

    Example:
        >>> solution = Midpoint(num_steps=1).solve(lambda t, x: x, torch.ones(1, 1), torch.tensor([0.0, 1.0]))
        >>> solution.states[-1]  # 1 + 1 + 1 / 2, where the exact value is e
        tensor([[2.5000]])
        >>> solution.stats.network_evaluations
        2
    """

    tableau = ButcherTableau(a=((), (0.5,)), b=(0.0, 1.0), c=(0.0, 0.5), order=2)


class Heun(_TwoStageSolver):
    """Heun's method (explicit trapezoid), order 2, two evaluations per step.

    Example:
        >>> solution = Heun(num_steps=1).solve(lambda t, x: x, torch.ones(1, 1), torch.tensor([0.0, 1.0]))
        >>> solution.states[-1]  # 1 + 1 + 1 / 2, where the exact value is e
        tensor([[2.5000]])
        >>> solution.stats.network_evaluations
        2
    """

    tableau = ButcherTableau(a=((), (1.0,)), b=(0.5, 0.5), c=(0.0, 1.0), order=2)


class RungeKutta4(FixedStepSolver):
    """The classical Runge-Kutta method, order 4, four evaluations per step.

    Example:
        >>> solution = RungeKutta4(num_steps=1).solve(lambda t, x: x, torch.ones(1, 1), torch.tensor([0.0, 1.0]))
        >>> round(solution.states[-1].item(), 4)  # 1 + 1 + 1 / 2 + 1 / 6 + 1 / 24, where the exact value is e
        2.7083
        >>> solution.stats.network_evaluations
        4
    """

    tableau = ButcherTableau(
        a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
        c=(0.0, 0.5, 0.5, 1.0),
        order=4,
    )

    def with_evaluations(self, num_evaluations: int) -> Solver:
        """As :meth:`FixedStepSolver.with_evaluations`; one evaluation buys an Euler step, two a midpoint step."""
        if num_evaluations in (1, 2):
            return Midpoint(1, self.grid).with_evaluations(num_evaluations)
        return super().with_evaluations(num_evaluations)


class _HalvedGrid(TimeGrid):
    """The points of a grid of half as many steps, and those midway between them."""

    def __init__(self, grid: TimeGrid) -> None:
        self.grid = grid

    def points(self, num_steps: int) -> Tensor:
        coarse = self.grid.points(num_steps // 2)
        points = coarse.new_empty(2 * len(coarse) - 1)
        points[::2] = coarse
        points[1::2] = (coarse[:-1] + coarse[1:]) / 2
        return points

    def __repr__(self) -> str:
        return f"halved {self.grid!r}"


def _spread(shares: list[float], start: float, stop: float, uniform: bool) -> list[Step]:
    """Steps from start to stop that end at these shares of the way from the earlier to the later time."""
    low, high = min(start, stop), max(start, stop)
    # Convex combinations: the last step falls on the last time exactly, never beyond it.
    ends = [(1 - share) * low + share * high for share in shares]
    if stop < start:
        ends.reverse()
    size = (stop - start) / (len(ends) - 1)
    return [Step(a, b, size if uniform else b - a) for a, b in pairwise(ends)]


def _advance(x: Tensor, size: float, weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            x = x + (size * weight) * slope
    return x
