"""What teaches a flow map: residuals of an average velocity that vanish at the map of the flow.

A flow map X(x, s, t) carries x from time s to time t along dx/dt = b(x, t). It is written X = x + (t - s) u(x, s, t)
with the average velocity u: X(x, s, s) = x exactly, and u(x, t, t) = b(x, t), which plain flow matching teaches. The
objectives here add what u must be between two times.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from flowbench.core.checks import check_number
from flowbench.flows.flow_map.derivative import AverageVelocity, Derivative, check_derivative, spread
from flowbench.flows.flow_map.times import JumpTimes, UniformPairs
from flowbench.flows.solver.base import Field

__all__ = [
    "ANYWHERE",
    "BACK",
    "TO_DATA",
    "WEIGHT_OFFSET",
    "DifferentiatedObjective",
    "FlowMapObjective",
    "JumpBatch",
    "jumped",
]

WEIGHT_OFFSET = 1e-3
ANYWHERE = (1 / 3, 2 / 3)
BACK = (2 / 3, 1 / 3)
FROM_DATA = (1.0, 1 / 3)
TO_DATA = (1 / 3, 1.0)


@dataclass(frozen=True)
class JumpBatch:
    """The points of a training batch that jump.

    Attributes:
        x: points of the path at `start`, shape (B, *D).
        start: s, shape (B,).
        end: t > s, shape (B,); of jumps back to the source, t < s.
        velocity: what the velocity at (x, s) is learned from, without gradient: that of the pair, or a guided or
            taught one where the objective needs it, shape (B, *D).
        teacher: the velocity field b of a teacher; None: the average velocity's own at equal times.
        progress: share of the training that is over, in [0, 1].
        generator: source of an objective's own draws; None where it draws nothing.

    Example:
        >>> batch = JumpBatch(torch.zeros(1, 2), torch.tensor([0.25]), torch.tensor([1.0]), torch.ones(1, 2))
        >>> batch.length, batch.progress
        (tensor([0.7500]), 0.0)
    """

    x: Tensor
    start: Tensor
    end: Tensor
    velocity: Tensor
    teacher: Field | None = None
    progress: float = 0.0
    generator: torch.Generator | None = None

    @property
    def length(self) -> Tensor:
        """Of each jump, t - s, shape (B,); below 0 of one back to the source."""
        return self.end - self.start


def jumped(u: AverageVelocity, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The map ``X(x, s, t) = x + (t - s) u(x, s, t)``, shape (B, *D); x itself, to the bit, where s = t."""
    return x + spread(end - start, x) * u(x, start, end)


class FlowMapObjective(ABC):
    """What an average velocity must be between two times: a residual whose mean square is minimised.

    Attributes:
        uses_forward_mode: whether the network is differentiated in forward mode.
        needs_full_precision: whether nearby velocities are subtracted, which autocast would leave no digits of.
        needs_velocity: whether :meth:`residual` reads the velocities of the points that jump; where it does not, guided
            and taught ones are not computed.
        needed_jump: a jump (s, t) between times of no grid that must be trained, so that what it compares is: of most,
            from anywhere to anywhere.
        goes_back: whether it can train jumps from later to earlier times too.

    Args:
        weight_power: p of the weight 1 / (e + 0.001)^p of a jump with mean squared residual e, in [0, 1]. Above 0 the
            mean that a velocity should be becomes something like a median, which is another one in few dimensions.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> class Straight(FlowMapObjective):  # right for straight paths at constant speed only
        ...     def residual(self, u, batch, predicted):
        ...         return predicted[0] - batch.velocity
        >>> batch = JumpBatch(torch.zeros(1, 2), torch.tensor([0.25]), torch.tensor([1.0]), torch.ones(1, 2))
        >>> Straight().error(torch.zeros(1, 2))
        tensor([0.])
        >>> Straight().residual(None, batch, (torch.zeros(1, 2),))
        tensor([[-1., -1.]])
    """

    uses_forward_mode: bool = False
    needs_full_precision: bool = False
    needs_velocity: bool = True
    needed_jump: tuple[float, float] = ANYWHERE
    goes_back: bool = False

    def __init__(self, weight_power: float = 0.0) -> None:
        check_number("weight_power", weight_power, at_least=0, at_most=1, hint="0 weights all jumps alike")
        self.weight_power = weight_power

    @property
    def default_times(self) -> JumpTimes:
        """Between which times it trains, where nobody chooses."""
        return UniformPairs()

    def check_times(self, times: JumpTimes) -> None:
        """Refuse (ValueError) pairs of times that it cannot be trained on: its target would rest on untrained jumps."""
        self._check_direction(times)
        if not times.covers(*self.needed_jump):
            where = "from anywhere to the data" if self.needed_jump == TO_DATA else "from anywhere to anywhere"
            raise ValueError(
                f"{self!r} compares jumps {where}, but {times!r} trains {times.covered}: take UniformPairs, say"
            )

    def _check_direction(self, times: JumpTimes) -> None:
        """Refuse jumps to earlier times of an objective without them, and some such jumps without all."""
        if not (times.covers(*BACK) or times.covers(*FROM_DATA)):
            return
        if not self.goes_back:
            raise ValueError(f"{self!r} trains jumps to later times alone, got {times!r}: take Progressive")
        if not times.covers(*BACK):
            raise ValueError(
                f"{self!r} compares jumps from anywhere to earlier times, but {times!r} trains {times.covered}: take "
                "BothWays without times"
            )

    def ends(self, batch: JumpBatch) -> tuple[Tensor, ...]:
        """Ends, each of shape (B,), of the jumps whose average velocities :meth:`residual` is given with a gradient."""
        return (batch.end,)

    @abstractmethod
    def residual(self, u: AverageVelocity, batch: JumpBatch, predicted: tuple[Tensor, ...]) -> Tensor:
        """What is to be zero on average, shape (B, *D).

        Args:
            u: the average velocity of the batch's points, for what a target needs of it.
            batch: the points.
            predicted: ``u(x, s, end)`` for each of :meth:`ends`, with gradients.
        """

    def error(self, residual: Tensor) -> Tensor:
        """Mean squares of residuals (B, *D) over the dimensions, weighted, shape (B,)."""
        error = residual.float().square().flatten(1).mean(1)
        if not self.weight_power:
            return error
        weight: Tensor = (error.detach() + WEIGHT_OFFSET) ** -self.weight_power
        return weight * error

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        """Options on one line."""
        return f"weight_power={self.weight_power:g}" if self.weight_power else ""


class DifferentiatedObjective(FlowMapObjective):
    """An objective with a derivative of the average velocity.

    Args:
        derivative: `jvp`, by forward mode, or `difference`, of nearby velocities.
        weight_power: see :class:`FlowMapObjective`.

    Raises:
        ValueError: for another derivative or a number out of range.

    Example:
        >>> from flowbench.flows import Lagrangian
        >>> objective: DifferentiatedObjective = Lagrangian(derivative="jvp")
        >>> objective, objective.uses_forward_mode, objective.needs_full_precision
        (Lagrangian(derivative=jvp), True, False)
    """

    def __init__(self, derivative: Derivative, weight_power: float = 0.0) -> None:
        super().__init__(weight_power)
        check_derivative(derivative)
        self.derivative = derivative
        self.uses_forward_mode = derivative == "jvp"
        self.needs_full_precision = derivative == "difference"

    def extra_repr(self) -> str:
        """See :meth:`FlowMapObjective.extra_repr`."""
        return ", ".join(filter(None, (f"derivative={self.derivative}", super().extra_repr())))
