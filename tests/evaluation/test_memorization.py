"""Rows and pictures of memorisation: copies of the training data are found."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowbench.data import DataSpec
from flowbench.evaluation import Answers, Memorization

from .known import DIGITS, cloud, compared, sample_set


def split(samples: Tensor, train: Tensor, held_out: Tensor, spec: DataSpec) -> Answers:
    named = {"generated": samples, "train": train, "test": held_out}
    sets = {name: sample_set(x, spec, name) for name, x in named.items()}
    for kept, name in ((sets["generated"], "generated"), (sets["train"], "train")):
        kept._images = lambda index, x=named[name]: spec.to_uint8(x[index])
    return compared(sets["generated"], sets["train"], held_out=sets["test"])


def test_copies_are_found_and_shown():
    """Seven of twenty samples are training images: they are the worst pairs, beside the image they copy."""
    train, fresh, held_out = (cloud(num, DIGITS, seed) for num, seed in ((80, 1), (20, 2), (30, 3)))
    copies = fresh.clone()
    copies[5:12] = train[30:37]
    metric = Memorization("identity", num_pairs=7)
    found = {m.metric: m for m in metric.measure(split(copies, train, held_out, DIGITS))}
    plain = {m.metric: m for m in metric.measure(split(fresh, train, held_out, DIGITS))}
    assert found["data_copying[identity]"].value < plain["data_copying[identity]"].value - 1
    assert found["authenticity[identity]"].value == pytest.approx(plain["authenticity[identity]"].value, abs=7.5 / 20)
    assert found["authenticity[identity]"].value <= 13 / 20
    assert found["authenticity[identity]"].protocol == "identity/train-80/20/test-20"
    picture = metric.pictures(split(copies, train, held_out, DIGITS))["nearest-identity"]
    # Two rows of seven, framed and enlarged: the upper row is the lower one.
    assert torch.equal(picture[:, :34], picture[:, 34:])
    assert picture.shape == (1, 2 * 34, 7 * 34)


def test_diverged_samples_have_no_memorisation():
    samples = cloud(20, DIGITS, 0)
    samples[3, 0, 0, 0] = math.nan
    given = split(samples, cloud(30, DIGITS, 1), cloud(30, DIGITS, 2), DIGITS)
    metric = Memorization("identity")
    assert all(math.isnan(m.value) for m in metric.measure(given))
    assert metric.pictures(given) == {}
