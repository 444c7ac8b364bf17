"""Average divergences of a flow map: a head on its network, and how it learns them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flowbench.core.autocast import autocast_off
from flowbench.core.checks import check_count, check_counts
from flowbench.families.average_velocity import AverageVelocityNetwork
from flowbench.families.conditioning.condition import SpatialCondition
from flowbench.families.noise.score_gradient import not_a_leaf
from flowbench.flows import Field, HutchinsonDivergence, JumpBatch
from flowbench.flows.flow_map.divergence import differentiable, divergence_target, two_jump_divergence
from flowbench.networks.divergence import DivergenceNetwork
from flowbench.networks.sizes import MOST_CHANNELS

__all__ = ["DivergenceHead", "JointNetwork", "RestingBatch"]


class DivergenceHead:
    """A head that learns the average divergence d(x, s, t) of a flow map (F2D2), for likelihoods by few jumps.

    A small network reads d from what the last layer of the map's network reads. No gradient goes from it into the map,
    which learns as it does without a head. d is per dimension, so that its errors are of one size for all data.
    At one time it learns the divergence of the velocity, estimated by random probes of which each step draws new ones;
    between two times, that one jump has the mean of two that meet half way.

    References:
        Ai et al. (2025), F2D2: Joint Distillation for Fast Likelihood Evaluation and Sampling in Flow-based Models,
        arXiv 2512.02636; its head has widths of 32 and 8.

    Args:
        widths: of the hidden layers, each 1 to 65,536.
        num_probes: probes of the divergence of each point, >= 1; each takes one backward pass.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import DataSpec
        >>> from flowbench.flows import Progressive
        >>> from flowbench.networks import MLP
        >>> options = {"map_objective": Progressive(), "divergence_head": DivergenceHead(widths=[16])}
        >>> network = partial(MLP, width=16, depth=1, second_time=True)
        >>> flow = FlowMap(DataSpec("points", "1", (2,)), network, **options)
        >>> density = flow.head_density(network_evaluations=4)
        >>> density.method
        'Composition(num_jumps=4)'
        >>> density.solve(torch.zeros(1, 2), Condition(), torch.arange(1), 0).log_prob  # untrained: nothing moves
        tensor([-1.8379], dtype=torch.float64)
    """

    def __init__(self, widths: Sequence[int] = (32, 8), num_probes: int = 1) -> None:
        check_counts("widths", widths, at_most=MOST_CHANNELS)
        check_count("num_probes", num_probes)
        self.widths = tuple(widths)
        self.probes = HutchinsonDivergence(num_probes=num_probes)

    def build(self, network: nn.Module) -> DivergenceNetwork:
        """The head's network.

        Args:
            network: of the flow map.

        Raises:
            ValueError: for one that gives no features.
        """
        shape = getattr(network, "feature_shape", None)
        if shape is None:
            raise ValueError(
                f"a divergence head reads the features of the network's last layer, and {type(network).__name__} gives "
                "none: take MLP, DiT or UNet, or leave divergence_head out"
            )
        return DivergenceNetwork(shape, self.widths)

    def errors(
        self, joint: JointNetwork, jumps: JumpBatch, resting: RestingBatch, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared errors of the head's divergences per dimension, those of the points that jump first, shape (B,).

        Args:
            joint: the networks under the conditions of all points.
            jumps: the points that jump; they come first.
            resting: the others.
            generator: source of the probes.

        Returns:
            The errors, and what is to be logged of them.
        """
        num = len(jumps.x)
        both = [slice(num), slice(num, num + len(resting.x))]
        errors: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        with autocast_off(jumps.x.device):
            if num:
                errors.append(self._jump_errors(joint.rows(both[0]), jumps))
                metrics["divergence_jump_loss"] = errors[-1].detach().mean()
            if len(resting.x):
                errors.append(self._resting_errors(joint.rows(both[1]), resting, generator))
                metrics["divergence_diagonal_loss"] = errors[-1].detach().mean()
        return torch.cat(errors), metrics

    def _jump_errors(self, joint: JointNetwork, jumps: JumpBatch) -> Tensor:
        target = two_jump_divergence(joint, jumps.x, jumps.start, jumps.end)
        return (joint(jumps.x, jumps.start, jumps.end)[1] - target).square()

    def _resting_errors(self, joint: JointNetwork, resting: RestingBatch, generator: torch.Generator) -> Tensor:
        with differentiable(resting.x.device):
            x, t = resting.x.detach().clone().requires_grad_(), resting.t.clone()
            velocity, features = joint.outside_inference().described(not_a_leaf(x), t, t)
            if resting.teacher is not None:
                velocity = resting.teacher(t, not_a_leaf(x))
            target = divergence_target(velocity, x, self.probes, generator)
        return (joint.head(features.detach()) - target).square()


@dataclass(frozen=True)
class RestingBatch:
    """The points of a training batch that learn at one time.

    Attributes:
        x: points of the path, shape (B, *D).
        t: their times, shape (B,).
        teacher: the velocity field of a teacher under their conditions, which can be differentiated; None: the own.
    """

    x: Tensor
    t: Tensor
    teacher: Field | None = None


class JointNetwork:
    """``(u, d)(x, s, t)`` under the conditions of a batch; gradients reach the head alone.

    Args:
        network: average velocities.
        head: reads divergences from its features.
    """

    def __init__(self, network: AverageVelocityNetwork, head: nn.Module) -> None:
        self.network = network
        self.head = head

    def __call__(self, x: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Velocities (B, *D) and divergences per dimension (B,) of the jumps from `start` to `end`."""
        with torch.no_grad():
            velocity, features = self.described(x, start, end)
        divergence: Tensor = self.head(features)
        return velocity, divergence

    def described(self, x: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Velocities (B, *D), and the features that the head reads."""
        return self.network.with_features(x, start, end)

    def rows(self, rows: slice) -> JointNetwork:
        """The same for some points of the batch."""
        return JointNetwork(self.network.rows(rows), self.head)

    def outside_inference(self) -> JointNetwork:
        """The same with conditions that a backward pass may keep, in validation too."""
        given = self.network.condition
        label = None if given.label is None else given.label.clone()
        grid = None if given.values is None else SpatialCondition(given.values.clone())
        return JointNetwork(self.network.under(replace(given, label=label, grid=grid)), self.head)
