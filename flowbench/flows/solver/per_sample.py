"""The Dormand-Prince pair with a time and a step size for every sample of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowbench.flows.solver.base import Field, Solution, SolverStats, checked_velocity

__all__ = ["AdaptiveFailure", "PerSampleSolve", "Tolerance"]

# Dormand and Prince 1980, table 2: the last row of A is the solution of order 5, and its slope starts the next step.
A: tuple[tuple[float, ...], ...] = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
# Order 5 minus order 4.
ERROR: tuple[float, ...] = (
    35 / 384 - 5179 / 57600,
    0.0,
    500 / 1113 - 7571 / 16695,
    125 / 192 - 393 / 640,
    -2187 / 6784 + 92097 / 339200,
    11 / 84 - 187 / 2100,
    -1 / 40,
)
ORDER = 5
SAFETY, LARGEST_CHANGE, SMALLEST_CHANGE = 0.9, 10.0, 0.2
# Steps below this share of the solve no longer move a time in float64.
SMALLEST_STEP = 1e-15


class AdaptiveFailure(RuntimeError):
    """A sample that cannot be integrated within the tolerance."""


@dataclass(frozen=True)
class Tolerance:
    """How large the error of one step of one sample may be.

    Attributes:
        rtol: relative tolerance.
        atol: absolute tolerance.
        parts: sizes of the parts of a flat state whose root mean squares are judged one by one, or None for all at
            once.
    """

    rtol: float
    atol: float
    parts: tuple[int, ...] | None = None

    def scale(self, *states: Tensor) -> Tensor:
        """The error allowed to each component, from the larger of the states."""
        size = states[0].abs() if len(states) == 1 else torch.maximum(states[0].abs(), states[1].abs())
        return self.atol + self.rtol * size

    def norm(self, errors: Tensor) -> Tensor:
        """Root mean square of each row (N, n) of errors in units of the scale, float64, shape (N,)."""
        parts = errors.detach().double().split(self.parts or errors.shape[1], 1)
        return torch.stack([part.square().mean(1) for part in parts]).amax(0).sqrt()


@dataclass
class _Walkers:
    """Samples under way.

    Attributes:
        rows: their index in the whole batch, shape (N,).
        t: their times, float64, shape (N,).
        step: lengths of their next steps, float64, > 0, shape (N,).
        x: their flat states, shape (N, n).
        slope: the velocities there, shape (N, n).
        target: index of the requested time they walk to, shape (N,).
        attempts: steps tried since the last requested time, shape (N,).
    """

    rows: Tensor
    t: Tensor
    step: Tensor
    x: Tensor
    slope: Tensor
    target: Tensor
    attempts: Tensor

    def select(self, keep: Tensor) -> _Walkers:
        return _Walkers(**{name: value[keep] for name, value in vars(self).items()})


class PerSampleSolve:
    """One solve of a batch, each sample by its own steps.

    Args:
        field: called with times of shape (N,); samples that have arrived are left out where it has ``select``.
        x: initial states, shape (B, *D).
        times: requested times, strictly monotonic.
        tolerance: of one step of one sample.
        max_steps: attempts of a sample between two requested times.

    References:
        Hairer, Norsett and Wanner 1993, Solving Ordinary Differential Equations I, section II.4 (step control and
        the first step).
    """

    def __init__(self, field: Field, x: Tensor, times: list[float], tolerance: Tolerance, max_steps: int) -> None:
        self.field = self.active_field = field
        self.shape = x.shape
        self.times = torch.tensor(times, dtype=torch.float64, device=x.device)
        self.sign = 1.0 if times[-1] > times[0] else -1.0
        self.length = abs(times[-1] - times[0])
        self.tolerance = tolerance
        self.max_steps = max_steps
        self.start = x
        self.accepted = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.rejected = torch.zeros_like(self.accepted)
        self.arrived: list[list[tuple[Tensor, Tensor]]] = [[] for _ in times]
        self.weights = {row: torch.tensor(row, dtype=x.dtype, device=x.device) for row in (*A, ERROR)}

    def run(self) -> Solution:
        """Walk until every sample has arrived at the last time.

        Raises:
            AdaptiveFailure: for a field that is not finite, too many steps, or a step too small to move the time.
        """
        walkers = self._first_step()
        while len(walkers.rows):
            self._attempt(walkers)
            walkers = self._without_arrived(walkers)
        states = torch.stack([self.start, *(self._gather(found) for found in self.arrived[1:])])
        evaluations = 6 * (self.accepted + self.rejected) + 2
        means = [count.double().mean().item() if len(count) else 0.0 for count in (self.accepted, self.rejected)]
        return Solution(states, SolverStats(6 * sum(means) + 2, means[0], means[1], evaluations))

    def _velocity(self, t: Tensor, x: Tensor) -> Tensor:
        state = x.view(len(x), *self.shape[1:])
        time = t.to(torch.promote_types(x.dtype, torch.float32))
        return checked_velocity(self.active_field(time, state), state).flatten(1)

    def _first_step(self) -> _Walkers:
        """Two evaluations: the slope, and a short Euler step that shows how fast it changes."""
        x = self.start.flatten(1)
        t = self.times[0].expand(len(x)).clone()
        slope = self._velocity(t, x)
        scale = self.tolerance.scale(x)
        size, speed = self.tolerance.norm(x / scale), self.tolerance.norm(slope / scale)
        if not speed.isfinite().all():
            raise AdaptiveFailure(f"the field is not finite at time {t[0].item() if len(t) else 0:g}")
        small = (size < 1e-5) | (speed < 1e-5)
        probe = torch.where(small, 1e-6, 0.01 * size / speed).clamp(max=self.length)
        ahead = self._velocity(t + self.sign * probe, x + _column(self.sign * probe, x) * slope)
        change = self.tolerance.norm((ahead - slope) / scale) / probe
        fastest = torch.maximum(speed, change)
        step = torch.where(fastest <= 1e-15, (1e-3 * probe).clamp(min=1e-6), (0.01 / fastest) ** (1 / ORDER))
        step = torch.minimum(100 * probe, step).nan_to_num(1e-6)
        rows = torch.arange(len(x), device=x.device)
        return _Walkers(rows, t, step, x, slope, torch.ones_like(rows), torch.zeros_like(rows))

    def _attempt(self, now: _Walkers) -> None:
        """Try one step of every sample and keep those within the tolerance."""
        under_way = now.target < len(self.times)
        goal = self.times[now.target.clamp(max=len(self.times) - 1)]
        lands = now.step >= (goal - now.t).abs()
        ahead = torch.where(lands, goal, now.t + self.sign * now.step)
        x, slope, ratio = self._stages(now, ahead)
        kept = (ratio <= 1) & under_way
        length = (ahead - now.t).abs()
        change = (SAFETY * ratio ** (-1 / ORDER)).nan_to_num(SMALLEST_CHANGE).clamp(SMALLEST_CHANGE, LARGEST_CHANGE)
        # A step that a requested time cut short is no reason to shorten the one that was planned.
        planned = torch.where(kept & lands, now.step, 0.0)
        step = torch.maximum(planned, length * torch.where(kept, change, change.clamp(max=1.0)))
        self.accepted[now.rows] += kept
        self.rejected[now.rows] += under_way & ~kept
        now.attempts = torch.where(kept & lands, 0, now.attempts + 1)
        self._check(now, under_way & ~kept & (step < SMALLEST_STEP * self.length), under_way)
        now.t = torch.where(kept, ahead, now.t)
        now.step = torch.where(under_way, step, now.step)
        now.x = torch.where(kept[:, None], x, now.x)
        now.slope = torch.where(kept[:, None], slope, now.slope)
        self._record(now, kept & lands)

    def _stages(self, now: _Walkers, ahead: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """State and slope at the end of the step, and its error in units of the tolerance."""
        size = _column(ahead - now.t, now.x)
        slopes = [now.slope]
        for row, c in zip(A, C, strict=True):
            x = now.x + size * (torch.stack(slopes, -1) @ self.weights[row])
            slopes.append(self._velocity((1 - c) * now.t + c * ahead, x))
        error = size * (torch.stack(slopes, -1) @ self.weights[ERROR])
        return x, slopes[-1], self.tolerance.norm(error / self.tolerance.scale(now.x, x))

    def _check(self, now: _Walkers, underflow: Tensor, under_way: Tensor) -> None:
        exhausted = under_way & (now.attempts >= self.max_steps)
        failed = underflow | exhausted
        if failed.any():
            first = int(failed.nonzero()[0])
            reason = "its step size underflows" if underflow[first] else f"max_steps={self.max_steps} is reached"
            raise AdaptiveFailure(f"sample {int(now.rows[first])} at time {now.t[first].item():.6g}: {reason}")

    def _record(self, now: _Walkers, landed: Tensor) -> None:
        """Note the states of samples that reached a requested time, and send them to the next."""
        for target in range(1, len(self.times)):
            here = landed & (now.target == target)
            if here.any():
                self.arrived[target].append((now.rows[here], now.x[here]))
        now.target = now.target + landed

    def _without_arrived(self, now: _Walkers) -> _Walkers:
        under_way = now.target < len(self.times)
        if under_way.all():
            return now
        if not under_way.any():
            return now.select(under_way)
        select = getattr(self.field, "select", None)
        if select is None:
            return now
        now = now.select(under_way)
        self.active_field = select(now.rows)
        return now

    def _gather(self, found: list[tuple[Tensor, Tensor]]) -> Tensor:
        """States in the order of the batch, from the samples in the order of their arrival."""
        if not found:  # an empty batch
            return self.start
        rows, states = torch.cat([rows for rows, _ in found]), torch.cat([states for _, states in found])
        return states[rows.argsort()].view(self.shape)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype)[:, None]
