"""Means of weights over the processes that share a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributed

__all__ = ["global_log_mean_exp", "is_distributed"]


def is_distributed() -> bool:
    """Whether several processes may share a batch."""
    return distributed.is_available() and distributed.is_initialized()


def global_log_mean_exp(log_weight: Tensor) -> Tensor:
    """Log of the mean of exp over the batch (B,), and over all processes, whose batches may differ in size."""
    total, count = torch.logsumexp(log_weight, 0), len(log_weight)
    if not is_distributed():
        return total - math.log(count)
    share = torch.stack([total, total.new_tensor(count)])
    shares = [torch.empty_like(share) for _ in range(distributed.get_world_size())]
    # One exchange of two numbers: every process then finishes the same sum by itself.
    distributed.all_gather(shares, share)
    totals, counts = torch.stack(shares).unbind(1)
    return torch.logsumexp(totals, 0) - counts.sum().log()
