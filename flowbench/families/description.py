"""The facts of a flow that rows and refusals name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Description", "LikelihoodKind"]

LikelihoodKind = Literal["exact", "ode", "bound", "none"]


@dataclass(frozen=True)
class Description:
    """What a flow's samples and likelihoods are, and what of them can be chosen.

    Attributes:
        likelihood: what the log-density is: exact, through an ODE solver, a bound through an autoencoder, or none.
        likelihood_method: what it depends on beside the model, for the protocol; empty for closed forms.
        likelihood_evaluations: network evaluations per sample of it; None where an adaptive solver decides.
        reports_bits_per_dim: whether likelihoods of grey levels may be given in bits per dimension: not those of noisy
            data.
        has_velocities: whether paths have velocities, and so a curvature: those of block flows have none.
        sampler: what samples depend on beside weights, noise and guidance scale, for their rows; empty where nothing.
        encoder: what the way to the noise depends on beside the weights; empty where nothing.
        encoding_evaluations: network evaluations per sample of the way to the noise; None where an adaptive solver
            decides.
        can_choose_evaluations: whether the number of network evaluations per sample can be chosen.
        guidance_scale: scale of the sampler's own guidance, 1 is none; None where nothing can be guided.
        has_label_free_guidance: whether the sampler has another second branch than the null label.
        is_deterministic: whether samples are functions of their noise, without more of it on the way.

    Example:
        >>> Description("exact", has_velocities=False).can_choose_guidance
        False
    """

    likelihood: LikelihoodKind
    has_velocities: bool
    likelihood_method: str = ""
    likelihood_evaluations: float | None = 1.0
    reports_bits_per_dim: bool = True
    sampler: str = ""
    encoder: str = ""
    encoding_evaluations: float | None = 1.0
    can_choose_evaluations: bool = False
    guidance_scale: float | None = None
    has_label_free_guidance: bool = False
    is_deterministic: bool = True

    @property
    def can_choose_guidance(self) -> bool:
        """Whether samples can be drawn with another scale."""
        return self.guidance_scale is not None
