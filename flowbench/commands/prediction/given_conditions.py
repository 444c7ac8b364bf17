"""Conditions for ``flowbench predict`` of flows that take more than labels."""

from __future__ import annotations

import torch
from torch import Tensor

from flowbench.commands.prediction.request import Request
from flowbench.data import Batch, FlowDataModule
from flowbench.families import Condition, FlowModule, InpaintingConditioner

__all__ = ["check_conditions", "given_images"]

# Samples of a conditioned flow are made for the first images of this split.
SPLIT = "test"


def check_conditions(request: Request, module: FlowModule) -> None:
    """Refuse tasks that a flow's condition leaves no meaning.

    Raises:
        ValueError: for what starts from data but is not the condition, for inpainting under another condition, and for
            rounds of a flow that needs none.
    """
    conditioner = module.conditioner
    if conditioner is None:
        return
    inpaints = isinstance(conditioner, InpaintingConditioner)
    if request.task != "sample" and not (inpaints and request.task == "inpaint"):
        other = "take sample or inpaint" if inpaints else "take sample"
        raise ValueError(
            f"this flow is conditioned ({conditioner.name}), --task {request.task} does not apply: {other}"
        )
    if request.task == "inpaint" and request.rounds is not None:
        raise ValueError(
            f"this flow was trained to inpaint ({conditioner.name}) and draws once, but --rounds is {request.rounds}: "
            "leave it out"
        )


def given_images(module: FlowModule, data: FlowDataModule, index: Tensor, seed: int) -> Condition:
    """Conditions of held-out images, in turn, with the labels of those images; else each class in turn.

    Args:
        module: the flow.
        data: its data.
        index: sample indices, shape (B,).
        seed: keys masks.
    """
    if module.conditioner is None:
        return Condition(None if module.num_classes is None else (index % module.num_classes).to(module.device))
    split = data.split(SPLIT)
    rows = index % len(split)
    x, given = data.model_values(SPLIT, rows).to(module.device), data.conditions(SPLIT, rows)
    label = None if split.label is None else split.label[rows].to(module.device, torch.int64)
    return module.held_out_condition(Batch(x, label, given, index), seed)
