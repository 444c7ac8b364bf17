"""Solvers for the diffusion view of a flow: DDIM, DPM-Solver++(2M) and a stochastic sampler.

They read the velocity as that of a path ``x_t = alpha(t) x_1 + sigma(t) x_0``, from which the expected data and source
points follow, and need its schedule: bind them with ``for_path``. They count steps and evaluations like every
fixed-step solver.
"""

from __future__ import annotations

import copy
import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from flowbench.core.checks import check_number, check_scale, check_seed
from flowbench.core.seeds import generator
from flowbench.flows.path.base import Path
from flowbench.flows.solver.base import Field, evaluate
from flowbench.flows.solver.fixed_step import Euler, FixedStepSolver, Step
from flowbench.flows.solver.time_grid import TimeGrid

__all__ = ["DDIM", "DPMSolverPlusPlus2M", "DiffusionChoice", "DiffusionSolver", "EulerMaruyama"]

DiffusionChoice = Literal["sigma", "path", "constant"]
# Steps whose noise a sample draws in one go, and the most numbers that it draws for them.
_STEPS_AT_ONCE, _NUMBERS_AT_ONCE = 64, 65_536


class Schedule(NamedTuple):
    """Coefficients of the path at one time, in float64, and its singularities."""

    alpha: float
    sigma: float
    d_alpha: float
    d_sigma: float

    @property
    def determinant(self) -> float:
        """What velocity and state are divided by to give the data and the source point."""
        return self.alpha * self.d_sigma - self.sigma * self.d_alpha

    @property
    def log_snr(self) -> float:
        """``log(alpha / sigma)``, infinite at the ends."""
        if self.alpha <= 0 or self.sigma <= 0:
            return -math.inf if self.alpha <= 0 else math.inf
        return math.log(self.alpha) - math.log(self.sigma)


class DiffusionSolver(FixedStepSolver):
    """A fixed-step solver with one evaluation per step that uses the schedule of its velocities' path.

    Args:
        num_steps: steps over the whole solve, 1 to 1e6.
        grid: where the steps end; None is :class:`~flowbench.flows.solver.time_grid.UniformGrid`.
    """

    any_field = False
    order = 1
    # The field is evaluated where Euler's method does; what is made of it follows from the path.
    tableau = Euler.tableau

    def __init__(self, num_steps: int, grid: TimeGrid | None = None) -> None:
        super().__init__(num_steps, grid)
        self.path: Path | None = None

    def for_path(self, path: Path) -> DiffusionSolver:
        """A copy for velocities of `path`.

        Raises:
            ValueError: for a path with noise of its own.
        """
        if path.needs_generator:
            raise ValueError(f"{self!r} cannot follow {path!r}, which adds noise of its own: use an ODE solver")
        bound = copy.copy(self)
        bound.path = path
        return bound

    def _schedule(self, steps: list[Step]) -> list[Schedule]:
        """The path at the start of every step and at the end of the last."""
        if self.path is None:
            raise ValueError(f"{self!r} needs the schedule of a path: bind it with for_path(path) before solving")
        times = torch.tensor([*(step.start for step in steps), steps[-1].stop], dtype=torch.float64)
        c = self.path.coefficients(times)
        schedule = [Schedule(*row) for row in torch.stack([c.alpha, c.sigma, c.d_alpha, c.d_sigma], 1).tolist()]
        for step, here in zip(steps, schedule, strict=False):
            if not (math.isfinite(here.determinant) and here.determinant):
                raise ValueError(
                    f"{self!r} cannot start a step at t = {step.start:g}, where {self.path!r} is singular: stay"
                    f" strictly inside {self.path.interval}"
                )
        return schedule

    def _walk(self, field: Field, x: Tensor, steps: list[Step]) -> Iterator[Tensor]:
        yield from self._follow(field, x, steps, self._schedule(steps))

    @abstractmethod
    def _follow(self, field: Field, x: Tensor, steps: list[Step], schedule: list[Schedule]) -> Iterator[Tensor]:
        """The state after each step."""


