"""Values of all processes of a run, gathered, summed or broadcast: collective calls, which every process must make.

Without a process group there is one process, of rank 0, and nothing is sent.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "broadcast",
    "gather_objects",
    "gather_tensors",
    "is_initialized",
    "rank",
    "sum_over_processes",
    "world_size",
]

Value = TypeVar("Value")


def is_initialized() -> bool:
    """Whether this process belongs to a group, be it of one process."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_initialized() else 1


def gather_objects(value: Value) -> list[Value]:
    """The values of all processes, in the order of their ranks, on each of them.

    Args:
        value: anything that can be pickled; sizes may differ between processes.
    """
    if not is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_tensors(value: Tensor) -> Tensor:
    """The tensors of all processes, in the order of their ranks, on each of them; the host does not wait.

    Args:
        value: of one shape (*S) and type on all processes.

    Returns:
        Shape (processes, *S), on the device of `value`.
    """
    if not is_initialized():
        return value[None]
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value)
    return torch.stack(values)


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on each of them, as a new tensor on the device of `value`."""
    if not is_initialized():
        return value.clone()
    carried = value.to(_carrier(), copy=True)
    dist.all_reduce(carried, op=dist.ReduceOp.SUM)
    return carried.to(value.device)


def broadcast(value: Tensor) -> Tensor:
    """The first process's tensor, on each of them, as a new tensor on the device of `value`.

    Args:
        value: of one shape and type on all processes.
    """
    if not is_initialized():
        return value.clone()
    carried = value.to(_carrier(), copy=True)
    dist.broadcast(carried, src=0)
    return carried.to(value.device)


def _carrier() -> torch.device:
    """Device of a tensor to be sent: CUDA for NCCL, the CPU for gloo."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
