"""Inpainting by a flow that was trained for it, in the terms of the inpainting by one that was not."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flowbench.families.base import FlowModule
from flowbench.families.conditioning.condition import Condition
from flowbench.families.conditioning.inpainting import InpaintingConditioner
from flowbench.families.zero_shot import Inpainting

__all__ = ["fill_in"]


@torch.no_grad()
def fill_in(
    module: FlowModule,
    x: Tensor,
    mask: Tensor,
    label: Tensor | None = None,
    *,
    seed: int = 0,
    index: Tensor | None = None,
) -> Inpainting:
    """Fill the unknown values in with a draw under the flow's own condition, the masked data and the mask.

    The mask may be another than those of the training; the flow was not trained for it then.

    Args:
        module: a flow with an :class:`InpaintingConditioner`.
        x: data in model space, shape (B, *D); its unknown values are never looked at.
        mask: True where unknown, shape (H, W), or (d,) for points.
        label: classes, shape (B,), or None.
        seed: keys the noise.
        index: sample indices that key it too; 0..B-1 when None.

    Returns:
        Known values are put back whatever the conditioner's `paste` is; `drift` is how far the flow had moved them,
        in model units.

    Raises:
        ValueError: for a flow with another condition, or none.
    """
    conditioner = module.conditioner
    if not isinstance(conditioner, InpaintingConditioner):
        has = "no condition" if conditioner is None else conditioner.name
        raise ValueError(f"inpainting under a condition needs a flow trained with InpaintingConditioner, got {has}")
    index = torch.arange(len(x)) if index is None else index
    unknown = mask.to(x.device).expand(len(x), *mask.shape)
    condition = conditioner.masked(x, unknown, module.space)
    noise = module.draw_noise(index, seed)
    drawn = module.sample(noise, Condition(label, replace(condition, original=None)))
    hidden = unknown[:, None] if x.ndim == 4 else unknown
    square = (drawn.x - x).square().masked_fill(hidden, 0.0).flatten(1).sum(1)
    known = (~hidden).expand_as(x).flatten(1).sum(1).clamp(min=1)
    return Inpainting(torch.where(hidden, drawn.x, x), (square / known).sqrt(), drawn.network_evaluations)