class DDIM(DiffusionSolver):
    """The deterministic sampler of diffusion models, order 1: ``x_u = alpha(u) E[x_1 | x_t] + sigma(u) E[x_0 | x_t]``.

    On the linear path it is Euler's method. It runs backward as well, from data to source.

    References:
        Song, Meng and Ermon 2021, arXiv 2010.02502, equation 12 with eta = 0.

    Example:
        >>> path = CosinePath()
        >>> field = lambda t, x: path.data_to_velocity(torch.full_like(x, 3.0), x, t)  # all data lie at 3
        >>> solver = DDIM(num_steps=2).for_path(path)
        >>> round(solver.solve(field, torch.zeros(1, 1), torch.tensor([0.0, 1.0])).states[-1].item(), 4)
        3.0
        >>> round(Euler(num_steps=2).solve(field, torch.zeros(1, 1), torch.tensor([0.0, 1.0])).states[-1].item(), 4)
        3.8378
    """

    def _follow(self, field: Field, x: Tensor, steps: list[Step], schedule: list[Schedule]) -> Iterator[Tensor]:
        for step, (here, there) in zip(steps, pairwise(schedule), strict=True):
            x = _first_order(x, evaluate(field, step.start, x), here, there)
            yield x


class DPMSolverPlusPlus2M(DiffusionSolver):
    """DPM-Solver++(2M), order 2 by one evaluation per step: it extrapolates the predicted data points of two steps.

    The extrapolation is linear in ``lambda = log(alpha / sigma)``. The first step, and any that touches an infinite
    lambda (alpha = 0 or sigma = 0, the first and the last of a whole flow), is of first order: DDIM's.

    References:
        Lu et al. 2022, arXiv 2211.01095, algorithm 2.

    Example:
        >>> field = lambda t, x: x * (5 * t - 1) / (4 * t**2 + (1 - t) ** 2)  # from N(0, 1) to N(0, 4): x_1 = 2 x_0
        >>> x0, times = torch.ones(1, 1), torch.tensor([0.0, 1.0])
        >>> for solver in (DDIM(num_steps=16), DPMSolverPlusPlus2M(num_steps=16)):
        ...     print(round(solver.for_path(LinearPath()).solve(field, x0, times).states[-1].item(), 2))
        1.82
        1.96
    """

    order = 2

    def _follow(self, field: Field, x: Tensor, steps: list[Step], schedule: list[Schedule]) -> Iterator[Tensor]:
        before, data_before = math.nan, torch.empty(0)
        for step, (here, there) in zip(steps, pairwise(schedule), strict=True):
            velocity = evaluate(field, step.start, x)
            data = (here.d_sigma / here.determinant) * x - (here.sigma / here.determinant) * velocity
            # The length of this step in units of the last one; nan at the first step.
            ratio = (there.log_snr - here.log_snr) / (here.log_snr - before)
            if math.isfinite(ratio) and math.isfinite(before):
                expected = (1 + ratio / 2) * data - (ratio / 2) * data_before
                scale = there.sigma / here.sigma
                x = scale * x + (there.alpha - here.alpha * scale) * expected
            else:
                x = _first_order(x, velocity, here, there)
            before, data_before = here.log_snr, data
            yield x


