"""Solvers for the flow's ordinary differential equation dx/dt = v(t, x).

A fixed-step method is a Butcher tableau with an order; the adaptive method is torchdiffeq's dopri5. Every
solver counts the evaluations of the field, so that methods are compared at equal cost.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torchdiffeq
from torch import Tensor

__all__ = [
    "ButcherTableau",
    "DormandPrince",
    "Euler",
    "Field",
    "FixedStepSolver",
    "Heun",
    "Midpoint",
    "RungeKutta4",
    "Solution",
    "Solver",
    "SolverStats",
]

Field = Callable[[Tensor, Tensor], Tensor]
"""A velocity ``field(t, x)``: scalar time and states of shape (B, *D) to velocities of shape (B, *D)."""


@dataclass(frozen=True)
class ButcherTableau:
    """An explicit Runge-Kutta method.

    Attributes:
        a: strictly lower triangle, row i with i entries.
        b: weights of the stages.
        c: times of the stages in a unit step.
        order: the global error is O(h^order).
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    order: int


@dataclass(frozen=True)
class SolverStats:
    """What a solve cost.

    Attributes:
        network_evaluations: calls of the field, those of rejected steps included. A guided field calls its
            network more than once: multiply by ``ClassifierFreeGuidance.evaluations_per_call``.
        accepted_steps: steps that were kept.
        rejected_steps: steps that an adaptive method threw away.
    """

    network_evaluations: int
    accepted_steps: int
    rejected_steps: int


@dataclass(frozen=True)
class Solution:
    """States at the requested times, shape (T, B, *D), and their cost."""

    states: Tensor
    stats: SolverStats


class Solver(ABC):
    """Integrates a field through given times, forward or backward.

    Attributes:
        order: order of convergence.
        evaluations_per_step: evaluations of the field that one step costs.
    """

    order: int
    evaluations_per_step: int

    @abstractmethod
    def solve(self, field: Field, x: Tensor, times: Tensor) -> Solution:
        """Integrate from ``x`` at ``times[0]`` through all of ``times``.

        Args:
            field: the velocity, called with a scalar time on the device of x.
            x: initial states, floating point, shape (B, *D).
            times: strictly increasing or strictly decreasing, shape (T,) with T >= 2. Only values are used;
                no gradient flows to them.

        Returns:
            States of shape (T, B, *D), the first being x, and the cost.

        Raises:
            ValueError: if the times are not monotonic or the field's output has not the shape of x.
        """

    @abstractmethod
    def with_evaluations(self, num_evaluations: int) -> Solver:
        """The same method with a budget of ``num_evaluations`` evaluations of the field over the whole solve.

        Raises:
            ValueError: if the method cannot spend exactly that many.
        """


class FixedStepSolver(Solver):
    """The one engine of all explicit fixed-step methods; a method is a subclass with a tableau.

    Args:
        num_steps: steps over the whole solve, >= 1, spread evenly over the intervals between the requested
            times; a multiple of their number.
    """

    tableau: ClassVar[ButcherTableau]

    def __init__(self, num_steps: int) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        self.num_steps = num_steps

    @property
    def order(self) -> int:  # type: ignore[override]
        """Order of convergence."""
        return self.tableau.order

    @property
    def evaluations_per_step(self) -> int:  # type: ignore[override]
        """Evaluations of the field that one step costs: the stages of the tableau."""
        return len(self.tableau.b)

    def solve(self, field: Field, x: Tensor, times: Tensor) -> Solution:
        """Integrate with ``num_steps`` equal steps per interval; see :meth:`Solver.solve`."""
        grid = _time_grid(times)
        steps, rest = divmod(self.num_steps, len(grid) - 1)
        if rest:
            raise ValueError(
                f"num_steps must be a multiple of the {len(grid) - 1} intervals between the requested times,"
                f" got {self.num_steps}"
            )
        states = [x]
        for start, stop in pairwise(grid):
            state = states[-1]
            for step in range(steps):
                state = self._step(field, state, start, stop, step, steps)
            states.append(state)
        return Solution(torch.stack(states), SolverStats(self.num_steps * self.evaluations_per_step, self.num_steps, 0))

    def with_evaluations(self, num_evaluations: int) -> Solver:
        """The same method with as many steps as the budget buys; see :meth:`Solver.with_evaluations`."""
        steps, rest = divmod(num_evaluations, self.evaluations_per_step)
        if rest or steps < 1:
            raise ValueError(
                f"{type(self).__name__} takes {self.evaluations_per_step} evaluations per step and cannot use"
                f" exactly {num_evaluations}: choose a positive multiple"
            )
        return type(self)(steps)

    def _step(self, field: Field, x: Tensor, start: float, stop: float, step: int, steps: int) -> Tensor:
        size = (stop - start) / steps
        slopes: list[Tensor] = []
        for row, c in zip(self.tableau.a, self.tableau.c, strict=True):
            # Convex combination: the last stage of the last step falls on `stop` exactly, never beyond it.
            share = (step + c) / steps
            time = (1 - share) * start + share * stop
            slopes.append(_evaluate(field, time, _advance(x, size, row, slopes)))
        return _advance(x, size, self.tableau.b, slopes)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_steps={self.num_steps})"


class Euler(FixedStepSolver):
    """Euler's method, order 1, one evaluation per step."""

    tableau = ButcherTableau(a=((),), b=(1.0,), c=(0.0,), order=1)


