"""Likelihood of a continuous flow by the instantaneous change of variables, and bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowbench.core.checks import check_count, check_interval, check_scale
from flowbench.flows.likelihood.divergence import Divergence, Generators
from flowbench.flows.solver.base import Field, Solver, check_memoryless, checked_velocity

__all__ = [
    "Likelihood",
    "bits_per_dim",
    "log_likelihood",
    "sample_with_log_prob",
]


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihood of a batch under a continuous flow.

    Attributes:
        log_prob: log-density in nats, float64, shape (B,).
        source: the points at the source end that flow to x, shape (B, *D).
        network_evaluations: evaluations of the field per sample; each also costs the backward passes of the probes.
        probe_standard_error: standard error of log_prob over the probes, in nats, shape (B,); None for an
            exact divergence or a single probe. The error of the solver is not included.

    Example:
        >>> source, x = GaussianSource(), torch.tensor([[torch.e]])
        >>> field = lambda t, x: x  # x_1 = e x_0
        >>> likelihood = log_likelihood(field, x, source.log_prob, RungeKutta4(num_steps=20), ExactDivergence())
        >>> round(likelihood.source.item(), 4), likelihood.network_evaluations
        (1.0, 80)
        >>> likelihood.log_prob  # ln N(1; 0, 1) - 1
        tensor([-2.4189], dtype=torch.float64)
    """

    log_prob: Tensor
    source: Tensor
    network_evaluations: float
    probe_standard_error: Tensor | None


