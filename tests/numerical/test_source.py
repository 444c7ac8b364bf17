"""The source against torch.distributions and the seeding rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.core.seeds import generator
from flowbench.flows import GaussianSource


@given(std=st.floats(0.1, 10), shape=st.sampled_from([(2,), (1, 4, 4)]))
@settings(max_examples=20, deadline=None)
def test_log_prob_is_that_of_a_normal(std: float, shape: tuple[int, ...]):
    x = GaussianSource(std).sample(7, shape, generator(0, "x"))
    normal = torch.distributions.Normal(torch.zeros(()).double(), std)
    expected = normal.log_prob(x.double()).flatten(1).sum(1)
    log_prob = GaussianSource(std).log_prob(x)
    assert log_prob.shape == (7,)
    torch.testing.assert_close(log_prob, expected)


def test_samples_have_the_right_scale_and_follow_the_generator():
    source = GaussianSource(2.0)
    x = source.sample(50_000, (2,), generator(1, "noise"))
    assert x.std().item() == pytest.approx(2.0, rel=0.01)
    assert x.mean().item() == pytest.approx(0.0, abs=0.03)
    assert torch.equal(x, source.sample(50_000, (2,), generator(1, "noise")))
    state = torch.random.get_rng_state()
    source.sample(3, (2,), generator(1, "noise"))
    assert torch.equal(state, torch.random.get_rng_state())


def test_indexed_samples_do_not_depend_on_the_batch():
    source = GaussianSource(3.0)
    whole = source.sample_indexed(range(6), (1, 2, 2), 5, "noise")
    part = source.sample_indexed(torch.tensor([4, 1]), (1, 2, 2), 5, "noise")
    assert torch.equal(part, whole[[4, 1]])
    assert torch.equal(whole, 3 * GaussianSource().sample_indexed(range(6), (1, 2, 2), 5, "noise"))


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_scale_is_refused(std: float):
    with pytest.raises(ValueError, match="std must be a number in"):
        GaussianSource(std)
