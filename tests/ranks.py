"""Several processes for a test, forked from one that has imported everything: a tenth of what new ones take."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from torch.multiprocessing import start_processes

__all__ = ["run_ranks"]


def run_ranks(work: Callable[..., None], *arguments: Any, number: int = 2) -> None:
    """Call ``work(rank, *arguments)`` in each of ``number`` processes and wait for all of them."""
    # A process that has trained cannot be forked; the fork server imports and does nothing else.
    multiprocessing.set_forkserver_preload(["flowbench.evaluation", "flowbench.families"])
    start_processes(work, arguments, nprocs=number, start_method="forkserver")
