"""Guidance of a velocity: how the conditional and the unconditional prediction are combined when sampling.

``delta = v_c - v_u`` is the difference of the conditional velocity v_c and the unconditional one v_u of one network.
Guidance is ``v_u + scale delta``: scale 1 is the conditional flow, 0 the unconditional one, above 1 extrapolates. The
other convention of the literature, ``(1 + w) v_c - w v_u``, is w = scale - 1. Guided Gaussians, of the autoregressive
flows, are in :mod:`flowbench.flows.autoregressive.guided_gaussian`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from flowbench.core.checks import check_interval, check_number

__all__ = ["ClassifierFreeGuidance", "Guidance", "VelocityNetwork"]

VelocityNetwork = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``network(x, t, label)``: states (B, *D), times (B,), labels (B,); label None is the null label for every sample."""

# Times reach the network in single precision: one at the end of an interval must not fall outside by rounding.
_TIME_ROUNDING = 1e-6


class Guidance(ABC):
    """A rule for the velocity of labelled samples, which may depend on the time and on the velocities.

    Attributes:
        scale: the strength that a sweep varies; 1 is no guidance.

    Example:
        >>> guidance: Guidance = ClassifierFreeGuidance(scale=3.0)
        >>> network = lambda x, t, label: torch.zeros_like(x) if label is None else torch.ones_like(x)
        >>> guidance.velocity(network, torch.zeros(1, 2), t=torch.zeros(1), label=torch.tensor([7]))
        tensor([[3., 3.]])
        >>> guidance.evaluations_at(0.5), guidance.with_scale(1.0).evaluations_at(0.5)
        (2, 1)
    """

    scale: float

    @abstractmethod
    def with_scale(self, scale: float) -> Guidance:
        """The same rule at another strength.

        Raises:
            ValueError: for a scale that the rule does not take.
        """

    @abstractmethod
    def velocity(self, network: VelocityNetwork, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """Guided velocity, with no more network evaluations than it needs.

        Args:
            network: the velocity of states, times and labels.
            x: states, shape (B, *D).
            t: times, shape (B,).
            label: class labels, shape (B,); None leaves nothing to guide towards: one unconditional evaluation.

        Returns:
            Velocities, shape (B, *D).
        """

    @abstractmethod
    def evaluations_at(self, t: float) -> int:
        """Network evaluations of one velocity of labelled samples at time t: 1 or 2."""


class ClassifierFreeGuidance(Guidance):
    """Classifier-free guidance ``v_u + scale (v_c - v_u)``, at all times or within an interval of them.

    Args:
        scale: in [0, 1e12]; 1 is the conditional flow, 0 the unconditional one, above 1 extrapolates. The
            literature's other convention is w = scale - 1.
        interval: times (from, to), both included, between which samples are guided; the conditional velocity before
            and after costs one evaluation.

    References:
        Ho and Salimans 2022, arXiv 2207.12598; Zheng et al. 2023, arXiv 2311.13443, for velocities; Kynkaanniemi et
        al. 2024, arXiv 2404.07724, for the interval.

    Example:
        >>> guidance = ClassifierFreeGuidance(scale=3.0, interval=(0.2, 0.8))
        >>> guidance(conditional=torch.tensor([[2.0]]), unconditional=torch.tensor([[1.0]]))  # 1 + 3 (2 - 1)
        tensor([[4.]])
        >>> [guidance.evaluations_at(t) for t in (0.1, 0.5, 0.9)]
        [1, 2, 1]
    """

    def __init__(self, scale: float = 1.0, interval: tuple[float, float] = (0.0, 1.0)) -> None:
        check_number("scale", scale, at_least=0, hint="1 is no guidance")
        check_interval("interval", interval, hint="times with 0 <= from < to <= 1")
        self.scale = scale
        self.interval = (float(interval[0]), float(interval[1]))

    def with_scale(self, scale: float) -> ClassifierFreeGuidance:
        """The same interval with another scale."""
        return ClassifierFreeGuidance(scale, self.interval)

    def evaluations_at(self, t: float) -> int:
        """1 at scale 0 or 1 and outside the interval, else 2."""
        inside = self.interval[0] - _TIME_ROUNDING <= t <= self.interval[1] + _TIME_ROUNDING
        return 2 if inside and self.scale not in (0.0, 1.0) else 1

    def __call__(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Combine two velocities of the same shape, whatever the time."""
        return unconditional + self.scale * (conditional - unconditional)

    def velocity(self, network: VelocityNetwork, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """Guided velocity; see :meth:`Guidance.velocity`. The conditional one outside the interval."""
        if label is None:
            return network(x, t, None)
        if self.scale == 1:
            return network(x, t, label)
        if self.interval == (0.0, 1.0):
            return self._guided(network, x, t, label)
        # Times differ within a batch only where every sample has its own step size.
        inside = (t >= self.interval[0] - _TIME_ROUNDING) & (t <= self.interval[1] + _TIME_ROUNDING)
        if not inside.any():
            return network(x, t, label)
        guided = self._guided(network, x, t, label)
        if inside.all():
            return guided
        return torch.where(inside.view(-1, *[1] * (x.ndim - 1)), guided, network(x, t, label))

    def _guided(self, network: VelocityNetwork, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        unconditional = network(x, t, None)
        return unconditional if self.scale == 0 else self(network(x, t, label), unconditional)

    def __repr__(self) -> str:
        interval = "" if self.interval == (0.0, 1.0) else f", interval=({self.interval[0]:g}, {self.interval[1]:g})"
        return f"ClassifierFreeGuidance(scale={self.scale:g}{interval})"
