"""A trained field sampled along another path: the scale-time transform.

Two affine paths of one coupling differ only in the scale of their points and in their clock: where both have the same
ratio alpha / sigma, the point of one is a multiple of the point of the other (Lipman et al. 2024, arXiv 2412.06264;
Pokle et al. 2023, arXiv 2310.04432).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowbench.flows.path.base import Path, PathCoefficients
from flowbench.flows.solver.base import Field, check_memoryless

__all__ = ["RescheduledField"]


class RescheduledField:
    """The velocity of a new path from the velocity of the path that a model was trained with.

    At the new time r the trained clock shows ``t = lambda^-1(lambda_new(r))``, lambda = log(alpha / sigma), and new
    points are ``s = sigma_new(r) / sigma(t)`` times trained ones, so that the new velocity is ``(s' / s) x + s t' u(t,
    x / s)``. From ``start(z0)`` over ``interval``, then ``finish``, an exact solver ends where the trained field ends
    from z0 if the new path reaches every signal-to-noise ratio of the trained one; linear and cosine paths reach all. A
    path that does not (a diffusion, Lipman's with sigma_min > 0) has the error at its ends that it always has.
    No call reads a value back from the device.

    Attributes:
        interval: times of the new path between which the transformed field exists; integrate over them.
        start_scale: factor of a source point at the first time.
        finish_scale: factor of the state at the last time.

    Args:
        field: the trained velocity ``field(t, x)``.
        trained: the path of the training.
        path: the path to sample along.

    Raises:
        ValueError: if the field has a memory, if a path has noise of its own or no closed form for its clock, or if no
            signal-to-noise ratio is shared.

    Example:
        >>> field = lambda t, x: x * (5 * t - 1) / (4 * t**2 + (1 - t) ** 2)  # from N(0, 1) to N(0, 4) along lines
        >>> rescheduled = RescheduledField(field, trained=LinearPath(), path=CosinePath())
        >>> times = torch.tensor([0.0, 0.5, 1.0])
        >>> rescheduled.trained_time(times)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
        >>> solution = RungeKutta4(num_steps=20).solve(rescheduled, torch.ones(1, 1), times)
        >>> solution.states.flatten()  # 1, sqrt(5 / 2) and 2: the end of the trained field
        tensor([1.0000, 1.5811, 2.0000])
    """

    def __init__(self, field: Field, trained: Path, path: Path) -> None:
        check_memoryless(field, "sampling along another path")
        self.field = field
        self.trained = trained
        self.path = path
        self._reach = _reach(trained)
        self.interval = self._shared_interval()
        first, last = (torch.tensor(r, dtype=torch.float64) for r in self.interval)
        known_first, known_last = (torch.tensor(t, dtype=torch.float64) for t in trained.interval)
        # A source point stands for sigma x0 alone and the end for alpha x1 alone; both factors are 1 where the paths
        # themselves begin in the source and end in the data.
        self.start_scale = float(path.coefficients(first).sigma / trained.coefficients(known_first).sigma)
        self.finish_scale = float(trained.coefficients(known_last).alpha / path.coefficients(last).alpha)

    def select(self, rows: Tensor) -> RescheduledField:
        """The field of some samples, by their index, for solvers with a step size per sample."""
        select = getattr(self.field, "select", None)
        return self if select is None else RescheduledField(select(rows), self.trained, self.path)

    def start(self, source: Tensor) -> Tensor:
        """State at the first time of ``interval`` for source points of shape (B, *D)."""
        return source if self.start_scale == 1 else self.start_scale * source

    def finish(self, x: Tensor) -> Tensor:
        """Data points for states of shape (B, *D) at the last time of ``interval``."""
        return x if self.finish_scale == 1 else self.finish_scale * x

    def trained_time(self, t: Tensor) -> Tensor:
        """Times of the trained path for times of the new path, float64: those that the trained field receives."""
        # Outside the interval by rounding at most: the trained field is not evaluated outside its own.
        log_snr = self.path.log_snr(t).clamp(*self._reach)
        # Without the check of the reach, which is kept here: on a GPU every call would wait for its result.
        return self.trained._time_of_log_snr(log_snr).clamp(*self.trained.interval)

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """Velocity of the new path at a time, a scalar or of shape (B,), and states of shape (B, *D)."""
        clock = self.trained_time(t)
        old, new = self.trained.coefficients(clock), self.path.coefficients(t.double())
        scale, d_scale, d_clock = _transform(old, new)
        rate, pace, scale = (_like(v, x) for v in (d_scale / scale, scale * d_clock, scale))
        return rate * x + pace * self.field(clock.to(t.dtype), x / scale)

    def _shared_interval(self) -> tuple[float, float]:
        """Times of the new path at whose signal-to-noise ratios the trained field exists."""
        ours, theirs = _reach(self.path), self._reach
        low, high = max(ours[0], theirs[0]), min(ours[1], theirs[1])
        if not low < high:
            raise ValueError(
                f"{self.path!r} and {self.trained!r} share no signal-to-noise ratio, log(alpha / sigma) is"
                f" {ours[0]:g} to {ours[1]:g} and {theirs[0]:g} to {theirs[1]:g}: sample along another path"
            )
        first, last = self.path.interval
        met = self.path.time_of_log_snr(torch.tensor([low, high], dtype=torch.float64)).tolist()
        return (first if ours[0] == low else met[0], last if ours[1] == high else met[1])


def _reach(path: Path) -> tuple[float, float]:
    """log(alpha / sigma) at both ends of the path's interval."""
    low, high = path.log_snr(torch.tensor(path.interval, dtype=torch.float64)).tolist()
    return low, high


def _transform(old: PathCoefficients, new: PathCoefficients) -> tuple[Tensor, Tensor, Tensor]:
    """Scale s of the points, its rate s', and the rate t' of the clock.

    ``new = s old`` holds for both coefficients; its time derivative is a linear system for s' and t'. Solved like this
    nothing is divided by a coefficient that vanishes at an end.
    """
    scale = torch.hypot(new.alpha, new.sigma) / torch.hypot(old.alpha, old.sigma)
    determinant = old.alpha * old.d_sigma - old.sigma * old.d_alpha
    d_scale = (new.d_alpha * old.d_sigma - new.d_sigma * old.d_alpha) / determinant
    d_clock = (old.alpha * new.d_sigma - old.sigma * new.d_alpha) / (scale * determinant)
    return scale, d_scale, d_clock


def _like(value: Tensor, x: Tensor) -> Tensor:
    if value.ndim == 0:  # a time for all states: a number, which may lie on another device than they
        return value.to(x.dtype)
    return value.to(x.dtype).reshape(value.shape + (1,) * (x.ndim - value.ndim))
