"""Conditions for ``flowbench predict`` of flows that take more than labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowbench.commands.prediction.request import Request
from flowbench.data import FlowDataModule
from flowbench.families import FlowModule, InpaintingConditioner, SpatialCondition

__all__ = ["Given", "check_conditions", "given_images"]

Given = dict[str, Any]
"""Arguments of :meth:`~flowbench.families.FlowModule.sample`; empty for flows that take labels alone."""

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


def given_images(module: FlowModule, data: FlowDataModule, index: Tensor, seed: int) -> tuple[Given, Tensor | None]:
    """Conditions of held-out images, in turn, and the labels of those images.

    Args:
        module: the flow.
        data: its data.
        index: sample indices, shape (B,).
        seed: keys masks.

    Returns:
        The arguments of sampling, and labels (B,) on the CPU: None for a flow without labels.
    """
    conditioner = module.conditioner
    if conditioner is None:
        return {}, None if module.num_classes is None else index % module.num_classes
    split = data.split(SPLIT)
    rows = index % len(split)
    x, given = data.model_values(SPLIT, rows).to(module.device), data.conditions(SPLIT, rows)
    condition: SpatialCondition = conditioner.held_out_condition(x, given, index, seed, module.space)
    label = None if module.num_classes is None or split.label is None else split.label[rows].to(torch.int64)
    return {"spatial": condition}, label