def log_likelihood(
    field: Field,
    x: Tensor,
    source_log_prob: Callable[[Tensor], Tensor],
    solver: Solver,
    divergence: Divergence,
    generator: Generators | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Likelihood:
    """Log-likelihood of data under the flow of a field (Chen et al. 2018, arXiv 1806.07366, equation 8).

    Integrates ``d log p / dt = -div v`` from the data back to the source, the state and the divergence
    accumulated in float64 while the field sees the dtype of x. Works under ``torch.no_grad`` and
    ``torch.inference_mode``; tensors that the field closes over (labels, say) must not themselves be
    inference tensors. The result carries no gradient. Use eval mode (no dropout) and full precision. An adaptive
    solver controls one error norm over states and divergences of the whole batch;
    ``DormandPrince(per_sample=True, separate_divergence=True)`` controls each by itself.

    Args:
        field: the velocity ``field(t, x)``, differentiable in x.
        x: data points, floating point, shape (B, *D).
        source_log_prob: log-density of the source, ``(B, *D) -> (B,)`` in nats.
        solver: integrates from ``interval[1]`` to ``interval[0]``.
        divergence: exact or estimated.
        generator: draws the probes of an estimated divergence; one generator per sample makes the result of a
            sample independent of its batch; an exact divergence needs none.
        interval: source and data time in [0, 1]; a path that is singular at an end needs its own ``interval``.

    Returns:
        Log-density of x at time ``interval[1]`` with its cost and error.

    Raises:
        ValueError: for a solver that integrates velocities of a path only.
    """
    check_interval("interval", interval, hint="the source's time, then the data's")
    flow = _integrate(field, x, solver, divergence, generator, (interval[1], interval[0]))
    # Integrated backward, the change holds minus the integral over increasing time.
    log_prob = source_log_prob(flow.end).double() + flow.change
    return Likelihood(log_prob, flow.end, flow.network_evaluations, flow.standard_error)


def sample_with_log_prob(
    field: Field,
    x0: Tensor,
    source_log_prob: Callable[[Tensor], Tensor],
    solver: Solver,
    divergence: Divergence,
    generator: Generators | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
) -> tuple[Tensor, Likelihood]:
    """Carry source points to the data end and compute their log-density there, in one pass.

    The density is that of the flow which the solver follows, up to the solver's error, as in :func:`log_likelihood`;
    both agree as the steps shrink.

    Args:
        field: see :func:`log_likelihood`.
        x0: source points, floating point, shape (B, *D).
        source_log_prob: see :func:`log_likelihood`.
        solver: integrates from ``interval[0]`` to ``interval[1]``.
        divergence: exact or estimated.
        generator: see :func:`log_likelihood`.
        interval: source and data time in [0, 1].

    Returns:
        The samples, shape (B, *D), and their likelihood, whose ``source`` is x0.

    Raises:
        ValueError: for a solver that integrates velocities of a path only.
    """
    check_interval("interval", interval, hint="the source's time, then the data's")
    flow = _integrate(field, x0, solver, divergence, generator, interval)
    log_prob = source_log_prob(x0).double() - flow.change
    return flow.end, Likelihood(log_prob, x0, flow.network_evaluations, flow.standard_error)


def bits_per_dim(log_prob: Tensor, num_dims: int, bin_width: float) -> Tensor:
    """Bits per dimension of uniformly dequantised integers: ``-log p(x) / (D ln 2) - log2(bin width)``.

    Args:
        log_prob: log-density of the dequantised points in nats, any shape.
        num_dims: D, the number of dimensions, >= 1.
        bin_width: width of one level in the units of x, in [1e-12, 1e12]: 2 / 256 for 8-bit images in [-1, 1).

    Returns:
        An upper bound on the negative log-likelihood of the integers, in bits per dimension, same shape.

    Raises:
        ValueError: for a number out of range.

    References:
        Theis, van den Oord and Bethge 2016, arXiv 1511.01844, section 3.1.
    """
    check_count("num_dims", num_dims)
    check_scale("bin_width", bin_width)
    return -log_prob / (num_dims * math.log(2)) - math.log2(bin_width)


@dataclass(frozen=True)
class _Flow:
    """End of a solve: points (B, *D), the integral of the divergence over time (B,), its error, and the cost."""

    end: Tensor
    change: Tensor
    standard_error: Tensor | None
    network_evaluations: float


def _integrate(
    field: Field,
    x: Tensor,
    solver: Solver,
    divergence: Divergence,
    generator: Generators | None,
    interval: tuple[float, float],
) -> _Flow:
    check_memoryless(field, "a density by change of variables")
    if not solver.any_field:
        raise ValueError(f"{solver!r} has no likelihood, it follows velocities of a path only: use RungeKutta4, say")
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().detach()
        augmented = _AugmentedField(field, divergence, divergence.probes(x, generator), x.shape[1:], x.dtype)
        times = torch.tensor(interval, dtype=torch.float64)
        solution = solver.solve(augmented, augmented.start(x), times)
    end, integrals = augmented.unpack(solution.states[-1])
    change, error = divergence.reduce(integrals)
    return _Flow(end, change, error, solution.stats.network_evaluations)


@dataclass
class _AugmentedField:
    """Velocity and divergence as one flat float64 state of shape (B, d + M)."""

    field: Field
    divergence: Divergence
    probes: Tensor
    shape: torch.Size
    dtype: torch.dtype

    def __post_init__(self) -> None:
        # Some of the samples can be left out only where the field itself can do without them.
        inner = getattr(self.field, "select", None)
        if inner is not None:
            self.select = lambda rows: replace(self, field=inner(rows), probes=self.probes[:, rows])
        # Sizes of the two parts of a state, whose errors an adaptive solver may judge one by one.
        num_integrals = len(self.divergence.integrand(self.probes.new_zeros(len(self.probes), 1)))
        self.parts = (self.shape.numel(), num_integrals)

    def start(self, x: Tensor) -> Tensor:
        """The state of points x, nothing integrated yet."""
        return torch.cat([x.flatten(1).double(), x.new_zeros(len(x), self.parts[1], dtype=torch.float64)], 1)

    def unpack(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Points (B, *D) and integrals (M, B)."""
        points, integrals = state.split(self.parts, 1)
        return points.to(self.dtype).view(len(state), *self.shape), integrals.T

    def __call__(self, t: Tensor, state: Tensor) -> Tensor:
        x = self.unpack(state)[0].detach().requires_grad_()
        # The backward pass of a compiled network goes once, over one vector; and it would go to the weights too.
        with torch.compiler.set_stance("force_eager"):
            velocity = checked_velocity(self.field(t.to(torch.promote_types(self.dtype, torch.float32)), x), x)
        products = self.divergence.products(velocity, x, self.probes)
        slopes = self.divergence.integrand(products)
        return torch.cat([velocity.detach().flatten(1).double(), slopes.T.double()], 1)
