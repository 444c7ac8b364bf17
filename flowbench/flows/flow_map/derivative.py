"""Derivatives of an average velocity by its inputs: forward-mode automatic differentiation, or differences.

Forward mode runs with attention as plain products (the fused kernels have no forward derivative) and with autocast off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowbench.core.autocast import autocast_off

__all__ = [
    "STEP",
    "AverageVelocity",
    "Derivative",
    "check_derivative",
    "forward_derivative",
    "spread",
    "total_derivative",
]

Derivative = Literal["jvp", "difference"]

AverageVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``u(x, s, t)``: states (B, *D) at times s (B,), and where their jumps end, t (B,), to velocities (B, *D)."""

# Half of the distance in time of two evaluations: the fastest feature of time turns at 100 rad per unit.
STEP = 1e-3


def check_derivative(value: object) -> None:
    """Refuse (ValueError) what is no method of differentiation."""
    if value not in get_args(Derivative):
        raise ValueError(f"derivative must be one of {', '.join(get_args(Derivative))}, got {value!r}")


def spread(times: Tensor, x: Tensor) -> Tensor:
    """Times (B,) in the shape of states (B, *D), for products with them."""
    return times.view(-1, *[1] * (x.ndim - 1))


def total_derivative(
    u: AverageVelocity,
    x: Tensor,
    start: Tensor,
    end: Tensor,
    direction: Tensor,
    method: Derivative,
    step: float = STEP,
) -> Tensor:
    """The derivative ``d_s u + (d_x u) w`` along a direction w at a fixed end, without gradients.

    Args:
        u: the average velocity.
        x: states, shape (B, *D).
        start: their times s, shape (B,).
        end: where the jumps end, shape (B,).
        direction: w, shape (B, *D).
        method: `jvp`, or `difference`: central, one-sided at time 0 and where the start would pass the end.
        step: of the differences in time.

    Returns:
        Shape (B, *D).

    Raises:
        ValueError: for a network with an operation that has no forward derivative.
    """
    with torch.no_grad():
        if method == "jvp":
            tangents = (direction, torch.ones_like(start))
            return forward_derivative(lambda x, s: u(x, s, end), (x, start), tangents)[1]
        with autocast_off(x.device):
            before, after = (start - step).clamp(min=0), torch.minimum(start + step, end)
            low = u(x + spread(before - start, x) * direction, before, end)
            high = u(x + spread(after - start, x) * direction, after, end)
            return (high - low) / spread(after - before, x)


def forward_derivative(
    function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The value of a function and its derivative along tangents, by forward-mode differentiation.

    Gradients reach what the function depends on, through both results, where they are enabled.

    Args:
        function: of the primals.
        primals: where it is evaluated.
        tangents: a direction for each.

    Raises:
        ValueError: for an operation without a forward derivative.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH), autocast_off(primals[0].device):
            # A primal that is a view with repeated memory is refused.
            found = jvp(function, tuple(primal.clone() for primal in primals), tangents)
    except NotImplementedError as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"the network has no forward derivative ({reason}): set derivative: difference") from None
    return found[0], found[1]