class EulerMaruyama(DiffusionSolver):
    """Euler-Maruyama steps of a stochastic differential equation with the marginals of the flow.

    ``dx = (v + w s) dt + sqrt(2 w) dW`` has the densities of dx = v dt for every w(t) >= 0, s the score of x_t. The
    score follows from the velocity for a Gaussian source that is *independent* of the data: trained with another
    coupling or source, the marginals are not those of the flow. The last step follows the flow alone, so that no noise
    stays in the samples. Data cannot be encoded.

    The noise of a sample is drawn from a generator keyed by `seed` and the float32 bytes of its initial state: it does
    not depend on the batch, the device or the precision of the solve, and equal initial states draw equal noise.

    Args:
        num_steps: steps over the whole solve, 1 to 1e6.
        grid: where the steps end; None is uniform.
        diffusion: w before eta: "sigma" is sigma(t), regular everywhere; "path" is that of the diffusion whose
            marginals the path has, ``sigma^2 alpha' / alpha - sigma sigma'`` (half the noise rate of a
            variance-preserving path), infinite where alpha = 0; "constant" is 1. All times the variance of the source.
        eta: factor of w, in [0, 1e12]; 0 is Euler's method.
        seed: of the noise, >= 0.
        source_std: standard deviation of each coordinate of the Gaussian source, in [1e-12, 1e12].

    References:
        Song et al. 2021, arXiv 2011.13456, appendix D.1 (the reverse process); Ma et al. 2024, arXiv 2401.08740,
        section 2 (any w, chosen after training).

    Example:
        >>> path, times = LinearPath(), torch.tensor([0.0, 1.0])
        >>> field = lambda t, x: path.data_to_velocity(torch.full_like(x, 3.0), x, t)  # all data lie at 3
        >>> solution = EulerMaruyama(num_steps=8, seed=0).for_path(path).solve(field, torch.zeros(1, 1), times)
        >>> round(solution.states[-1].item(), 4), solution.stats.network_evaluations
        (3.0, 8)
    """

    source_std: float

    def __init__(
        self,
        num_steps: int,
        grid: TimeGrid | None = None,
        diffusion: DiffusionChoice = "sigma",
        eta: float = 1.0,
        seed: int = 0,
        source_std: float = 1.0,
    ) -> None:
        super().__init__(num_steps, grid)
        if diffusion not in get_args(DiffusionChoice):
            raise ValueError(f"diffusion must be one of {', '.join(get_args(DiffusionChoice))}, got {diffusion!r}")
        check_number("eta", eta, at_least=0, hint="0 is the flow without noise")
        check_seed("seed", seed)
        check_scale("source_std", source_std)
        self.diffusion = diffusion
        self.eta = eta
        self.seed = seed
        self.source_std = source_std

    def _follow(self, field: Field, x: Tensor, steps: list[Step], schedule: list[Schedule]) -> Iterator[Tensor]:
        if steps[0].size < 0:
            raise ValueError(f"{self!r} cannot run backward from data to source: encode with an ODE solver")
        rates = [self._rate(step, here) for step, here in zip(steps[:-1], schedule, strict=False)]
        noise = _Noise(self.seed, x) if any(rates) else None
        for step, here, rate in zip(steps, schedule, [*rates, 0.0], strict=False):
            velocity = evaluate(field, step.start, x)
            if rate and noise:
                source = (here.alpha * velocity - here.d_alpha * x) / here.determinant
                spread = self.source_std * math.sqrt(2 * rate * here.sigma * step.size)
                x = x + step.size * (velocity - rate * source) + spread * noise.draw(x)
            else:
                x = x + step.size * velocity
            yield x

    def _rate(self, step: Step, here: Schedule) -> float:
        """The ratio ``w / (sigma source_std^2)``: ``w s`` is minus this times the expected source point."""
        if self.diffusion == "sigma":
            return self.eta
        if self.diffusion == "constant":
            return self.eta / here.sigma
        if here.alpha == 0:
            raise ValueError(
                f'diffusion="path" is infinite at t = {step.start:g} of {self.path!r}, where alpha = 0: use "sigma"'
            )
        return self.eta * (here.sigma * here.d_alpha / here.alpha - here.d_sigma)

    def __repr__(self) -> str:
        extra = f", diffusion={self.diffusion!r}, eta={self.eta:g}"
        extra += f", seed={self.seed}" if self.seed else ""
        extra += f", source_std={self.source_std:g}" if self.source_std != 1 else ""
        return super().__repr__()[:-1] + extra + ")"


def _first_order(x: Tensor, velocity: Tensor, here: Schedule, there: Schedule) -> Tensor:
    """Keep the expected data and source points of the velocity and move their coefficients."""
    from_state = there.alpha * here.d_sigma - there.sigma * here.d_alpha
    from_velocity = there.sigma * here.alpha - there.alpha * here.sigma
    return (from_state / here.determinant) * x + (from_velocity / here.determinant) * velocity


class _Noise:
    """Standard normals with a stream of its own for every sample of a batch, always drawn in float32.

    A stream gives the noise of several steps at once, as many as the size of one sample allows, so that what a sample
    sees depends on nothing but the seed and its initial state.
    """

    def __init__(self, seed: int, x: Tensor) -> None:
        # Adding zero turns -0.0 into 0.0, which is the same point.
        rows = (x.detach().float() + 0.0).cpu().contiguous()
        digests = (hashlib.blake2b(row.numpy().tobytes(), digest_size=16).hexdigest() for row in rows)
        self.streams = [generator(seed, "diffusion", digest) for digest in digests]
        self.shape = x.shape[1:]
        self.steps = max(1, min(_STEPS_AT_ONCE, _NUMBERS_AT_ONCE // max(1, self.shape.numel())))
        self.drawn: list[Tensor] = []

    def draw(self, x: Tensor) -> Tensor:
        """The noise of the next step, like x."""
        if not self.drawn:
            parts = [torch.randn(self.steps, *self.shape, generator=stream) for stream in self.streams]
            self.drawn = list(torch.stack(parts, 1).to(x).flip(0)) if parts else [x] * self.steps
        return self.drawn.pop()
