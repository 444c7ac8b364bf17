"""Ratio-aware adaptive guidance, and the ratio of two velocities that it follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from flowbench.core.checks import check_number, check_scale
from flowbench.flows.guidance.classifier_free import Guidance, VelocityNetwork

if TYPE_CHECKING:
    from flowbench.flows.solver.base import Solver

__all__ = ["RatioAwareGuidance", "RatioProfile", "RatioReduction", "ratio_profile"]

RatioReduction = Literal["sample", "batch"]

# Keeps the ratio finite where the unconditional velocity is zero.
_SMALLEST_NORM = 1e-8


class RatioAwareGuidance(Guidance):
    """RAAG: classifier-free guidance whose scale falls with the ratio of the difference to the unconditional velocity.

    With ``rho = |v_c - v_u| / |v_u|`` the scale of an evaluation is ``1 + (max_scale - 1) exp(-decay rho)``, between 1
    (a large ratio: the conditional flow) and ``max_scale`` (ratio 0, where both velocities agree anyway).

    The range of rho belongs to the data and to the model: measure it (:func:`ratio_profile`) before a decay is chosen.
    The authors' max_scale 18 and decay 12 are for one text-to-image model. Because the scale is large where the
    difference is small, neither equal max_scale nor equal mean scale makes a comparison with a constant scale fair;
    equal class accuracy does. rho is defined on the velocity: predictions of data, noise or score have other ratios.

    Args:
        max_scale: largest scale, in [1, 1e12]; 1 is the conditional flow, for one evaluation instead of two.
        decay: of the scale with the ratio, in [0, 1e12]; 0 is a constant scale.
        squared: use ``rho^2`` in the exponent, the ratio of the squared norms.
        reduce: "sample" gives every sample the ratio of its own norms; "batch" takes both norms over the whole batch
            (the authors' code), so that a sample depends on its neighbours.

    References:
        Zhu et al. 2025, arXiv 2508.03442, equation 8.

    Example:
        >>> guidance = RatioAwareGuidance(max_scale=3.0, decay=1.0)
        >>> conditional, unconditional = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> ratio = guidance.ratio(conditional, unconditional)
        >>> ratio, guidance.scale_of(ratio)  # 1 + 2 exp(-1)
        (tensor([1.]), tensor([1.7358]))
        >>> guidance(conditional, unconditional)
        tensor([[1.0000, 1.7358]])
    """

    def __init__(
        self, max_scale: float = 18.0, decay: float = 12.0, squared: bool = False, reduce: RatioReduction = "sample"
    ) -> None:
        check_number("max_scale", max_scale, at_least=1, hint="1 is no guidance")
        check_number("decay", decay, at_least=0, hint="0 is a constant scale")
        if reduce not in get_args(RatioReduction):
            raise ValueError(f"reduce must be one of {', '.join(get_args(RatioReduction))}, got {reduce!r}")
        self.max_scale = max_scale
        self.decay = decay
        self.squared = squared
        self.reduce = reduce

    @property
    def scale(self) -> float:  # type: ignore[override]
        """The largest scale."""
        return self.max_scale

    def with_scale(self, scale: float) -> RatioAwareGuidance:
        """The same decay with another ``max_scale``."""
        return RatioAwareGuidance(scale, self.decay, self.squared, self.reduce)

    def evaluations_at(self, t: float) -> int:
        """2 at any time, as without ratio; 1 for ``max_scale`` 1."""
        return 1 if self.max_scale == 1 else 2

    def ratio(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Norm of the difference over the norm of the unconditional velocity, ``rho``.

        Args:
            conditional: v_c, shape (B, *D).
            unconditional: v_u, shape (B, *D).

        Returns:
            rho, unsquared, shape (B,), float32 at least; all entries are equal under ``reduce="batch"``. A zero
            unconditional velocity counts as one of norm 1e-8.
        """
        dtype = torch.promote_types(conditional.dtype, torch.float32)
        reference = unconditional.flatten(1).to(dtype)
        difference = conditional.flatten(1).to(dtype) - reference
        if self.reduce == "batch":
            ratio = difference.norm() / reference.norm().clamp(min=_SMALLEST_NORM)
            return ratio.expand(len(conditional))
        return difference.norm(dim=1) / reference.norm(dim=1).clamp(min=_SMALLEST_NORM)

    def scale_of(self, ratio: Tensor) -> Tensor:
        """Guidance scale at ratios of any shape, in [1, max_scale]."""
        exponent = ratio.square() if self.squared else ratio
        return 1 + (self.max_scale - 1) * (-self.decay * exponent).exp()

    def __call__(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Combine two velocities of the same shape (B, *D)."""
        scale = self.scale_of(self.ratio(conditional, unconditional)).to(conditional.dtype)
        return unconditional + scale.view(-1, *[1] * (conditional.ndim - 1)) * (conditional - unconditional)

    def velocity(self, network: VelocityNetwork, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """Guided velocity; see :meth:`Guidance.velocity`."""
        if label is None or self.max_scale == 1:
            return network(x, t, label)
        return self(network(x, t, label), network(x, t, None))

    def with_decay_from(self, profile: RatioProfile, strength: float = 0.5) -> RatioAwareGuidance:
        """The same guidance with the decay scaled to a model: ``strength / median rho``.

        This rule is ours, not the paper's.

        Args:
            profile: ratios along a run of the model.
            strength: decay times median ratio, in [1e-12, 1e12].

        Raises:
            ValueError: for a strength out of range, or if most ratios are 0.
        """
        check_scale("strength", strength)
        median = profile.ratio.median().item()
        if not median > 0:
            raise ValueError(f"the median ratio is {median:g}: this model does not tell its labels apart")
        median = median**2 if self.squared else median
        return RatioAwareGuidance(self.max_scale, strength / median, self.squared, self.reduce)

    def __repr__(self) -> str:
        options = ", squared=True" if self.squared else ""
        options += ", reduce='batch'" if self.reduce == "batch" else ""
        return f"RatioAwareGuidance(max_scale={self.max_scale:g}, decay={self.decay:g}{options})"


@dataclass(frozen=True)
class RatioProfile:
    """Ratio and scale along a run, averaged over the batch; every field has shape (T,), one entry per evaluation.

    Attributes:
        times: at which the field was evaluated, in the order of the evaluations.
        ratio: mean rho, unsquared.
        scale: mean guidance scale.

    Example:
        >>> network = lambda x, t, label: torch.ones_like(x) if label is None else 2 * torch.ones_like(x)
        >>> label = torch.zeros(4, dtype=torch.int64)
        >>> profile = ratio_profile(RatioAwareGuidance(3.0, 1.0), network, torch.zeros(4, 2), label, Euler(num_steps=2))
        >>> profile.times, profile.ratio
        (tensor([0.0000, 0.5000], dtype=torch.float64), tensor([1., 1.], dtype=torch.float64))
    """

    times: Tensor
    ratio: Tensor
    scale: Tensor


@torch.no_grad()
def ratio_profile(
    guidance: RatioAwareGuidance,
    network: VelocityNetwork,
    x: Tensor,
    label: Tensor,
    solver: Solver,
    times: Tensor | None = None,
) -> RatioProfile:
    """Measure rho and the scale along a guided run; ``guidance.with_scale(1)`` measures an unguided one.

    Args:
        guidance: the rule, which also steers the run.
        network: the velocity of states, times and labels.
        x: source points, shape (B, *D).
        label: class labels, shape (B,).
        solver: integrates the run.
        times: first and last time; None is 0 and 1.
    """
    rows: list[Tensor] = []

    def field(t: Tensor, state: Tensor) -> Tensor:
        time = t.to(state).expand(len(state))
        conditional, unconditional = network(state, time, label), network(state, time, None)
        ratio = guidance.ratio(conditional, unconditional)
        rows.append(
            torch.stack([time.double().mean(), ratio.double().mean(), guidance.scale_of(ratio).double().mean()])
        )
        return guidance(conditional, unconditional)

    solver.solve(field, x, torch.tensor([0.0, 1.0], dtype=torch.float64) if times is None else times)
    return RatioProfile(*torch.stack(rows).cpu().unbind(1))
