"""What every solver shares: fields, solutions and their cost, and the checks of times and velocities."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from flowbench.core.checks import check_number

if TYPE_CHECKING:
    from flowbench.flows.path.base import Path

__all__ = [
    "ConditionedField",
    "Field",
    "Refinement",
    "Solution",
    "Solver",
    "SolverStats",
    "check_memoryless",
    "checked_times",
    "checked_velocity",
    "commit",
    "evaluate",
]

Field = Callable[[Tensor, Tensor], Tensor]
"""A velocity ``field(t, x)``: time and states of shape (B, *D) to velocities of shape (B, *D).

The time is a scalar; solvers with a step size per sample call with one time per sample, shape (B,). They take finished
samples out of the batch where the field has a method ``select(rows) -> Field``, see :class:`ConditionedField`.

A field that remembers the states of a solve, as a recurrent network does, has a method ``commit(t, x)``. It is called
exactly once for each accepted step, with the time (a float) and the state at the step's start, before the next step's
first evaluation; never for a stage inside of a step or for a step that was rejected. A fixed-step method has evaluated
the field at that very state, since the last commit. (An adaptive method re-uses its last slope for the next step, one
that was evaluated before the commit.) Its memory makes such a field something else than a velocity: what would lose the
commits, or is not defined for it, refuses it by :func:`check_memoryless`.
"""


class ConditionedField:
    """A field whose samples have conditions of their own, so that a solver may go on with some of the samples.

    Args:
        velocity: ``velocity(t, x, *conditions)``.
        conditions: one entry per sample each, shape (B, ...), or None.

    Example:
        >>> field = ConditionedField(lambda t, x, label: label[:, None] - x, torch.tensor([1.0, 2.0, 3.0]))
        >>> field(torch.tensor(0.0), torch.zeros(3, 1)).flatten()
        tensor([1., 2., 3.])
        >>> field.select(torch.tensor([2]))(torch.tensor(0.0), torch.zeros(1, 1))
        tensor([[3.]])
    """

    def __init__(self, velocity: Callable[..., Tensor], *conditions: Tensor | None) -> None:
        self.velocity = velocity
        self.conditions = conditions

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """The velocity, shape of x."""
        return self.velocity(t, x, *self.conditions)

    def select(self, rows: Tensor) -> ConditionedField:
        """The field of some samples, by their index, shape (N,)."""
        return ConditionedField(self.velocity, *(c if c is None else c[rows] for c in self.conditions))


@dataclass(frozen=True)
class SolverStats:
    """What a solve cost.

    Attributes:
        network_evaluations: evaluations of the field per sample, those of rejected steps included. The calls of the
            field, except with a step size per sample: then the mean over the samples. A guided field calls its
            network more than once: multiply by the evaluations of its guidance.
        accepted_steps: steps that were kept; a mean in the same case.
        rejected_steps: steps that an adaptive method threw away; a mean in the same case.
        sample_evaluations: evaluations of each sample, int64, shape (B,), with a step size per sample; else None.

    Example:
        >>> RungeKutta4(num_steps=5).solve(lambda t, x: x, torch.ones(1, 1), torch.tensor([0.0, 1.0])).stats
        SolverStats(network_evaluations=20, accepted_steps=5, rejected_steps=0, sample_evaluations=None)
    """

    network_evaluations: float
    accepted_steps: float
    rejected_steps: float
    sample_evaluations: Tensor | None = None


@dataclass(frozen=True)
class Solution:
    """States at the requested times, shape (T, B, *D), and their cost.

    Example:
        >>> solution = Euler(num_steps=2).solve(lambda t, x: x, torch.ones(1, 1), torch.tensor([0.0, 0.5, 1.0]))
        >>> solution.states.flatten()  # 1, 1.5 and 1.5^2
        tensor([1.0000, 1.5000, 2.2500])
        >>> solution.stats.network_evaluations
        2
    """

    states: Tensor
    stats: SolverStats


@dataclass(frozen=True)
class Refinement:
    """A stricter solve of the same equation, by which the error of a solver is estimated.

    Attributes:
        solver: the stricter one.
        remaining: share of the error that it keeps once the method converges at its order, in [0, 1).
        description: how it differs, for protocols, e.g. `twice the steps`.

    Raises:
        ValueError: for a share out of range.

    Example:
        >>> Heun(num_steps=4).refined()
        Refinement(solver=Heun(num_steps=8), remaining=0.25, description='twice the steps')
    """

    solver: Solver
    remaining: float
    description: str

    def __post_init__(self) -> None:
        check_number("remaining", self.remaining, at_least=0, below=1, hint="1 would be no refinement")


class Solver(ABC):
    """Integrates a field through given times, forward or backward.

    Attributes:
        order: order of convergence.
        evaluations_per_step: evaluations of the field that one step costs.
        any_field: whether the method integrates any field; false where it reads the velocity as that of a path.
        source_std: of a method that is right only for velocities learned between a Gaussian source of this standard
            deviation and data drawn independently of it; None of any other.

    Example:
        >>> solver: Solver = Heun(num_steps=1).with_evaluations(10)
        >>> solver.num_steps, solver.order
        (5, 2)
        >>> times = torch.tensor([1.0, 0.0])  # from the data back to the source
        >>> round(solver.solve(lambda t, x: x, torch.ones(1, 1), times).states[-1].item(), 2)  # exp(-1)
        0.37
    """

    order: int
    evaluations_per_step: int
    any_field: ClassVar[bool] = True
    source_std: float | None = None

    @abstractmethod
    def solve(self, field: Field, x: Tensor, times: Tensor) -> Solution:
        """Integrate from ``x`` at ``times[0]`` through all of ``times``.

        Args:
            field: the velocity, called with a scalar time on the device of x (see :data:`Field`).
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

    def refined(self) -> Refinement | None:
        """A stricter solve by the same method; None where it has none."""
        return None

    def for_path(self, path: Path) -> Solver:
        """The solver for velocities of a path: itself, unless the method needs the path's schedule.

        Raises:
            ValueError: for a path that such a method cannot follow.
        """
        return self


