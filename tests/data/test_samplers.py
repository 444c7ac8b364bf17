"""The endless stream and the shards."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.data import EndlessSampler, ShardedSampler


@settings(max_examples=20, deadline=None)
@given(num=st.integers(1, 40), batch=st.integers(1, 60), seed=st.integers(0, 1000), skip=st.integers(0, 9))
def test_stream_resumes_exactly(num: int, batch: int, seed: int, skip: int) -> None:
    run = [b.indices for b in islice(EndlessSampler(num, batch, seed), 12)]
    resumed = [b.indices for b in islice(EndlessSampler(num, batch, seed, start=lambda: skip * batch), 12 - skip)]
    assert torch.equal(torch.cat(run[skip:]), torch.cat(resumed))


@settings(max_examples=20, deadline=None)
@given(num=st.integers(1, 40), local=st.integers(1, 9), world=st.integers(1, 3), seed=st.integers(0, 1000))
def test_world_size_does_not_change_a_global_batch(num: int, local: int, world: int, seed: int) -> None:
    single = EndlessSampler(num, local * world, seed)
    ranks = [EndlessSampler(num, local * world, seed, rank, world) for rank in range(world)]
    for whole, *parts in islice(zip(single, *ranks, strict=True), 5):
        assert torch.equal(whole.indices, torch.cat([part.indices for part in parts]))
        assert {part.position for part in parts} == {whole.position}


@settings(max_examples=20, deadline=None)
@given(num=st.integers(1, 40), epoch=st.integers(0, 5), seed=st.integers(0, 1000))
def test_every_epoch_is_a_permutation(num: int, epoch: int, seed: int) -> None:
    order = EndlessSampler(num, 1, seed).stream(epoch * num, num)
    assert order.sort().values.tolist() == list(range(num))


def test_epochs_and_seeds_differ() -> None:
    first, second = EndlessSampler(100, 100, 0), EndlessSampler(100, 100, 1)
    assert not torch.equal(first.stream(0, 100), first.stream(100, 100))
    assert not torch.equal(first.stream(0, 100), second.stream(0, 100))


def test_iteration_asks_for_the_position_again() -> None:
    position = [0]
    sampler = EndlessSampler(10, 4, 0, start=lambda: position[0])
    assert next(iter(sampler)).position == 0
    position[0] = 8
    assert next(iter(sampler)).position == 8


def test_stream_has_no_length() -> None:
    with pytest.raises(TypeError):
        len(EndlessSampler(10, 4, 0))  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(num=st.integers(1, 60), batch=st.integers(1, 12), world=st.integers(1, 3))
def test_shards_cover_exactly_once_in_step(num: int, batch: int, world: int) -> None:
    if num < world:
        with pytest.raises(ValueError, match="too few"):
            ShardedSampler(num, batch, 0, world)
        return
    shards = [list(ShardedSampler(num, batch, rank, world)) for rank in range(world)]
    seen = torch.cat([b.indices for shard in shards for b in shard])
    assert seen.sort().values.tolist() == list(range(num))
    assert len({len(shard) for shard in shards}) == 1
    assert len(shards[0]) == len(ShardedSampler(num, batch, 0, world))
    sizes = [len(b.indices) for shard in shards for b in shard]
    assert min(sizes) >= 1
    assert max(sizes) <= max(batch, 2 if world > 1 else 1)
    for shard in shards:
        local = [len(b.indices) for b in shard]
        assert max(local) - min(local) <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EndlessSampler(10, 5, 0, 0, 2), "batch_size: 5 .* positive multiple of the 2 processes"),
        (lambda: EndlessSampler(10, 0, 0), "batch_size must be a whole number in .*, got 0"),
        (
            lambda: EndlessSampler(0, 5, 0),
            "num_samples must be a whole number in .*, got 0: the size of the training split",
        ),
        (lambda: EndlessSampler(10, 6, 0, 2, 2), r"rank must be a whole number in \[0, 1\], got 2"),
        (lambda: ShardedSampler(10, 0), "batch_size must be a whole number in .*, got 0"),
        (lambda: ShardedSampler(2, 4, 0, 3), "num_samples=2 are too few for 3 processes"),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
