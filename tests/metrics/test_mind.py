"""MIND against POT, closed forms, and the two things it is for: few samples of many features."""

from __future__ import annotations

import ot
import pytest
import torch

from flowbench.core.seeds import generator
from flowbench.metrics import frechet_distance_of_features, mind


def normal(num, dim, *name):
    return torch.randn(num, dim, generator=generator(12, *name), dtype=torch.float64)


def directions() -> torch.Generator:
    return generator(0, "directions")


@pytest.mark.parametrize("sizes", [(90, 90), (90, 70)], ids=["equal", "unequal"])
def test_equals_pot_with_the_same_projections(sizes):
    x, y = normal(sizes[0], 6, "x"), 2 * normal(sizes[1], 6, "y") + 0.5
    given = torch.randn(200, 6, generator=directions(), dtype=torch.float64)
    given = (given / given.norm(dim=1, keepdim=True)).T.numpy()
    expected = 3 * 6 * float(ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=given)) ** 2
    assert mind(x, y, directions(), 200) == pytest.approx(expected, rel=1e-10)


def test_is_nought_for_equal_sets_in_any_order_and_symmetric_bit_for_bit():
    x, y = normal(80, 5, "x"), normal(60, 5, "y")
    assert mind(x, x, directions()) == 0.0
    assert mind(x, x.flip(0), directions()) < 1e-25  # products of other rows may round otherwise
    assert mind(x, y, directions()) == mind(y, x, directions())


def test_a_shift_costs_three_times_its_square():
    """E <theta, m>^2 = |m|^2 / D over the sphere."""
    x, shift = normal(4000, 64, "x"), 0.3
    assert mind(x, x + shift, directions()) == pytest.approx(3 * 64 * shift**2, rel=0.1)


def test_two_independent_sets_differ_by_the_shift_and_a_small_bias():
    x, y = normal(4000, 64, "x"), normal(4000, 64, "y")
    assert mind(x, y + 0.5, directions()) == pytest.approx(3 * 64 * 0.5**2, rel=0.1)


def test_few_samples_of_many_features_still_prefer_the_truth_to_a_shrunken_model():
    """N = 500 samples of 512 features with spectrum 1 / k: the Frechet distance prefers nine tenths of the truth."""
    root = torch.arange(1, 513, dtype=torch.float64).rsqrt()
    real, true, shrunken = (normal(500, 512, name) * root for name in ("real", "true", "shrunken"))
    shrunken = 0.9 * shrunken
    assert frechet_distance_of_features(shrunken, real) < frechet_distance_of_features(true, real)
    assert mind(shrunken, real, directions()) > 1.3 * mind(true, real, directions())


def test_moments_that_match_do_not_hide_another_law():
    """Signs have mean 0 and variance 1, as normal numbers: W2^2 of one coordinate is 2 - 2 sqrt(2 / pi)."""
    x = normal(20_000, 1, "x")
    signs = torch.where(normal(20_000, 1, "sign") > 0, 1.0, -1.0).double()
    assert mind(x, signs, directions(), 1) == pytest.approx(3 * (2 - 2 * (2 / torch.pi) ** 0.5), rel=0.05)
    assert frechet_distance_of_features(x, signs) < 0.01


def test_users_mistakes_cost_one_line():
    with pytest.raises(ValueError, match="num_projections must be a whole number"):
        mind(torch.zeros(3, 2), torch.zeros(3, 2), directions(), 0)
    with pytest.raises(ValueError, match="x has 2 dimensions and y has 3"):
        mind(torch.zeros(3, 2), torch.zeros(3, 3), directions())
