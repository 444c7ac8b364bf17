"""The adaptive Dormand-Prince method: one step size for the batch, or one for each sample."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from flowbench.core.checks import check_count, check_number
from flowbench.core.no_solution import NoSolutionError
from flowbench.flows.solver.base import (
    Field,
    Refinement,
    Solution,
    Solver,
    SolverStats,
    check_memoryless,
    checked_times,
    checked_velocity,
    commit,
)
from flowbench.flows.solver.per_sample import AdaptiveFailure, PerSampleSolve, Tolerance

__all__ = ["DormandPrince"]


class DormandPrince(Solver):
    """The adaptive Dormand-Prince method of order 5 with an embedded error estimate of order 4.

    By default (torchdiffeq's dopri5) the step size follows one root-mean-square error over the whole batch, so the
    cost of a sample and its rounding depend on its batch; intermediate times come from a fourth-order interpolant.
    With ``per_sample`` every sample has its own time and step size: its result and cost do not depend on the others,
    intermediate times are landed on, and samples that have arrived cost nothing more where the field can go on
    without them (:class:`~flowbench.flows.solver.base.ConditionedField`). The field is never evaluated outside the
    requested times.

    Args:
        rtol: relative tolerance, in (0, 1].
        atol: absolute tolerance in units of the state, in (0, 1e12].
        max_steps: steps, >= 1, rejected ones included, between two requested times after which the solver gives up.
        per_sample: give every sample its own step size; the field is called with times of shape (B,).
        separate_divergence: let a likelihood's divergence keep the tolerance for itself, atol in nats; else it is one
            of d + 1 components of one error norm and hardly influences the steps where d is large.

    References:
        Dormand and Prince 1980, doi 10.1016/0771-050X(80)90013-3.

    Example:
        >>> solver = DormandPrince(rtol=1e-6, atol=1e-6)
        >>> solution = solver.solve(lambda t, x: x, torch.ones(1, 1), torch.tensor([0.0, 1.0]))
        >>> round(solution.states[-1].item(), 4)  # e
        2.7183
        >>> solution.stats.network_evaluations > 6
        True
    """

    order = 5
    evaluations_per_step = 6

    def __init__(
        self,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        max_steps: int = 10_000,
        per_sample: bool = False,
        separate_divergence: bool = False,
    ) -> None:
        check_number("rtol", rtol, above=0, at_most=1)
        check_number("atol", atol, above=0)
        check_count("max_steps", max_steps)
        self.rtol = rtol
        self.atol = atol
        self.max_steps = max_steps
        self.per_sample = per_sample
        self.separate_divergence = separate_divergence

    def solve(self, field: Field, x: Tensor, times: Tensor) -> Solution:
        """Integrate within the tolerances; see :meth:`Solver.solve`.

        Raises:
            NoSolutionError: if the step size underflows, the state is not finite or ``max_steps`` is reached.
        """
        requested = checked_times(times)
        try:
            return self._solve_each(field, x, requested) if self.per_sample else self._solve_all(field, x, requested)
        except (AssertionError, AdaptiveFailure) as error:
            reason = str(error).splitlines()[0][:120]
            raise NoSolutionError(
                f"{self!r} failed ({reason}): loosen the tolerances or look for a non-finite field"
            ) from error

    def _solve_each(self, field: Field, x: Tensor, times: list[float]) -> Solution:
        check_memoryless(field, "a step size per sample")
        tolerance = Tolerance(self.rtol, self.atol, self._parts(field))
        return PerSampleSolve(field, x, times, tolerance, self.max_steps).run()

    def _solve_all(self, field: Field, x: Tensor, times: list[float]) -> Solution:
        counted = _CountedField(field, times, self.max_steps)
        t = torch.tensor(times, dtype=torch.float64, device=x.device)
        # A forced step on the last time keeps the solver from overshooting it, where the field may not exist.
        options: dict[str, Any] = {"step_t": t[-1:], "max_num_steps": self.max_steps}
        parts = self._parts(field)
        if parts is not None:
            options["norm"] = _largest_of(parts)
        states = torchdiffeq.odeint(counted, x, t, rtol=self.rtol, atol=self.atol, method="dopri5", options=options)
        return Solution(states, counted.stats)

    def _parts(self, field: Field) -> tuple[int, ...] | None:
        """Sizes of the parts of a sample's state whose errors are judged one by one."""
        return getattr(field, "parts", None) if self.separate_divergence else None

    def with_evaluations(self, num_evaluations: int) -> Solver:
        """Always refused: the tolerances decide."""
        raise ValueError(
            f"{self!r} chooses its own number of evaluations and cannot use exactly {num_evaluations}: use a"
            " fixed-step solver"
        )

    def refined(self) -> Refinement:
        """A tenth of both tolerances, to which the error is in proportion while rounding does not limit it."""
        stricter = copy.copy(self)
        stricter.rtol, stricter.atol = self.rtol / 10, self.atol / 10
        return Refinement(stricter, 0.1, "a tenth of the tolerances")

    def __repr__(self) -> str:
        flags = [f", {name}=True" for name in ("per_sample", "separate_divergence") if getattr(self, name)]
        return f"DormandPrince(rtol={self.rtol:g}, atol={self.atol:g}{''.join(flags)})"


def _largest_of(parts: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """The largest of the root mean squares of the parts of a batch of states (B, sum of parts)."""

    def norm(errors: Tensor) -> Tensor:
        return torch.stack([part.square().mean().sqrt() for part in errors.split(parts, 1)]).max()

    return norm


# The evaluation that looks for the first step size; it alone may reach beyond the interval.
_PROBE = 2


class _CountedField:
    """Counts what torchdiffeq does to a field, and ends a solve that gets nowhere; callbacks have torchdiffeq's names.

    Its own ends are assertions, which ``python -O`` leaves out: the solve would go on for ever.
    """

    def __init__(self, field: Field, times: list[float], max_steps: int) -> None:
        self.field = field
        self.times, self.max_steps = times, max_steps
        self.first, self.last = min(times), max(times)
        self.evaluations = self.accepted = self.rejected = 0
        self.target, self.attempts = 0, 0

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self.evaluations += 1
        if self.evaluations == _PROBE:
            t = t.clamp(self.first, self.last)
        return checked_velocity(self.field(t, x), x)

    def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        time, size = float(t0.detach()), float(dt.detach())
        forward = self.times[-1] > self.times[0]
        reached = sum(requested <= time if forward else requested >= time for requested in self.times)
        self.attempts = 1 if reached != self.target else self.attempts + 1
        self.target = reached
        if self.attempts > self.max_steps:
            raise AdaptiveFailure(f"max_num_steps exceeded ({self.attempts}>{self.max_steps})")
        if not abs(time) + abs(size) > abs(time):
            raise AdaptiveFailure(f"underflow in dt {size:g} at time {time:g}")
        if not bool(y0.isfinite().all()):
            raise AdaptiveFailure(f"non-finite values in the state at time {time:g}")

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.accepted += 1
        commit(self.field, float(t0.detach()), y0)

    def callback_reject_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.rejected += 1

    @property
    def stats(self) -> SolverStats:
        return SolverStats(self.evaluations, self.accepted, self.rejected)
