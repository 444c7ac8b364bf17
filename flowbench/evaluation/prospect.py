"""Somebody who will be measured, as far as the names of the numbers depend on who it is."""

from __future__ import annotations

from dataclasses import dataclass

from flowbench.data import DataSpec
from flowbench.evaluation.measurement import SweptName
from flowbench.families import FlowModule, LatentSpace

__all__ = ["Prospect"]


@dataclass(frozen=True)
class Prospect:
    """Somebody who will be measured, as far as the names of the numbers depend on who it is.

    Attributes:
        spec: of the data.
        flow: the flow, trained or not; None for reference rows.
        reference: name of a reference row; empty for a flow.
        swept: what a sweep imposes on the sampler; empty outside a sweep.
    """

    spec: DataSpec
    flow: FlowModule | None = None
    reference: str = ""
    swept: SweptName = ""

    @property
    def has_labels(self) -> bool:
        """Whether its samples have labels: those that a conditional flow was given, or those of held-out data."""
        if self.flow is not None:
            return self.flow.num_classes is not None
        return self.reference == "floor" and self.spec.num_classes is not None

    @property
    def has_density(self) -> bool:
        """Whether its log-density is measured: that of every flow and of the fitted references."""
        return self.flow is not None or self.reference in ("gaussian", "gmm")

    @property
    def is_latent(self) -> bool:
        """Whether it is a flow on the latents of an autoencoder."""
        return self.flow is not None and isinstance(self.flow.space, LatentSpace)
