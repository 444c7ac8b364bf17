"""What processes tell each other: two and one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flowbench.core import distributed
from tests.ranks import run_ranks


def values(rank: int) -> torch.Tensor:
    return torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)[rank]


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    own = values(rank)
    found = {
        "who": (distributed.is_initialized(), distributed.rank(), distributed.world_size()),
        # The second process sends more than the first.
        "objects": distributed.gather_objects(["first", *["second"] * rank]),
        "tensors": distributed.gather_tensors(own),
        "sum": distributed.sum_over_processes(own),
        "broadcast": distributed.broadcast(own),
        "own": own,
    }
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_the_same(tmp_path):
    run_ranks(work, str(tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["who"] == (True, rank, 2)
        assert found["objects"] == [["first"], ["first", "second"]]
        assert found["tensors"].tolist() == [[1, 2], [3, 4]]
        assert found["sum"].tolist() == [4, 6]
        assert found["broadcast"].tolist() == [1, 2]
        assert found["own"].tolist() == values(rank).tolist(), "what was given stays as it was"
        assert found["sum"].dtype == torch.float64


def test_a_process_alone_needs_no_group():
    own = values(1)
    assert (distributed.is_initialized(), distributed.rank(), distributed.world_size()) == (False, 0, 1)
    assert distributed.gather_objects("x") == ["x"]
    assert distributed.gather_tensors(own).tolist() == [[3, 4]]


@pytest.mark.parametrize("call", [distributed.sum_over_processes, distributed.broadcast])
def test_what_comes_back_is_new_even_alone(call):
    own = values(1)
    call(own).zero_()
    assert own.tolist() == [3, 4]
