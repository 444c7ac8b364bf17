"""A part of a measurement that fails on one process fails on all; nobody waits for the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flowbench.core.no_solution import NoSolutionError
from flowbench.evaluation.failures import Failure, Failures, PartFailedError, agreed, together
from flowbench.evaluation.gather import gather_by_index, shard
from tests.ranks import run_ranks

ERRORS = {"numerical": NoSolutionError("gave up"), "mistake": TypeError("no such operand")}


def answer(rank: int, world_size: int, broken: int, error: Exception) -> torch.Tensor:
    """Work of its own, then a collective."""
    index = shard(7, rank, world_size)
    with agreed():
        if rank == broken:
            raise error
        values = index.double()
    return gather_by_index(index, values)


def measure(rank: int, world_size: int, broken: int, error: Exception) -> dict[str, str]:
    failures, told = Failures(), {}
    first = failures.ask(lambda: answer(rank, world_size, broken, error))
    second = failures.ask(lambda: answer(rank, world_size, -1, error))
    assert isinstance(first, Failure)
    told["reason"] = first.reason
    told["other"] = str(second.tolist())
    try:
        with together():
            failures.raise_bug()
        told["end"] = "done"
    except (PartFailedError, RuntimeError, TypeError) as raised:
        told["end"] = f"{type(raised).__name__}: {raised}"
    dist.barrier()
    return told


CASES = [(broken, kind) for broken in (0, 1) for kind in ERRORS]


def worker(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    told = [measure(rank, world_size, broken, ERRORS[kind]) for broken, kind in CASES]
    torch.save(told, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list[list[dict[str, str]]]:
    """By process and case."""
    folder = tmp_path_factory.mktemp("processes")
    run_ranks(worker, 2, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(("broken", "kind"), CASES)
def test_a_failure_of_one_process_is_the_failure_of_all(told, broken, kind):
    here, there = (told[rank][CASES.index((broken, kind))] for rank in (broken, 1 - broken))
    own = {"numerical": "gave up", "mistake": "TypeError: no such operand"}[kind]
    assert here["reason"] == own
    assert there["reason"] == f"process {broken}: {own}"
    assert here["other"] == there["other"] == str([float(i) for i in range(7)])
    if kind == "numerical":
        assert here["end"] == there["end"] == "done"
    else:
        assert here["end"] == own
        assert there["end"] == f"RuntimeError: process {broken}: {own}"
