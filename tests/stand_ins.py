"""Stand-ins for parts of Lightning that a test asks few things of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

__all__ = ["trainer_on"]


def trainer_on(rank: int = 0, world: int = 1, step: int = 0, injects: bool = False, accumulate: int = 1) -> Any:
    """The trainer of one process, as the datamodule sees it.

    Args:
        rank: of the process.
        world: number of processes.
        step: optimiser steps so far.
        injects: whether Lightning would replace the samplers.
        accumulate: batches a step.
    """
    return SimpleNamespace(
        global_rank=rank,
        world_size=world,
        global_step=step,
        accumulate_grad_batches=accumulate,
        overfit_batches=0.0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=injects),
    )
