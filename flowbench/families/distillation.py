"""A trained flow whose velocity a flow map learns from, and whose weights a student starts from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowbench.data import DataSpec
from flowbench.families.base import FlowModule
from flowbench.families.conditioning.condition import Condition
from flowbench.families.flow_matching import FlowMatching
from flowbench.families.latents.space import Space
from flowbench.families.pairing.base import PairingContext
from flowbench.families.pairing.teacher import (
    FrozenTeacher,
    check_dropout,
    check_spaces,
    check_teacher,
    required_teacher,
    source_of,
    space_of,
)
from flowbench.flows import ClassifierFreeGuidance, Field, LinearPath, Source, VelocityObjective

__all__ = ["VelocityTeacher", "start_from"]


def start_from(teacher: FlowModule, network: nn.Module, prediction: str, settings: str) -> None:
    """Give a student's network the weights of its teacher's.

    Args:
        teacher: trained.
        network: of the student.
        prediction: what the student's network predicts.
        settings: how its file gets the teacher's network, for the message.

    Raises:
        ValueError: for a network of another prediction, or with other parameters.
    """
    if isinstance(teacher, FlowMatching) and teacher.objective.prediction != prediction:
        raise ValueError(
            f"the teacher's network predicts {teacher.objective.prediction} and the student's {prediction}: give both "
            "one objective, or set initialise_from_teacher=false"
        )
    try:
        if not isinstance(teacher, FlowMatching):
            raise RuntimeError
        network.load_state_dict(teacher.network.state_dict())
    except RuntimeError:
        raise ValueError(
            "the teacher has another network than model.init_args.network: set initialise_from_teacher=false, or use "
            f"its own settings{settings}"
        ) from None


class VelocityTeacher:
    """The velocity of a trained matching flow, frozen and in evaluation mode, with its averaged weights.

    It is no module of the student: its weights enter neither optimiser nor average nor checkpoint.

    Args:
        teacher: trained, on the straight line.
        spec: of the student's data.
        guidance: scale of the classifier-free guidance of the teacher's velocity; 1 is none.

    Raises:
        ValueError: for a flow without such a velocity, or of other data.
    """

    def __init__(self, teacher: FlowModule, spec: DataSpec, guidance: float = 1.0) -> None:
        found = required_teacher(teacher, "FlowMap", spec)
        if not isinstance(found, FlowMatching) or not isinstance(found.path, LinearPath):
            raise ValueError(
                f"a flow map learns the velocity of a matching flow on the straight line, but requires.teacher names a "
                f"{type(found).__name__}: take FlowMatching with LinearPath"
            )
        found.check_guidance(guidance)
        self._frozen = FrozenTeacher(found)
        self.guidance = ClassifierFreeGuidance(guidance)

    @property
    def module(self) -> FlowMatching:
        """The flow itself."""
        return self._frozen.flow

    @property
    def space(self) -> Space:
        """Where a student lives beside it."""
        return space_of(self.module)

    @property
    def source(self) -> Source:
        """The source, of which a student gets a copy."""
        return source_of(self.module)

    def check(self, context: PairingContext) -> None:
        """Refuse (ValueError) a student of other points, labels or another source, or that drops labels alone."""
        check_teacher(context, self.module)
        check_dropout(context, self.module)

    def check_space(self, context: PairingContext) -> None:
        """Refuse (ValueError) a student in another latent space, or with more noise."""
        check_spaces(context, self.module)

    def initialise(self, network: nn.Module) -> None:
        """Give a network of two times the teacher's weights; it starts as the teacher's velocity at every length.

        Raises:
            ValueError: for a network that differs in more than the second time, or predicts no velocity.
        """
        start_from(self.module, network, VelocityObjective.prediction, " and second_time: true")

    def field(self, condition: Condition, device: torch.device) -> Field:
        """The velocity under the conditions of some points, on their device, without gradients."""
        found = self.differentiable_field(condition, device)

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            with torch.no_grad():
                return found(t, x)

        return velocity

    def differentiable_field(self, condition: Condition, device: torch.device) -> Field:
        """The same with gradients by the states, which its divergence takes; none reach the weights."""
        return self._frozen.on(device).field(condition, self.guidance)
