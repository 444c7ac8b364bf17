"""Putting the shards of several processes back in the order of their indices."""

from __future__ import annotations

import torch
from torch import Tensor

from flowbench.core.distributed import gather_objects, world_size

__all__ = ["gather_by_index", "shard"]


def shard(num: int, rank: int, num_processes: int) -> Tensor:
    """Indices rank, rank + num_processes, ... below `num`: no padding, so shards may differ by one.

    Raises:
        ValueError: for fewer samples than processes.
    """
    if num < num_processes:
        raise ValueError(
            f"{num} samples are too few for {num_processes} processes: raise evaluator.num_samples and "
            "num_trajectories, or lower trainer.devices"
        )
    return torch.arange(rank, num, num_processes)


def gather_by_index(index: Tensor, values: Tensor) -> Tensor:
    """All processes' values in the order of their indices, on the CPU of every process.

    Args:
        index: global indices of this process's values, shape (n,), disjoint between processes.
        values: shape (n, *D); n may differ between processes.

    Returns:
        Shape (sum of n, *D).
    """
    index, values = index.detach().cpu(), values.detach().cpu()
    if world_size() > 1:
        parts = gather_objects((index, values))
        index, values = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    return values[torch.argsort(index)]
