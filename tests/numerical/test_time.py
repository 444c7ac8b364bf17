"""Training times against SciPy's distributions and numerical integrals."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from flowbench.core.seeds import generator
from flowbench.flows.time import LogitNormalTimes, PointTimes, TimeDistribution, UniformTimes, UShapedTimes

DISTRIBUTIONS = [
    UniformTimes(),
    LogitNormalTimes(),
    LogitNormalTimes(-0.8, 1.7),
    UShapedTimes(),
    UShapedTimes(0.01),
    UShapedTimes(60.0),
]
each = pytest.mark.parametrize("times", DISTRIBUTIONS, ids=repr)


@each
def test_draws_follow_the_density(times: TimeDistribution):
    t = times.sample(20_000, generator(0))
    assert t.shape == (20_000,)
    assert t.dtype == torch.float32
    assert ((t >= 0) & (t <= 1)).all()
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    cumulative = scipy.integrate.cumulative_trapezoid(times.density(grid).numpy(), grid.numpy(), initial=0)
    assert cumulative[-1] == pytest.approx(1, abs=1e-4)
    result = scipy.stats.kstest(t.double().numpy(), partial(np.interp, xp=grid.numpy(), fp=cumulative))
    assert result.pvalue > 1e-3


def test_closed_forms():
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    normal = scipy.stats.norm(-0.3, 0.7)
    expected = normal.pdf(t.logit().numpy()) / (t * (1 - t)).numpy()
    torch.testing.assert_close(LogitNormalTimes(-0.3, 0.7).density(t), torch.from_numpy(expected))
    draws = LogitNormalTimes(-0.3, 0.7).sample(20_000, generator(1)).double().logit().numpy()
    assert scipy.stats.kstest(draws, normal.cdf).pvalue > 1e-3
    # The density as the paper writes it, normalised by hand.
    shape = (4 * t).exp() + (4 * (1 - t)).exp()
    torch.testing.assert_close(UShapedTimes(4.0).density(t), shape * 4 / (2 * (torch.tensor(4.0).double().exp() - 1)))


def test_uniform_times_are_the_bits_of_rand():
    assert torch.equal(UniformTimes().sample(100, generator(7)), torch.rand(100, generator=generator(7)))


@each
def test_draws_are_a_function_of_the_generator(times: TimeDistribution):
    torch.manual_seed(0)
    first = times.sample(10, generator(3))
    torch.manual_seed(1)
    assert torch.equal(first, times.sample(10, generator(3)))
    assert not torch.equal(first, times.sample(10, generator(4)))


def test_a_point_is_a_point():
    rng = generator(0)
    before = rng.get_state()
    assert torch.equal(PointTimes(0.25).sample(3, rng), torch.full((3,), 0.25))
    assert torch.equal(rng.get_state(), before)
    assert PointTimes(0.25).density(torch.tensor([0.0, 0.25])).tolist() == [0, float("inf")]


def test_a_shallow_shape_is_uniform_and_a_sharp_one_sits_at_both_ends():
    torch.testing.assert_close(
        UShapedTimes(1e-4).sample(100, generator(0)), UniformTimes().sample(100, generator(0)), atol=1e-6, rtol=0
    )
    t = UShapedTimes(100.0).sample(1000, generator(0))
    assert torch.minimum(t, 1 - t).max() < 0.15
    assert 400 < (t < 0.5).sum() < 600


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogitNormalTimes(std=0), "std must be a number in .*, got 0"),
        (lambda: LogitNormalTimes(mean=float("nan")), "mean must be a number in .*, got nan"),
        (lambda: UShapedTimes(0), r"sharpness must be a number in .*, got 0"),
        (lambda: PointTimes(1.5), r"t must be a number in .*, got 1.5"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message: str):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
