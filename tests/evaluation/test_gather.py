from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.evaluation.gather import gather_by_index, shard


@settings(max_examples=50, deadline=None)
@given(rest=st.integers(0, 50), world=st.integers(1, 4))
def test_shards_cover_every_index_once(rest, world):
    num = world + rest
    shards = [shard(num, rank, world) for rank in range(world)]
    assert sorted(torch.cat(shards).tolist()) == list(range(num))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_fewer_samples_than_processes_are_refused():
    with pytest.raises(ValueError, match="1 samples are too few for 2 processes"):
        shard(1, 0, 2)


@settings(max_examples=30, deadline=None)
@given(num=st.integers(4, 40), world=st.integers(1, 4), seed=st.integers(0, 1000))
def test_values_come_back_in_the_order_of_their_indices(num, world, seed):
    """Whatever the order in which processes and batches delivered them."""
    values = torch.randn(num, 3, generator=torch.Generator().manual_seed(seed))
    index = torch.cat([shard(num, rank, world) for rank in range(world)])
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(gather_by_index(index[order], values[index[order]].requires_grad_()), values)
