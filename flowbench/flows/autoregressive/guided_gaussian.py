"""Guidance of a Gaussian: the conditional and the unconditional prediction of an autoregressive flow, combined."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from flowbench.core.checks import check_number

__all__ = ["GuidanceRule", "guided_gaussian"]

GuidanceRule = Literal["product", "log-scale", "linear"]

# exp(20) = 5e8: far outside any useful guidance, far inside float32.
_LARGEST_LOG_CHANGE = 20.0


def guided_gaussian(
    mean_c: Tensor,
    std_c: Tensor,
    mean_u: Tensor,
    std_u: Tensor,
    weight: float | Tensor,
    rule: GuidanceRule = "product",
) -> tuple[Tensor, Tensor]:
    """Guided Gaussian of a conditional (c) and an unconditional (u) one, element by element.

    Rules, w the weight:
        product: the normalised ``p_c^(1 + w) / p_u^w``. The ratio of variances is clipped to [0, 1], which keeps it
            normalisable and never wider than the conditional (STARFlow, proposition 2).
        log-scale: mean and log std are extrapolated, ``v_c + w (v_c - v_u)`` (TARFlow's code); the logarithm moves by
            20 at most, so that large weights stay finite.
        linear: mean and std are extrapolated (TARFlow's rule as the STARFlow paper states it); the std is kept above
            ``std_c / (1 + w)``, where the extrapolation alone would reach zero.

    Args:
        mean_c: conditional means, any shape.
        std_c: conditional standard deviations, > 0, same shape.
        mean_u: unconditional means, same shape.
        std_u: unconditional standard deviations, > 0, same shape.
        weight: w in [0, 1e12], a number or a tensor that broadcasts (not checked then: that would wait for the device);
            0 returns the conditional Gaussian. It is the guidance scale minus 1.
        rule: one of the above.

    Returns:
        Mean and standard deviation of the guided Gaussian.

    Raises:
        ValueError: for a negative weight or an unknown rule.

    References:
        Zhai et al. 2024, arXiv 2412.06329 (TARFlow); Gu et al. 2025, arXiv 2506.06276 (STARFlow), proposition 2.
    """
    if not isinstance(weight, Tensor):
        check_number("weight", weight, at_least=0, hint="it is the guidance scale minus 1")
    if rule == "product":
        ratio = (std_c / std_u).square().clamp(max=1)
        precision = 1 + weight * (1 - ratio)
        return mean_c + weight * ratio / precision * (mean_c - mean_u), std_c / precision.sqrt()
    mean = mean_c + weight * (mean_c - mean_u)
    if rule == "log-scale":
        change = weight * (std_c / std_u).log()
        return mean, std_c * change.clamp(-_LARGEST_LOG_CHANGE, _LARGEST_LOG_CHANGE).exp()
    if rule == "linear":
        return mean, torch.maximum(std_c + weight * (std_c - std_u), std_c / (1 + weight))
    raise ValueError(f"rule must be one of {', '.join(get_args(GuidanceRule))}, got {rule!r}")
