"""A coupling computed in advance of the training step that needs it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from flowbench.flows import Coupling

__all__ = ["CouplingJob", "CouplingResult", "solve"]


@dataclass(frozen=True)
class CouplingJob:
    """The arguments of a coupling, on the CPU.

    Attributes:
        noise: source points, shape (N, *D).
        points: data points, shape (N, *D).
        condition: of the data points, first dimension N, or None.
        seed: of the coupling's own draws.
    """

    noise: Tensor
    points: Tensor
    condition: Tensor | None
    seed: int


@dataclass(frozen=True)
class CouplingResult:
    """The result of a coupling.

    Attributes:
        index: a source point for every data point, int64 (N,).
        seconds: wall time of the solve.
    """

    index: Tensor
    seconds: float


def solve(coupling: Coupling, job: CouplingJob, num_threads: int) -> CouplingResult:
    """Call a coupling; PyTorch computes on one thread in it, so that the result does not depend on the caller.

    Args:
        coupling: chooses the pairs.
        job: what it is given.
        num_threads: PyTorch's threads afterwards; read here, the number could be that of another solve.

    Raises:
        ValueError: what the coupling refuses.
    """
    start = time.perf_counter()
    rng = torch.Generator().manual_seed(job.seed)
    torch.set_num_threads(1)  # sums of distances depend on it in their last bits, and ties with them
    try:
        index = coupling(job.noise, job.points, rng, job.condition)
    finally:
        torch.set_num_threads(num_threads)
    return CouplingResult(index.to(torch.int64), time.perf_counter() - start)
