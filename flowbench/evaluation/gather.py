"""Putting the shards of several processes back in the order of their indices."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather_by_index", "shard"]


def shard(num: int, rank: int, world_size: int) -> Tensor:
    """Indices rank, rank + world_size, ... below `num`: no padding, so shards may differ by one.

    Raises:
        ValueError: for fewer samples than processes.
    """
    if num < world_size:
        raise ValueError(
            f"{num} samples are too few for {world_size} processes: raise evaluator.num_samples and "
            "num_trajectories, or lower trainer.devices"
        )
    return torch.arange(rank, num, world_size)


def gather_by_index(index: Tensor, values: Tensor) -> Tensor:
    """All processes' values in the order of their indices, on the CPU of every process.

    Args:
        index: global indices of this process's values, shape (n,), disjoint between processes.
        values: shape (n, *D); n may differ between processes.

    Returns:
        Shape (sum of n, *D).
    """
    index, values = index.detach().cpu(), values.detach().cpu()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        parts: list[tuple[Tensor, Tensor]] = [(index, values)] * dist.get_world_size()
        dist.all_gather_object(parts, (index, values))
        index, values = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    return values[torch.argsort(index)]