def checked_times(times: Tensor) -> list[float]:
    """Requested times as numbers.

    Raises:
        ValueError: unless they are strictly monotonic, two or more.
    """
    grid = times.detach().double().flatten().tolist() if times.ndim == 1 else []
    steps = [b - a for a, b in pairwise(grid)]
    if not steps or not (all(s > 0 for s in steps) or all(s < 0 for s in steps)):
        raise ValueError(
            f"times must be a strictly increasing or decreasing 1-D tensor of two or more, got {times.tolist()}"
        )
    return grid


def evaluate(field: Field, time: float, x: Tensor) -> Tensor:
    """The velocity at one time, which the field sees in the precision of x, at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return checked_velocity(field(torch.full((), time, dtype=dtype, device=x.device), x), x)


def commit(field: Field, time: float, x: Tensor) -> None:
    """Report the accepted step from states x at a time to a field that has a memory; see :data:`Field`."""
    remember = getattr(field, "commit", None)
    if remember is not None:
        remember(time, x)


def check_memoryless(field: Field, who: str) -> None:
    """Refuse a field whose velocity depends on the steps before.

    Raises:
        ValueError: it has a method ``commit``.
    """
    if hasattr(field, "commit"):
        raise ValueError(f"{who} needs a velocity of time and state alone, and this field remembers earlier steps")


def checked_velocity(velocity: Tensor, x: Tensor) -> Tensor:
    """The velocity in the dtype of the states.

    Raises:
        ValueError: if it has another shape.
    """
    if velocity.shape != x.shape:
        raise ValueError(f"the field must return the shape of its states {tuple(x.shape)}, got {tuple(velocity.shape)}")
    return velocity.to(x.dtype)
