"""Noise on training labels: how much, where, and what stays clean."""

from __future__ import annotations

import pytest
import torch

from flowbench.data import FlowDataModule


def labels(data: FlowDataModule) -> torch.Tensor:
    """The labels of one epoch of the training stream, in the order of the samples."""
    batch = data.train_batch_at(0)
    return batch.label[batch.index.argsort()]


def module(noise: float, seed: int = 0) -> FlowDataModule:
    return FlowDataModule("digits", batch_size=1257, label_noise=noise, seed=seed)


def test_a_share_of_the_training_labels_is_replaced_and_nothing_else():
    clean, noisy = module(0.0), module(0.5)
    number = len(clean.split("train"))
    clean.batch_size = noisy.batch_size = number
    true, found = labels(clean), labels(noisy)
    assert torch.equal(true, clean.split("train").label)
    # A tenth of the replaced labels is drawn right by chance: 0.45 of all differ, with a standard error of 0.014.
    assert (true != found).float().mean().item() == pytest.approx(0.45, abs=0.05)
    assert torch.equal(noisy.split("train").label, true), "what is measured keeps the true labels"
    assert torch.equal(clean.train_batch_at(0).x, noisy.train_batch_at(0).x)


def test_the_noise_is_a_function_of_the_seed():
    first, again, other = module(0.3), module(0.3), module(0.3, seed=1)
    assert torch.equal(first._noisy_labels, again._noisy_labels)
    assert not torch.equal(first._noisy_labels, other._noisy_labels)


@pytest.mark.parametrize("noise", [-0.1, 1.1])
def test_a_share_out_of_range_is_refused(noise):
    with pytest.raises(ValueError, match="label_noise"):
        module(noise)


def test_data_without_labels_have_none_to_replace():
    with pytest.raises(ValueError, match="s_curve has no labels"):
        FlowDataModule("s_curve", batch_size=4, label_noise=0.3).train_batch_at(0)
