"""The module and the data of a Lightning trainer, or one line that names what is there in their place."""

from __future__ import annotations

from typing import TypeGuard

import lightning as L

from flowbench.data import FlowDataModule
from flowbench.evaluation.protocols import CanSample, HasDensity
from flowbench.training import TrainingModule

__all__ = ["can_be_measured", "data_of", "measured_module"]


def can_be_measured(module: L.LightningModule) -> TypeGuard[TrainingModule]:
    """Whether a module has samples or a density."""
    return isinstance(module, TrainingModule) and isinstance(module, CanSample | HasDensity)


def measured_module(module: L.LightningModule) -> TrainingModule:
    """The module as one that can be measured.

    Raises:
        ValueError: when it has neither samples nor a density.
    """
    if not can_be_measured(module):
        raise ValueError(f"the evaluator measures flows, got {type(module).__name__}: remove the section evaluator")
    return module


def data_of(trainer: L.Trainer) -> FlowDataModule:
    """The trainer's data.

    Raises:
        ValueError: when it has no datamodule of ours.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, FlowDataModule):
        raise ValueError("the evaluator needs a FlowDataModule: pass datamodule=FlowDataModule(...) to the trainer")
    return data