class _TwoStageSolver(FixedStepSolver):
    def with_evaluations(self, num_evaluations: int) -> Solver:
        """As :meth:`FixedStepSolver.with_evaluations`; a single evaluation buys one Euler step."""
        return Euler(1) if num_evaluations == 1 else super().with_evaluations(num_evaluations)


class Midpoint(_TwoStageSolver):
    """The explicit midpoint method, order 2, two evaluations per step."""

    tableau = ButcherTableau(a=((), (0.5,)), b=(0.0, 1.0), c=(0.0, 0.5), order=2)


class Heun(_TwoStageSolver):
    """Heun's method (explicit trapezoid), order 2, two evaluations per step."""

    tableau = ButcherTableau(a=((), (1.0,)), b=(0.5, 0.5), c=(0.0, 1.0), order=2)


class RungeKutta4(FixedStepSolver):
    """The classical Runge-Kutta method, order 4, four evaluations per step."""

    tableau = ButcherTableau(
        a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
        c=(0.0, 0.5, 0.5, 1.0),
        order=4,
    )

    def with_evaluations(self, num_evaluations: int) -> Solver:
        """As :meth:`FixedStepSolver.with_evaluations`; one evaluation buys an Euler step, two a midpoint step."""
        if num_evaluations in (1, 2):
            return Midpoint(1).with_evaluations(num_evaluations)
        return super().with_evaluations(num_evaluations)


class DormandPrince(Solver):
    """The adaptive Dormand-Prince method of order 5 with an embedded error estimate (torchdiffeq's dopri5).

    The step size follows one root-mean-square error over the whole batch, so the cost of a sample depends on
    its batch. Intermediate times come from a fourth-order interpolant; the field is never evaluated beyond
    the last time.

    Args:
        rtol: relative tolerance, > 0.
        atol: absolute tolerance in units of the state, > 0.
        max_steps: steps, rejected ones included, between two requested times after which the solver gives up.

    References:
        Dormand and Prince 1980, doi 10.1016/0771-050X(80)90013-3.
    """

    order = 5
    evaluations_per_step = 6

    def __init__(self, rtol: float = 1e-5, atol: float = 1e-5, max_steps: int = 10_000) -> None:
        for name, value in (("rtol", rtol), ("atol", atol), ("max_steps", max_steps)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        self.rtol = rtol
        self.atol = atol
        self.max_steps = max_steps

    def solve(self, field: Field, x: Tensor, times: Tensor) -> Solution:
        """Integrate within the tolerances; see :meth:`Solver.solve`.

        Raises:
            RuntimeError: if the step size underflows, the state is not finite or ``max_steps`` is reached.
        """
        grid = _time_grid(times)
        counted = _CountedField(field, min(grid), max(grid))
        t = torch.tensor(grid, dtype=torch.float64, device=x.device)
        # A forced step on the last time keeps the solver from overshooting it, where the field may not exist.
        options = {"step_t": t[-1:], "max_num_steps": self.max_steps}
        try:
            states = torchdiffeq.odeint(counted, x, t, rtol=self.rtol, atol=self.atol, method="dopri5", options=options)
        except AssertionError as error:
            reason = str(error).splitlines()[0][:120]
            raise RuntimeError(
                f"{self!r} failed ({reason}): loosen the tolerances or look for a non-finite field"
            ) from error
        return Solution(states, counted.stats)

    def with_evaluations(self, num_evaluations: int) -> Solver:
        """Always refused: the tolerances decide."""
        raise ValueError(
            f"{self!r} chooses its own number of evaluations and cannot use exactly {num_evaluations}: use a"
            " fixed-step solver"
        )

    def __repr__(self) -> str:
        return f"DormandPrince(rtol={self.rtol:g}, atol={self.atol:g})"


class _CountedField:
    """Counts what torchdiffeq does to a field; the callback names are torchdiffeq's."""

    def __init__(self, field: Field, first: float, last: float) -> None:
        self.field = field
        self.first, self.last = first, last
        self.evaluations = self.accepted = self.rejected = 0

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self.evaluations += 1
        # The probe for the first step size may reach beyond the interval.
        return _checked(self.field(t.clamp(self.first, self.last), x), x)

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.accepted += 1

    def callback_reject_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.rejected += 1

    @property
    def stats(self) -> SolverStats:
        return SolverStats(self.evaluations, self.accepted, self.rejected)


def _time_grid(times: Tensor) -> list[float]:
    grid = times.detach().double().flatten().tolist() if times.ndim == 1 else []
    steps = [b - a for a, b in pairwise(grid)]
    if not steps or not (all(s > 0 for s in steps) or all(s < 0 for s in steps)):
        raise ValueError(
            f"times must be a strictly increasing or decreasing 1-D tensor of two or more, got {times.tolist()}"
        )
    return grid


def _evaluate(field: Field, time: float, x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return _checked(field(torch.full((), time, dtype=dtype, device=x.device), x), x)


def _checked(velocity: Tensor, x: Tensor) -> Tensor:
    if velocity.shape != x.shape:
        raise ValueError(f"the field must return the shape of its states {tuple(x.shape)}, got {tuple(velocity.shape)}")
    return velocity.to(x.dtype)


def _advance(x: Tensor, size: float, weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            x = x + (size * weight) * slope
    return x
