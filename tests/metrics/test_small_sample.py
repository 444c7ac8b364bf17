from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from flowbench.core.sample_size import sample_size_warning
from flowbench.core.seeds import generator
from flowbench.metrics import (
    FeatureStatistics,
    GaussianStatistics,
    frechet_distance,
    frechet_distance_of_features,
    frechet_infinity,
    frechet_interval,
    jackknife_interval,
)
from flowbench.metrics.small_sample import _Subsets


class Gaussians:
    """Generated features of a known Gaussian against a known reference with a falling spectrum."""

    def __init__(self, dim, power=1.0, shift=0.2):
        variances = torch.arange(1, dim + 1, dtype=torch.float64) ** -power
        self.deviation = variances.sqrt() * torch.linspace(0.8, 1.2, dim, dtype=torch.float64)
        self.shift = shift * variances.sqrt()
        self.reference = GaussianStatistics(torch.zeros(dim), variances.diag())
        self.truth = frechet_distance(GaussianStatistics(self.shift, self.deviation.square().diag()), self.reference)

    def draw(self, num, draws):
        z = torch.randn(num, len(self.deviation), generator=draws, dtype=torch.float64)
        return z * self.deviation + self.shift


@pytest.mark.parametrize(("num", "dim", "other"), [(30, 6, 50), (20, 40, 90), (60, 40, 25)])
def test_fast_subsets_equal_the_plain_distance(num, dim, other):
    """All routes: Gram matrix or scatter, reference of full or lower rank."""
    draws = generator(1, "routes")
    x = torch.randn(num, dim, generator=draws, dtype=torch.float64) + 3
    y = 1.3 * torch.randn(other, dim, generator=draws, dtype=torch.float64) + 4
    for reference in (y, FeatureStatistics.from_features(y)):
        subsets = _Subsets(x, reference)
        assert subsets.mean_distance(num, 1, draws) == pytest.approx(frechet_distance_of_features(x, y), rel=1e-6)
        order = torch.randperm(num, generator=generator(2, "groups"))
        expected = [
            frechet_distance_of_features(x[[i for i in range(num) if i not in drop]], y)
            for drop in (group.tolist() for group in order.tensor_split(5))
        ]
        assert subsets.without_groups(5, generator(2, "groups")) == pytest.approx(expected, rel=1e-6)
    plain = jackknife_interval(
        num, lambda keep: frechet_distance_of_features(x[keep], y), generator(3, "j"), 0.9, num_groups=5
    )
    assert frechet_interval(x, y, generator(3, "j"), 0.9, num_groups=5) == pytest.approx(plain, rel=1e-5)


def test_jackknife_of_the_mean_is_the_t_interval_of_group_means():
    x = torch.randn(100, generator=generator(0, "mean"), dtype=torch.float64)
    found = jackknife_interval(100, lambda keep: float(x[keep].mean()), generator(1, "g"), 0.9, num_groups=100)
    expected = scipy.stats.ttest_1samp(x.numpy(), 0).confidence_interval(0.9)
    assert found.value == pytest.approx(float(x.mean()))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert found.standard_error == pytest.approx(float(x.std()) / 10, rel=1e-9)


def coverage(dim, num, trials, level, power=1.0):
    """Share of trials in which the interval holds the mean distance of samples of this size."""
    world = Gaussians(dim, power)
    intervals = [
        frechet_interval(world.draw(num, generator(5, "x", i)), world.reference, generator(6, "j", i), level)
        for i in range(trials)
    ]
    # The target from draws of its own: its error is a tenth of an interval's.
    values = [
        frechet_distance_of_features(world.draw(num, generator(7, "t", i)), world.reference) for i in range(3 * trials)
    ]
    target = float(np.mean(values))
    return float(np.mean([low <= target <= high for _, low, high, _ in intervals])), intervals, np.std(values)


@pytest.mark.parametrize(("dim", "num"), [(8, 200), (60, 50)])
@pytest.mark.slow
def test_interval_covers_the_expected_distance(dim, num):
    covered, intervals, deviation = coverage(dim, num, trials=80, level=0.9)
    assert covered >= 0.82  # 80 trials at 0.9: standard deviation 0.034
    # And is not honest by being useless.
    assert np.mean([i.standard_error for i in intervals]) < 1.7 * deviation


@pytest.mark.slow
@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
@pytest.mark.parametrize(("dim", "num"), [(16, 320), (64, 100), (128, 64), (128, 300)])
def test_interval_covers_the_expected_distance_over_spectra(dim, num, power):
    for level in (0.9, 0.95):
        covered, _, _ = coverage(dim, num, trials=400, level=level, power=power)
        assert covered > level - 0.06


def test_infinity_removes_most_of_the_bias_and_knows_its_error():
    world = Gaussians(16, shift=0.0)
    num, trials = 160, 50
    results = [
        frechet_infinity(world.draw(num, generator(8, "x", i)), world.reference, generator(9, "s", i), num_sizes=8)
        for i in range(trials)
    ]
    values = np.array([r.value for r in results])
    at_num = np.mean([r.distances[-1] for r in results])
    error = values.std() / math.sqrt(trials)
    assert at_num - world.truth > 10 * error
    assert abs(values.mean() - world.truth) < 0.15 * (at_num - world.truth) + 3 * error
    standard_errors = np.array([r.standard_error for r in results])
    assert 0.7 < standard_errors.mean() / values.std() < 1.6
    assert np.mean(np.abs(values - world.truth) < 2 * standard_errors) > 0.8
    assert results[0].sizes[0] == 80
    assert results[0].sizes[-1] == num
    assert all(r.slope > 0 for r in results)


def test_infinity_repeats_and_is_exact_on_a_line():
    world = Gaussians(4)
    x = world.draw(60, generator(0, "x"))
    first, second = (frechet_infinity(x, world.reference, generator(1, "s")) for _ in range(2))
    assert first == second
    assert first.distances[-1] == pytest.approx(frechet_distance_of_features(x, world.reference), rel=1e-6)
    fit = scipy.stats.linregress([1 / n for n in first.sizes], first.distances)
    assert first.value == pytest.approx(fit.intercept, rel=1e-9)
    assert first.slope == pytest.approx(fit.slope, rel=1e-9)
    assert first.standard_error > fit.intercept_stderr


def test_warnings_name_the_claim():
    assert "covariance is singular" in sample_size_warning(2000, 2048)
    assert "not with published values" in sample_size_warning(5000, 2048)
    assert "not known" in sample_size_warning(None, 2048)
    assert sample_size_warning(50_000, 2048) is None
    assert all("\n" not in str(sample_size_warning(n, 64)) for n in (None, 10, 100))


def test_users_mistakes_cost_one_line():
    x, draws = torch.randn(40, 16, generator=generator(0, "x")), generator(0, "g")
    with pytest.raises(ValueError, match="needs at least 40 samples of 16 features, got 39"):
        frechet_infinity(x[:39], x, draws)
    with pytest.raises(ValueError, match=r"do not fit 40 samples .* 16 < min_size <= N - num_sizes"):
        frechet_infinity(x, x, draws, min_size=16)
    with pytest.raises(ValueError, match=r"level must be a number in \(0, 1\), got 95"):
        frechet_interval(x, x, draws, level=95)
    with pytest.raises(ValueError, match=r"num_groups must be a whole number in .*, got 25"):
        frechet_interval(x[:20], x, draws)
    with pytest.raises(ValueError, match="feature dimensions differ: 16 and 3"):
        frechet_interval(x, torch.rand(9, 3), draws, num_groups=5)
