"""Guided Gaussians against their limits and against densities evaluated on a grid."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.core.seeds import generator
from flowbench.flows import GuidanceRule, guided_gaussian

RULES = get_args(GuidanceRule)

means = st.floats(-2, 2)
positive = st.floats(0.2, 3)


@given(mean_c=means, mean_u=means, std_c=positive, ratio=st.floats(1, 4), w=st.floats(0, 4))
@settings(max_examples=20, deadline=None)
def test_guided_gaussian_is_the_normalised_product(mean_c, mean_u, std_c, ratio, w):
    std_u = ratio * std_c  # no clipping: the unconditional is wider
    mean, std = guided_gaussian(*(torch.tensor(v, dtype=torch.float64) for v in (mean_c, std_c, mean_u, std_u)), w)
    x = mean + 12 * std * torch.linspace(-1, 1, 4001, dtype=torch.float64)
    log_density = -(1 + w) * (x - mean_c) ** 2 / (2 * std_c**2) + w * (x - mean_u) ** 2 / (2 * std_u**2)
    density = log_density.softmax(0)
    assert (density * x).sum().item() == pytest.approx(mean.item(), abs=1e-6)
    assert (density * (x - mean) ** 2).sum().item() == pytest.approx(std.item() ** 2, rel=1e-6)


@given(mean_c=means, mean_u=means, std=positive, w=st.floats(0, 4))
@settings(max_examples=20, deadline=None)
def test_equal_or_narrower_unconditional_gives_classifier_free_guidance(mean_c, mean_u, std, w):
    for std_u in (std, 0.3 * std):
        mean, new_std = guided_gaussian(
            *(torch.tensor(v, dtype=torch.float64) for v in (mean_c, std, mean_u, std_u)), w
        )
        assert mean.item() == pytest.approx(mean_c + w * (mean_c - mean_u), abs=1e-9)
        assert new_std.item() == pytest.approx(std)


@given(mean_c=means, mean_u=means, std_c=positive, std_u=positive, w=st.floats(0, 4))
@settings(max_examples=50, deadline=None)
def test_extrapolating_rules_by_hand(mean_c, mean_u, std_c, std_u, w):
    pair = [torch.tensor(v, dtype=torch.float64) for v in (mean_c, std_c, mean_u, std_u)]
    for rule, expected in (
        ("log-scale", std_c ** (1 + w) * std_u**-w),
        ("linear", max((1 + w) * std_c - w * std_u, std_c / (1 + w))),
    ):
        mean, std = guided_gaussian(*pair, w, rule)
        assert mean.item() == pytest.approx((1 + w) * mean_c - w * mean_u, abs=1e-12)
        assert std.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_limits_that_all_rules_share(rule):
    draws = [torch.randn(50, generator=generator(0, i)) for i in range(4)]
    mean_c, std_c, mean_u, std_u = draws[0], draws[1].exp(), draws[2], draws[3].exp()
    # No weight: bitwise the conditional, as a number and as a tensor.
    for weight in (0.0, torch.zeros(50)):
        mean, std = guided_gaussian(mean_c, std_c, mean_u, std_u, weight, rule)
        assert mean.equal(mean_c)
        assert std.equal(std_c)
    # Equal branches: any weight changes nothing.
    for weight in (0.5, 7.0, 1e3):
        mean, std = guided_gaussian(mean_c, std_c, mean_c, std_c, weight, rule)
        torch.testing.assert_close((mean, std), (mean_c, std_c))
    # Equal scales: plain classifier-free guidance of the mean.
    mean, std = guided_gaussian(mean_c, std_c, mean_u, std_c, 3.0, rule)
    torch.testing.assert_close((mean, std), (mean_c + 3 * (mean_c - mean_u), std_c))
    # Huge weights, in half precision too: finite, and a scale above zero.
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        wide = [v.to(dtype) for v in (mean_c, std_c, mean_u, std_u)]
        mean, std = guided_gaussian(*wide, 1e3, rule)
        assert mean.isfinite().all()
        assert std.isfinite().all()
        assert (std > 0).all()
    # A tensor of weights is its numbers.
    weights = torch.linspace(0, 5, 50)
    mean, std = guided_gaussian(mean_c, std_c, mean_u, std_u, weights, rule)
    one = guided_gaussian(mean_c[7], std_c[7], mean_u[7], std_u[7], weights[7].item(), rule)
    torch.testing.assert_close((mean[7], std[7]), one)


def test_the_product_narrows_and_moves_monotonically_with_the_weight():
    mean_c, std_c, mean_u = torch.tensor(0.5), torch.tensor(0.8), torch.tensor(-1.0)
    for std_u in (0.5, 0.8, 0.8001, 1.0, 3.0):
        weights = torch.linspace(0, 50, 200)
        mean, std = guided_gaussian(mean_c, std_c, mean_u, torch.tensor(std_u), weights)
        assert (mean.diff() >= 0).all()
        assert (std.diff() <= 0).all()
        assert (std <= std_c).all()
    below, above = (guided_gaussian(mean_c, std_c, mean_u, std_c * (1 + e), 4.0) for e in (-1e-5, 1e-5))
    torch.testing.assert_close(below, above, rtol=0, atol=1e-3)  # continuous where the clip begins


def test_limits_of_the_guided_gaussian():
    values = [torch.randn(5, generator=generator(0, i)).abs() + 0.1 for i in range(4)]
    mean, std = guided_gaussian(*values, 0.0)
    assert torch.equal(mean, values[0])
    assert torch.equal(std, values[1])
    mean, std = guided_gaussian(values[0], values[1], values[2], torch.full((5,), 1e6), 3.0)
    torch.testing.assert_close(mean, values[0])
    torch.testing.assert_close(std, values[1] / math.sqrt(4))


def test_bad_weights_and_rules_are_refused():
    with pytest.raises(ValueError, match="weight must be a number in"):
        guided_gaussian(*torch.ones(4), -0.5)
    with pytest.raises(ValueError, match="rule must be one of product, log-scale, linear, got 'sum'"):
        guided_gaussian(*torch.ones(4), 0.5, "sum")
