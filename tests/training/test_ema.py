from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flowbench.training.ema import ExponentialMovingAverage


def linear(value: float) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


@given(decay=st.floats(0.0, 0.999), values=st.lists(st.floats(-5, 5), min_size=1, max_size=30))
@settings(max_examples=20, deadline=None)
def test_average_equals_the_written_out_recursion(decay, values):
    layer = linear(1.0)
    ema, expected = ExponentialMovingAverage(layer, decay), 1.0
    for n, value in enumerate(values):
        nn.init.constant_(layer.weight, value)
        ema.update()
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * value
    with ema.applied():
        assert layer.weight.item() == pytest.approx(expected, abs=1e-4)
    assert layer.weight.item() == pytest.approx(values[-1])


def test_live_weights_come_back_bit_for_bit_after_an_error():
    layer = nn.Linear(3, 3)
    ema = ExponentialMovingAverage(layer, 0.9)
    with torch.no_grad():
        layer.weight.mul_(1.1)
    before = layer.weight.clone()
    with pytest.raises(RuntimeError), ema.applied():
        assert not torch.equal(layer.weight, before)
        raise RuntimeError
    assert torch.equal(layer.weight, before)


def test_state_round_trip_and_mismatch():
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    ema = ExponentialMovingAverage(layer, 0.5)
    ema.update()
    copy = ExponentialMovingAverage(other, 0.5)
    copy.load_state_dict(ema.state_dict())
    assert copy.num_updates == 1
    with ema.applied(), copy.applied():
        assert torch.equal(layer.weight, other.weight)
    with pytest.raises(ValueError, match="on one side only"):
        ExponentialMovingAverage(nn.Linear(2, 2, bias=False), 0.5).load_state_dict(ema.state_dict())


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=r"ema\.decay"):
        ExponentialMovingAverage(linear(1.0), decay)
