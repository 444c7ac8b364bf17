"""FDr: 1 for held-out data, the ratio of closed forms for Gaussians, and an interval that covers."""

from __future__ import annotations

import math

import pytest
import torch

from flowbench.core.seeds import generator
from flowbench.metrics import frechet_ratio, frechet_ratio_interval


def normal(num, dim, *name):
    return torch.randn(num, dim, generator=generator(13, *name), dtype=torch.float64)


def test_is_one_for_the_held_out_samples_themselves():
    held_out, reference = normal(60, 4, "held-out"), normal(90, 4, "reference")
    assert frechet_ratio(held_out, held_out, reference) == 1.0
    found = frechet_ratio_interval(held_out, held_out, reference, generator(0, "groups"))
    assert found.low < found.value == 1.0 < found.high


def test_is_the_ratio_of_the_distances_of_gaussians():
    """Against N(0, 1): 0.4^2 for a shift of 0.4 over 0.1^2 for a shift of 0.1, where N leaves no bias to speak of."""
    grid = torch.linspace(-4, 4, 4001, dtype=torch.float64)[:, None]  # any spread: it is the same on all sides
    assert frechet_ratio(grid + 0.4, grid + 0.1, grid) == pytest.approx(16)


def test_the_interval_of_fresh_against_held_out_samples_covers_one_at_least_as_often_as_it_says():
    """40 draws: of a coverage of 95 %, fewer than 35 have a chance of 1 in 70."""
    covered = 0
    for draw in range(40):
        fresh, held_out, reference = (normal(100, 3, name, draw) for name in ("fresh", "held-out", "reference"))
        found = frechet_ratio_interval(fresh, held_out, reference, generator(draw, "groups"), num_groups=20)
        assert found.value == pytest.approx(frechet_ratio(fresh, held_out, reference))
        covered += found.low <= 1 <= found.high
    assert covered >= 35


def test_nothing_is_divided_by_a_floor_of_nought():
    points, nought = normal(30, 2, "x"), torch.zeros(30, 2)
    assert math.isnan(frechet_ratio(points, nought, nought))
    assert math.isnan(frechet_ratio_interval(points, nought, nought, generator(0, "groups")).high)
    assert frechet_ratio_interval(nought, points, nought, generator(0, "groups")) == (0.0, 0.0, 0.0, 0.0)


def test_unequal_numbers_are_refused():
    with pytest.raises(ValueError, match="30 samples and 20 held-out ones have distances of different bias"):
        frechet_ratio(normal(30, 2, "x"), normal(20, 2, "y"), normal(30, 2, "z"))
