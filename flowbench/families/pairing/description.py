"""What the pairs of a matching flow look like: how much they cost, what they weigh, which marginals they have."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowbench.data import Batch
from flowbench.flows import UniformWeight, Weight

if TYPE_CHECKING:
    from flowbench.families.flow_matching import FlowMatching

__all__ = ["describe_pairs", "describe_weight"]

# Points on each side for the weights of all their pairs, and how many of these are held at a time.
TILT_POINTS = 512
TILT_NUMBERS = 4_000_000


@torch.no_grad()
def describe_pairs(
    flow: FlowMatching, x1: Tensor, label: Tensor | None, batch_size: int, rng: torch.Generator
) -> dict[str, float]:
    """Cost of the training pairs against independent ones, and what the weight does to them.

    Args:
        flow: whose pairs.
        x1: data points where the flow lives, shape (N, *flow_shape).
        label: of a conditional flow, shape (N,); else None.
        batch_size: of the training, over all processes.
        rng: source of every random number.

    Returns:
        ``cost_ratio``, the mean squared distance of the pairs, as weighted, over that of independent pairs; for a
        weight that is not uniform :func:`describe_weight` besides.
    """
    costs, independent, log_weights = [], [], []
    weight = copy.deepcopy(flow.weight).cpu()
    for rows in torch.arange(len(x1)).split(flow.pairing.problem_size(batch_size)):
        points, given = x1[rows], None if label is None else label[rows]
        pairs = flow.pairing.pairs(flow, points, given, Batch(points, label=given, index=rows), rng)
        costs.append(_squares(pairs.x0, pairs.x1))
        log_weights.append(weight.log_weight(pairs.x0, pairs.x1).double())
        # Pairs of a teacher have data points of their own.
        fresh = flow.source.sample_for(pairs.x1, rng)
        independent.append(_squares(fresh[torch.randperm(len(fresh), generator=rng)], pairs.x1))
    share = torch.cat(log_weights).softmax(0)
    found = {"cost_ratio": float((share * torch.cat(costs)).sum() / torch.cat(independent).mean())}
    if isinstance(weight, UniformWeight):
        return found
    data = x1[:TILT_POINTS]
    return found | describe_weight(weight, flow.source.sample_for(data, rng), data)


@torch.no_grad()
def describe_weight(weight: Weight, x0: Tensor, x1: Tensor) -> dict[str, float]:
    """What a weight does to independent pairs, from the weights of all pairs of two samples.

    Args:
        weight: on the CPU.
        x0: source points, shape (N, *D).
        x1: data points, shape (M, *D).

    Returns:
        ``ess``, the effective share of the pairs, in (0, 1]; ``tilt_source`` and ``tilt_target``, the squared
        coefficients of variation of a point's mean weight; ``tilt_share``, the share of the drop in the mean squared
        distance that the tilted marginals alone explain (NaN without a drop); ``weighted_norm_ratio``, the mean norm of
        the data as weighted over their mean norm.
    """
    log_weights, costs = _all_pairs(weight, x0.cpu(), x1.cpu())
    weights = (log_weights - log_weights.max()).exp()
    source, target, total = weights.sum(1), weights.sum(0), weights.sum()
    mean = {
        "independent": costs.mean(),
        "tilt": (source[:, None] * target * costs).sum() / (source.sum() * target.sum()),
        "weighted": (weights * costs).sum() / total,
    }
    drop = float(mean["independent"] - mean["weighted"])
    norm = x1.cpu().flatten(1).double().norm(dim=1)
    return {
        "ess": float(total.square() / (weights.numel() * weights.square().sum())),
        "tilt_source": _squared_variation(source),
        "tilt_target": _squared_variation(target),
        "tilt_share": float(mean["independent"] - mean["tilt"]) / drop if drop > 0 else math.nan,
        "weighted_norm_ratio": float((target * norm).sum() / target.sum() / norm.mean()),
    }


def _all_pairs(weight: Weight, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Log-weights and squared distances of every pair, float64, shape (N, M)."""
    chunk = max(1, TILT_NUMBERS // x1.numel())
    log_weights, costs = [], []
    for part in x0.split(chunk):
        left = part.repeat_interleave(len(x1), 0)
        right = x1.repeat(len(part), *[1] * (x1.ndim - 1))
        log_weights.append(weight.log_weight(left, right).double().view(len(part), len(x1)))
        costs.append(_squares(left, right).view(len(part), len(x1)))
    return torch.cat(log_weights), torch.cat(costs)


def _squares(x0: Tensor, x1: Tensor) -> Tensor:
    return (x0 - x1).flatten(1).double().square().sum(1)


def _squared_variation(values: Tensor) -> float:
    return float(values.var(correction=0) / values.mean().square())
