"""What the pairs of a matching flow look like: how much they cost, what they weigh, which marginals they have."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from flowbench.data import Batch
from flowbench.families.pairing.base import Pairing, PairingContext
from flowbench.flows import UniformWeight, Weight, transport_decomposition

__all__ = ["OF_WEIGHT", "describe_pairs", "names_of_pairs"]

# Points on each side for the weights of all their pairs, and the fields reported for them.
TILT_POINTS = 512
OF_WEIGHT = ("ess", "tilt_source", "tilt_target", "tilt_share", "weighted_norm_ratio")


def names_of_pairs(weight: Weight, pairing: Pairing) -> tuple[str, ...]:
    """Names of what :func:`describe_pairs` returns for pairs of this rule and weight."""
    of_weight = () if isinstance(weight, UniformWeight) else OF_WEIGHT
    return ("cost_ratio", *pairing.described, *of_weight)


@torch.no_grad()
def describe_pairs(
    pairing: Pairing,
    context: PairingContext,
    weight: Weight,
    x1: Tensor,
    label: Tensor | None,
    batch_size: int,
    rng: torch.Generator,
) -> dict[str, float]:
    """Cost of the training pairs against independent ones, and what the weight does to them.

    Pairs are those of one process that has the whole batch. Several processes pair their shares of it, whose pairs are
    longer, unless the pairing gathers them (``StreamPairing``).

    Args:
        pairing: makes the pairs.
        context: of the flow.
        weight: of the pairs.
        x1: data points where the flow lives, shape (N, *flow_shape).
        label: of a conditional flow, shape (N,); else None.
        batch_size: of the training, over all processes.
        rng: source of every random number.

    Returns:
        ``cost_ratio``, the mean squared distance of the pairs, as weighted, over that of independent pairs; what the
        rule reports besides; for a weight that is not uniform also the fields :data:`OF_WEIGHT` of
        :class:`~flowbench.flows.TransportDecomposition`, over all pairs of 512 points a side.
    """
    costs, independent, log_weights = [], [], []
    weight = copy.deepcopy(weight).cpu()
    for rows in torch.arange(len(x1)).split(pairing.num_coupled(batch_size)):
        points, given = x1[rows], None if label is None else label[rows]
        pairs = pairing.typical_pairs(context, points, given, Batch(points, label=given, index=rows), rng)
        costs.append(_squares(pairs.x0, pairs.x1))
        log_weights.append(weight.log_weight(pairs.x0, pairs.x1).double())
        # Pairs of a teacher have data points of their own.
        fresh = context.source.sample_for(pairs.x1, rng)
        independent.append(_squares(fresh[torch.randperm(len(fresh), generator=rng)], pairs.x1))
    share = torch.cat(log_weights).softmax(0)
    found = {"cost_ratio": float((share * torch.cat(costs)).sum() / torch.cat(independent).mean())}
    found |= pairing.describe()
    if isinstance(weight, UniformWeight):
        return found
    data = x1[:TILT_POINTS]
    decomposition = transport_decomposition(weight, context.source.sample_for(data, rng).cpu(), data.cpu())
    return found | {name: getattr(decomposition, name) for name in OF_WEIGHT}


def _squares(x0: Tensor, x1: Tensor) -> Tensor:
    return (x0 - x1).flatten(1).double().square().sum(1)
