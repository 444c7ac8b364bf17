"""Means of weights over the processes that share a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowbench.core.devices import reading_waits
from flowbench.core.distributed import gather_tensors, is_initialized

__all__ = ["global_log_mean_exp"]


def global_log_mean_exp(log_weight: Tensor) -> Tensor | float:
    """Log of the mean of exp over the batch (B,), and over all processes, whose batches may differ in size.

    Returns:
        A number where the weights are on the CPU: operations on one value cost as much there as those on a batch.
        Elsewhere a tensor of one value, because to read it is to wait for the device.
    """
    # torch.logsumexp looks for infinities and takes twice as long, which shows in every step of a small network.
    if not is_initialized():
        largest, share, count = log_weight.max(), log_weight.log_softmax(0).max(), len(log_weight)
        if not reading_waits(log_weight.device):
            return largest.item() - share.item() - math.log(count)
        return largest - share - math.log(count)
    sums = torch.stack([torch.logsumexp(log_weight, 0), log_weight.new_tensor(len(log_weight))])
    # One exchange of two numbers: every process then finishes the same sum by itself.
    totals, counts = gather_tensors(sums).unbind(1)
    mean = torch.logsumexp(totals, 0) - counts.sum().log()
    return mean if reading_waits(mean.device) else mean.item()
