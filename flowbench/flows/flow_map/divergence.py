"""Average divergences of a flow along its jumps: what teaches them, and the density that they give.

Beside its average velocity u(x, s, t) a flow has the average divergence along the path that starts at x,
``(t - s) d(x, s, t)`` is the integral of ``div b(X(x, s, r), r)`` over r from s to t. So ``d(x, t, t) = div b(x, t)``,
``log p_t(X(x, s, t)) = log p_s(x) - (t - s) d(x, s, t)``, and of two jumps in place of one the average divergence is
the mean, weighted by their lengths. Here d is per dimension: the whole divergence is that of all dimensions times d.

References:
    Ai et al. 2025, F2D2, arXiv 2512.02636.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from flowbench.core.autocast import autocast_off
from flowbench.core.checks import check_count
from flowbench.flows.flow_map.derivative import spread
from flowbench.flows.flow_map.jumps import MOST_JUMPS
from flowbench.flows.likelihood.change_of_variables import Likelihood
from flowbench.flows.likelihood.divergence import Divergence

__all__ = ["JointMap", "differentiable", "divergence_target", "jumped_log_likelihood", "two_jump_divergence"]

JointMap = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(u, d)(x, s, t)``: states (B, *D) at times s (B,), and where their jumps end, t (B,), to average velocities (B, *D)
and average divergences per dimension (B,)."""


@contextmanager
def differentiable(device: torch.device) -> Iterator[None]:
    """A context in which velocities can be differentiated by their states: also in validation, and in full precision.

    Tensors from outside that a network keeps (labels, say) must not be inference tensors.

    Args:
        device: where the network runs.
    """
    # The backward pass of a compiled network would go to its weights too.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        autocast_off(device),
        torch.compiler.set_stance("force_eager"),
    ):
        yield


def divergence_target(velocity: Tensor, x: Tensor, divergence: Divergence, generator: torch.Generator | None) -> Tensor:
    """The divergence of a field per dimension, shape (B,), without gradient: what d(x, t, t) is to be.

    Args:
        velocity: of the field, shape (B, *D), with the graph that leads to x; see :func:`differentiable`.
        x: states, shape (B, *D), that require a gradient.
        divergence: exact or estimated; what is regressed on unbiased estimates is right on average.
        generator: draws the probes of an estimate.
    """
    products = divergence.products(velocity, x, divergence.probes(x, generator))
    total = divergence.reduce(divergence.integrand(products))[0]
    return (total / x.shape[1:].numel()).to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def two_jump_divergence(flow: JointMap, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The average divergence of two jumps that meet half way: what d(x, s, t) is to be, shape (B,), without gradient.

    Args:
        flow: average velocities and divergences.
        x: states, shape (B, *D).
        start: their times, shape (B,).
        end: where the jumps end, shape (B,), before or after the start.
    """
    middle = (start + end) / 2
    velocity, first = flow(x, start, middle)
    between = x + spread(middle - start, x) * velocity
    return (first + flow(between, middle, end)[1]) / 2


@torch.no_grad()
def jumped_log_likelihood(
    flow: JointMap, x: Tensor, source_log_prob: Callable[[Tensor], Tensor], num_jumps: int
) -> Likelihood:
    """The log-density of data by jumps of equal length from time 1 to the source, one evaluation each.

    ``log p_1(x) = log p_0(x_0) + sum_i (t_{i+1} - t_i) d_i`` over falling times, d_i the whole average divergence of
    a jump: less the divergence on the way from the source to the data. A learned d makes this no density: nothing holds
    its integral at 1, nor its mean below the entropy.

    Args:
        flow: average velocities and divergences.
        x: data, shape (B, *D).
        source_log_prob: log-density of the source, ``(B, *D) -> (B,)`` in nats.
        num_jumps: how many, 1 to 1e6.

    Returns:
        Log-densities with their cost.

    Raises:
        ValueError: for a number out of range.
    """
    check_count("num_jumps", num_jumps, at_most=MOST_JUMPS)
    num_dims, change = x.shape[1:].numel(), x.new_zeros(len(x), dtype=torch.float64)
    dtype = torch.promote_types(x.dtype, torch.float32)
    times = [number / num_jumps for number in range(num_jumps, -1, -1)]
    for start, end in pairwise(times):
        first, last = (torch.full((len(x),), time, dtype=dtype, device=x.device) for time in (start, end))
        velocity, divergence = flow(x, first, last)
        x = x + (end - start) * velocity.to(x.dtype)
        change += (end - start) * num_dims * divergence.double()
    return Likelihood(source_log_prob(x).double() + change, x, float(num_jumps), None)
