"""Inception score: are classes recognised with confidence, and do all of them occur?"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.metrics.table_checks import as_table

__all__ = ["InceptionScore", "inception_score"]


class InceptionScore(NamedTuple):
    """Mean and standard deviation (divided by their number) over the splits; each in [1, classes].

    Example:
        >>> logits = 100 * torch.eye(4)  # four samples, each surely of another class
        >>> round(inception_score(logits, splits=1).mean, 4)  # as many as the classes, the largest score
        4.0
    """

    mean: float
    std: float


def inception_score(logits: Tensor, splits: int = 10, generator: torch.Generator | None = None) -> InceptionScore:
    """``exp(E_x KL(p(y | x) || p(y)))`` per split, from a classifier's logits.

    Does not use real data: memorised or adversarial samples score well. Biased downwards for small splits, so
    compare only with the same N and number of splits.

    Args:
        logits: shape (N, K). Published values use the 1008 outputs of the 2015 Inception network, and 50,000
            samples in 10 splits.
        splits: parts of (nearly) equal size, >= 1, N at least as many.
        generator: CPU generator that shuffles before splitting; None keeps the order, which is right for
            samples that are drawn in random order.

    References:
        Improved Techniques for Training GANs (Salimans et al., 2016), https://arxiv.org/abs/1606.03498.

    Raises:
        ValueError: logits that are not (N, K) or not finite, or a number of splits outside 1..N.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape (N, K), got {tuple(logits.shape)}")
    table = as_table(logits, "logits")
    check_count("splits", splits, at_most=len(table), hint=f"at most the {len(table)} samples")
    if generator is not None:
        table = table[torch.randperm(len(table), generator=generator).to(table.device)]
    log_p = table.log_softmax(dim=1)
    edges = [i * len(table) // splits for i in range(splits + 1)]
    parts = [log_p[start:stop] for start, stop in itertools.pairwise(edges)]
    scores = torch.stack([_score(part) for part in parts])
    return InceptionScore(float(scores.mean()), float(scores.std(correction=0)))


def _score(log_p: Tensor) -> Tensor:
    # The marginal in logarithms: a class that no sample shows has probability 0 in float64, and 0 log 0 is NaN.
    marginal = log_p.logsumexp(dim=0) - torch.log(torch.tensor(float(len(log_p)), dtype=log_p.dtype))
    return (log_p.exp() * (log_p - marginal)).sum(dim=1).mean().exp()
