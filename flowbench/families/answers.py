"""What a flow gives: samples with their cost, paths, and its log-density by other solves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from flowbench.core.checks import check_number
from flowbench.families.conditioning.condition import Condition
from flowbench.flows import Likelihood

__all__ = ["FlowSamples", "SolvedDensity", "Trajectory"]


@dataclass(frozen=True)
class FlowSamples:
    """Samples with their cost.

    Attributes:
        x: samples: of :meth:`FlowModule.sample` in data space, shape (B, *D); of :meth:`FlowModule.flow_sample` where
            the flow lives, shape (B, *flow_shape).
        network_evaluations: evaluations of the network that each sample cost; a guided one counts twice.
        iterations: network calls that each sample needed in each block of a block flow, shape (K, B); None elsewhere.
        residual: the certificate of an inverse that computes one, max |f(x) - z| of each sample, shape (B,), before
            denoising; None elsewhere.
        seconds: wall time of the batch, which :meth:`FlowModule.sample` measures.

    Example:
        >>> samples = FlowSamples(x=torch.zeros(3, 2), network_evaluations=8.0)
        >>> samples.x.shape, samples.iterations
        (torch.Size([3, 2]), None)
    """

    x: Tensor
    network_evaluations: float
    iterations: Tensor | None = None
    residual: Tensor | None = None
    seconds: float = 0.0


@dataclass
class Trajectory:
    """States of a flow from source to data, in the space where the flow lives.

    Attributes:
        states: shape (T, B, *D); the first is the source point, the last the flow's output.
        times: shape (T,), from 0 to 1 (a path that is singular at 1 ends just before); block flows give each
            block an equal share.
        velocities: of a continuous flow at those states, shape (T, B, *D); None for a block flow.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import DataSpec
        >>> from flowbench.networks import MLP
        >>> flow = FlowMatching(DataSpec("points", "1", (2,)), partial(MLP, width=16, depth=1))
        >>> trajectory = flow.trajectory(torch.zeros(3, 2), num_points=5)
        >>> trajectory.states.shape, trajectory.times
        (torch.Size([5, 3, 2]), tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64))
    """

    states: Tensor
    times: Tensor
    velocities: Tensor | None = None


@dataclass(frozen=True)
class SolvedDensity:
    """The log-density of a flow by a solve that is not the one of its own likelihoods.

    Attributes:
        solve: from points (B, *flow_shape), their condition, their indices (B,) and the evaluation seed to the
            likelihood; random numbers are those of :meth:`FlowModule.flow_log_prob`.
        method: solver and divergence, or how a refined solve differs, for protocols.
        remaining: share of the error that a refined solve keeps, in [0, 1); see :class:`~flowbench.flows.Refinement`.

    Raises:
        ValueError: for a share out of range.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import DataSpec
        >>> from flowbench.networks import MLP
        >>> flow = FlowMatching(DataSpec("points", "1", (2,)), partial(MLP, width=16, depth=1))
        >>> stricter = flow.solved_density(refined=True)  # the flow's own solver takes 32 steps
        >>> stricter.method, stricter.remaining
        ('twice the steps', 0.0625)
        >>> stricter.solve(torch.zeros(1, 2), Condition(), torch.arange(1), 0).log_prob
        tensor([-1.8379], dtype=torch.float64)
    """

    solve: Callable[[Tensor, Condition, Tensor, int], Likelihood]
    method: str
    remaining: float = 0.0

    def __post_init__(self) -> None:
        check_number("remaining", self.remaining, at_least=0, below=1, hint="1 would be no refinement")
