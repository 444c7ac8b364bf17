"""A part of the training split: nested, in proportion, keyed by the seed, and what still takes the whole."""

from __future__ import annotations

import pytest
import torch

from flowbench.config.followed_data import with_data_of
from flowbench.data import EndlessSampler, FlowDataModule


def visited(size: int | None, seed: int = 0, steps: int = 60) -> set[int]:
    """The places in the split of everything that a training sees."""
    data = FlowDataModule("digits", batch_size=50, train_size=size, seed=seed)
    return {int(i) for step in range(steps) for i in data.train_batch_at(50 * step).index}


def test_the_stream_holds_so_many_samples_and_smaller_sets_are_inside_of_larger_ones():
    small, large, every = visited(100), visited(250), visited(None)
    assert (len(small), len(large)) == (100, 250)
    assert small < large < every


def test_every_epoch_has_every_sample_once():
    data = FlowDataModule("digits", batch_size=50, train_size=100)
    epochs = [torch.cat([data.train_batch_at(100 * epoch + half).index for half in (0, 50)]) for epoch in (0, 3)]
    assert torch.equal(epochs[0].sort().values, epochs[1].sort().values)
    assert len(epochs[0].unique()) == 100
    assert not torch.equal(*epochs)


def test_classes_are_in_proportion_and_another_seed_chooses_others():
    data = FlowDataModule("digits", train_size=250)
    whole = data.split("train").label.bincount().double()
    found = data.split("train").label[data.train_indices].bincount().double()
    assert (found - 250 * whole / whole.sum()).abs().max() <= 1
    other = FlowDataModule("digits", train_size=250, seed=1).train_indices
    shared = len(set(other.tolist()) & set(data.train_indices.tolist()))
    # Two independent draws of 250 of 1077 share 58 on average, with a standard deviation of 5.7.
    assert shared == pytest.approx(250**2 / whole.sum().item(), abs=5 * 5.7)


def test_batches_hold_what_the_split_holds_at_their_indices():
    data = FlowDataModule("digits", batch_size=16, train_size=40)
    batch = data.train_batch_at(0)
    assert torch.equal(batch.label, data.split("train").label[batch.index])
    assert torch.equal(data.spec.to_uint8(batch.x), data.uint8_images("train", batch.index))


def test_what_is_compared_with_the_training_split_takes_the_whole_of_it():
    part, whole = FlowDataModule("digits", train_size=40), FlowDataModule("digits")
    assert torch.equal(part.model_values("train"), whole.model_values("train"))
    assert (part.num_train, whole.num_train) == (40, len(whole.split("train")))


def test_the_whole_split_by_its_size_is_the_whole_split():
    number = len(FlowDataModule("digits").split("train"))
    data, whole = FlowDataModule("digits", train_size=number), FlowDataModule("digits")
    assert torch.equal(data.train_batch_at(128).x, whole.train_batch_at(128).x)


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="train_size"):
        FlowDataModule("digits", train_size=size)


def test_more_samples_than_there_are_are_refused():
    with pytest.raises(ValueError, match="train_size: digits has 1077 training samples, got 1078"):
        FlowDataModule("digits", train_size=1078).train_batch_at(0)


def test_members_of_another_number_are_refused():
    with pytest.raises(ValueError, match="members: must be the places of 3 samples, got 2"):
        EndlessSampler(3, 1, 0, members=torch.tensor([1, 5]))


def test_what_is_required_is_trained_on_as_many():
    own = {"dataset": "digits", "batch_size": 64}
    assert with_data_of(own, {"dataset": "digits", "train_size": 250}) == {**own, "train_size": 250}
    assert with_data_of(own, {"dataset": "digits"}) == own
    moons = with_data_of(own, {"dataset": "moons", "train_size": 20, "seed": 1})
    assert moons == {"dataset": "moons", "train_size": 20, "batch_size": 64}
