"""Somebody who will be measured, as far as the names of the numbers depend on who it is."""

from __future__ import annotations

from dataclasses import dataclass

import lightning as L

from flowbench.data import DataSpec
from flowbench.evaluation.measurement import SweptName
from flowbench.evaluation.protocols import CanSample
from flowbench.evaluation.reference import Reference

__all__ = ["Prospect"]


@dataclass(frozen=True)
class Prospect:
    """Somebody who will be measured, as far as the names of the numbers depend on who it is.

    Attributes:
        spec: of the data.
        module: trained or not; None for reference rows.
        reference: a reference row; None for a module.
        swept: what a sweep imposes on the sampler; empty outside a sweep.
    """

    spec: DataSpec
    module: L.LightningModule | None = None
    reference: Reference | None = None
    swept: SweptName = ""

    @property
    def has_labels(self) -> bool:
        """Whether its samples have labels: those that a conditional flow was given, or those of held-out data."""
        if isinstance(self.module, CanSample):
            return self.module.num_classes is not None
        return self.reference is not None and self.reference.has_labels and self.spec.num_classes is not None
