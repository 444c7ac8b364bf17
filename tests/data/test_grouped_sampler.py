"""Groups of one class: what they hold, how often, on how many processes, and what is refused."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.data import Batch, EndlessSampler, FlowDataModule, GroupedSampler

# Classes of different sizes, all with enough samples for the largest group, shuffled.
labels = st.tuples(st.lists(st.integers(5, 23), min_size=1, max_size=4), st.integers(0, 100)).map(
    lambda drawn: torch.repeat_interleave(torch.arange(len(drawn[0])), torch.tensor(drawn[0]))[
        torch.randperm(sum(drawn[0]), generator=torch.Generator().manual_seed(drawn[1]))
    ]
)
sizes = st.integers(1, 5)
examples = settings(max_examples=25, deadline=None)


@examples
@given(label=labels, size=sizes, seed=st.integers(0, 1000), groups=st.integers(1, 6))
def test_a_group_is_of_one_class_and_holds_no_sample_twice(label, size, seed, groups):
    for batch in islice(GroupedSampler(label, size, groups * size, seed), 20):
        assert batch.group_size == size
        for group in batch.indices.view(-1, size):
            assert len(label[group].unique()) == 1
            assert len(group.unique()) == size


@examples
@given(label=labels, size=sizes, seed=st.integers(0, 1000), skip=st.integers(0, 9))
def test_the_stream_resumes_exactly(label, size, seed, skip):
    batch = 3 * size
    run = [b.indices for b in islice(GroupedSampler(label, size, batch, seed), 12)]
    resumed = GroupedSampler(label, size, batch, seed, start=lambda: skip * batch)
    assert torch.equal(torch.cat(run[skip:]), torch.cat([b.indices for b in islice(resumed, 12 - skip)]))


@examples
@given(label=labels, size=sizes, seed=st.integers(0, 99), position=st.integers(0, 200), num=st.integers(1, 60))
def test_any_part_of_the_stream_is_that_part_of_the_whole(label, size, seed, position, num):
    sampler = GroupedSampler(label, size, size, seed)
    assert torch.equal(sampler.stream(position, num), sampler.stream(0, position + num)[position:])


@examples
@given(label=labels, size=sizes, world=st.integers(1, 3), groups=st.integers(1, 3), seed=st.integers(0, 1000))
def test_the_number_of_processes_does_not_change_a_global_batch(label, size, world, groups, seed):
    batch = size * world * groups
    single = GroupedSampler(label, size, batch, seed)
    ranks = [GroupedSampler(label, size, batch, seed, rank, world) for rank in range(world)]
    for whole, *parts in islice(zip(single, *ranks, strict=True), 5):
        assert torch.equal(whole.indices, torch.cat([part.indices for part in parts]))
        assert {len(part.indices) for part in parts} == {size * groups}


@examples
@given(label=labels, size=sizes, seed=st.integers(0, 1000), epochs=st.integers(1, 40))
def test_classes_keep_their_frequencies_and_samples_are_used_equally_often(label, size, seed, epochs):
    sampler = GroupedSampler(label, size, size, seed)
    counts = label.bincount()
    groups = epochs * counts // size
    uses = sampler.stream(0, int(groups.sum()) * size).bincount(minlength=len(label))
    for number, count in enumerate(counts.tolist()):
        of_class = uses[label == number]
        # A class has its share of the epochs' samples, up to one group; the least and the most used differ by two.
        assert int(of_class.sum()) == size * (epochs * count // size)
        assert int(of_class.max() - of_class.min()) <= 2


def test_no_sample_is_left_out_for_ever():
    label = torch.zeros(7, dtype=torch.int64)  # a rest of 3 in each permutation
    uses = GroupedSampler(label, 4, 4, 0).stream(0, 4 * 70).bincount(minlength=7)
    assert uses.tolist() == [40] * 7


def test_epochs_and_seeds_differ():
    label = torch.arange(3).repeat(20)
    first, second = GroupedSampler(label, 5, 5, 0), GroupedSampler(label, 5, 5, 1)
    assert not torch.equal(first.stream(0, 60), first.stream(60, 60))
    assert not torch.equal(first.stream(0, 60), second.stream(0, 60))


def test_batches_of_the_datamodule_are_grouped_and_those_of_evaluation_are_not():
    data = FlowDataModule("digits", batch_size=40, group_size=5)
    batch = data.train_batch_at(80)
    assert batch.group_size == 5
    assert bool((batch.label.view(8, 5) == batch.label[::5, None]).all())
    assert torch.equal(batch.label, data.split("train").label[batch.index])
    held_out = next(iter(data.evaluation_loader("val")))
    assert held_out.group_size == 1
    assert len(held_out.label[:5].unique()) > 1


def test_no_groups_is_the_stream_that_there_was():
    data = FlowDataModule("digits", batch_size=64, group_size=1)
    assert torch.equal(data.train_batch_at(128).index, EndlessSampler(data.num_train, 64, 0).stream(128, 64))


def test_groups_share_the_label_that_batches_carry_and_stay_in_the_part_that_is_trained_on():
    noisy = FlowDataModule("digits", batch_size=40, group_size=4, label_noise=0.5)
    batch = noisy.train_batch_at(0)
    assert bool((batch.label.view(10, 4) == batch.label[::4, None]).all())
    assert not torch.equal(batch.label, noisy.split("train").label[batch.index])
    part = FlowDataModule("digits", batch_size=40, group_size=4, train_size=100)
    seen = torch.cat([part.train_batch_at(40 * step).index for step in range(20)])
    assert set(seen.tolist()) == set(part.train_indices.tolist())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FlowDataModule("digits", group_size=0), "group_size must be a whole number in .*, got 0"),
        (lambda: FlowDataModule("digits", batch_size=64, group_size=5), "batch_size: 64 .* must be a multiple of 5"),
        (
            lambda: GroupedSampler(torch.zeros(12).long(), 6, 6, 0, rank=0, world_size=2),
            "batch_size: 6 .* must be a multiple of 12",
        ),
        (
            lambda: GroupedSampler(torch.tensor([0, 0, 0, 1, 1]), 3, 3, 0),
            "class 1 has 2 training samples, fewer than a group of 3; lower group_size",
        ),
        (
            lambda: FlowDataModule("ring", batch_size=4, group_size=2).train_batch_at(0),
            "group_size: ring has no labels; set it to 1",
        ),
        (lambda: Batch(torch.zeros(7, 2), group_size=5), "7 samples are not made of groups of 5"),
    ],
)
def test_what_cannot_be_grouped_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
