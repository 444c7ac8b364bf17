"""What a coupling is asked in advance of a training step, and its answer."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from flowbench.flows import Coupling

__all__ = ["Problem", "Solved", "solve"]


@dataclass(frozen=True)
class Problem:
    """What a coupling is asked, on the CPU.

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
class Solved:
    """What a coupling answered.

    Attributes:
        index: a source point for every data point, int64 (N,).
        seconds: wall time of the solve.
    """

    index: Tensor
    seconds: float


def solve(coupling: Coupling, problem: Problem, num_threads: int) -> Solved:
    """Ask a coupling; inside it PyTorch computes on one thread, so that the answer does not depend on who asks.

    Args:
        coupling: what is asked.
        problem: and about what.
        num_threads: PyTorch's threads afterwards. Asked for here the number could be that of another solve.

    Raises:
        ValueError: what the coupling refuses.
    """
    start = time.perf_counter()
    rng = torch.Generator().manual_seed(problem.seed)
    torch.set_num_threads(1)  # sums of distances depend on it in their last bits, and ties with them
    try:
        index = coupling(problem.noise, problem.points, rng, problem.condition)
    finally:
        torch.set_num_threads(num_threads)
    return Solved(index.to(torch.int64), time.perf_counter() - start)
