"""The flow and the data of a Lightning trainer, or one line that says what is there in their place."""

from __future__ import annotations

import lightning as L

from flowbench.data import FlowDataModule
from flowbench.families import FlowModule

__all__ = ["data_of", "flow_of"]


def flow_of(module: L.LightningModule) -> FlowModule:
    """The module as a flow.

    Raises:
        ValueError: when it is none.
    """
    if not isinstance(module, FlowModule):
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
