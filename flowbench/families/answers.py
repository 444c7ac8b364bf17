"""What a flow gives: samples with their cost, and paths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = ["Drawn", "Samples", "Trajectory"]


@dataclass
class Samples:
    """Samples with their cost.

    Attributes:
        x: samples in data space, shape (B, *D).
        network_evaluations: evaluations of the network that each sample cost; a guided one counts twice.
        seconds: wall time of the batch.
        iterations: network calls that each sample needed in each block of a block flow, shape (K, B); None elsewhere.
        residual: the certificate of an inverse that computes one, max |f(x) - z| of each sample, shape (B,), before
            denoising; None elsewhere.

    Example:
        >>> samples = Samples(x=torch.zeros(3, 2), network_evaluations=8.0, seconds=0.1)
        >>> samples.x.shape, samples.iterations
        (torch.Size([3, 2]), None)
    """

    x: Tensor
    network_evaluations: float
    seconds: float
    iterations: Tensor | None = None
    residual: Tensor | None = None


class Drawn(NamedTuple):
    """What :meth:`FlowModule.flow_sample` returns; a plain pair of the first two is accepted too.

    Attributes:
        points: at the flow's data end, shape (B, *flow_shape).
        network_evaluations: per sample.
        iterations: see :class:`Samples`.
        residual: see :class:`Samples`.
    """

    points: Tensor
    network_evaluations: float
    iterations: Tensor | None = None
    residual: Tensor | None = None


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
