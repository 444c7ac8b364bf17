"""Network evaluations of a sampler: counted, and spent to the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from flowbench.flows import FixedStepSolver, Guidance, RescheduledField, Solver

__all__ = ["CountedNetwork", "fixed_cost", "guided_cost", "single_evaluation", "spending", "with_evaluations"]

Sampler = TypeVar("Sampler")


class CountedNetwork:
    """Counts the samples that a network evaluates."""

    def __init__(self, network: Callable[..., Tensor]) -> None:
        self.network = network
        self.rows = 0

    def __call__(self, x: Tensor, *rest: Tensor | None) -> Tensor:
        """The velocity of states (B, *D)."""
        self.rows += len(x)
        velocity: Tensor = self.network(x, *rest)
        return velocity


def single_evaluation(t: float) -> int:
    """Network evaluations of a velocity that is not guided."""
    return 1


def guided_cost(guide: Guidance, moved: RescheduledField | None) -> Callable[[float], int]:
    """Network evaluations of a guided velocity at a time of the samples' path; guidance sees the trained one."""

    def evaluations(t: float) -> int:
        clock = t if moved is None else float(moved.trained_time(torch.tensor(t, dtype=torch.float64)))
        return guide.evaluations_at(clock)

    return evaluations


def with_evaluations(solver: Solver, budget: int, cost: Callable[[float], int], times: Tensor) -> Solver:
    """The solver that spends exactly `budget` network evaluations per sample.

    Args:
        solver: the method.
        budget: how many.
        cost: network evaluations of one velocity at a time, 1 or 2.
        times: first and last time of the solve.

    Raises:
        ValueError: when there is none.
    """
    if cost is single_evaluation:
        return solver.with_evaluations(budget)

    def evaluations(candidate: Solver) -> int:
        assert isinstance(candidate, FixedStepSolver), "an adaptive solver takes no budget"
        return sum(cost(t) for t in candidate.stage_times(times))

    return spending(budget, solver.with_evaluations, evaluations, repr(solver), "velocity")


def spending(
    budget: int,
    with_calls: Callable[[int], Sampler],
    evaluations: Callable[[Sampler], int],
    name: str,
    call: str,
) -> Sampler:
    """The sampler that spends exactly `budget` network evaluations per sample, where some calls take one, others two.

    Args:
        budget: how many.
        with_calls: makes the sampler of a number of calls; a ValueError says that there is none.
        evaluations: network evaluations of a sampler, one or two a call.
        name: of the sampler, for the message.
        call: what a call is, for the message.

    Raises:
        ValueError: when there is none.
    """
    # A guided call may cost twice as much at some times only: their number follows from no single cost.
    for calls in range(budget, (budget - 1) // 2, -1):
        try:
            candidate = with_calls(calls)
        except ValueError:
            continue
        if evaluations(candidate) == budget:
            return candidate
    raise ValueError(
        f"guided samples of {name} cannot spend exactly {budget} network evaluations: a guided {call} takes two"
    )


def fixed_cost(solver: Solver) -> float | None:
    """Evaluations of a solver that knows them before it starts; None for an adaptive one."""
    return float(solver.num_steps * solver.evaluations_per_step) if isinstance(solver, FixedStepSolver) else None
