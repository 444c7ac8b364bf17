"""Rows of the Frechet distance and of its extrapolation."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric

from flowbench.data import DataSpec
from flowbench.evaluation import FrechetDistance, FrechetInfinity, KernelDistance
from flowbench.evaluation.sampling import samples_of
from flowbench.metrics import FeatureStatistics, save_statistics

from .known import DIGITS, POINTS, compared, flat, known, sample_set


@pytest.mark.parametrize("spec", [POINTS, DIGITS], ids=["points", "images"])
def test_fd_is_that_of_torch_fidelity(spec):
    """Images are compared as 8-bit pictures, points as they are."""
    given = known(spec, num=200, num_real=150)
    (found,) = FrechetDistance("identity").measure(given)
    sides = [flat(part.shown, spec) for part in (samples_of(given), given.reference)]
    first, second = ({"mu": s.mean(0), "sigma": np.cov(s, rowvar=False)} for s in sides)
    expected = fid_statistics_to_metric(first, second, verbose=False)["frechet_inception_distance"]
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert (found.metric, found.n, found.protocol) == ("fd[identity]", 200, "identity/val-150/200")


def test_only_float32_inception_features_make_an_fid():
    for features, expected in (("inception", "fid"), ("inception-bf16", "fd[inception-bf16]"), ("x-cnn", "fd[x-cnn]")):
        assert FrechetDistance(features).label("fd") == expected
    assert KernelDistance("inception").label("kid") == "kid[inception]"


@pytest.mark.parametrize("options", [{"num_samples": 1}, {"num_reference": 0}])
def test_counts_out_of_range(options):
    with pytest.raises(ValueError, match=r"must be a whole number in \[2, .* or None, got [01]"):
        FrechetDistance("identity", **options)


def test_the_interval_of_the_distance_is_centred_and_shrinks_with_n():
    widths = []
    for num in (60, 600):
        low, value, high = (
            m.value
            for name in ("fd_low[identity]", "fd[identity]", "fd_high[identity]")
            for m in FrechetDistance("identity", interval=True).measure(known(num=num))
            if m.metric == name
        )
        assert low < value < high
        assert value == FrechetDistance("identity").measure(known(num=num))[0].value
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_moments_from_a_file_take_the_place_of_the_reference(tmp_path):
    given = known()
    real = given.reference.shown.double().numpy()
    np.savez(tmp_path / "others.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False))
    (own,) = FrechetDistance("identity").measure(given)
    metric = FrechetDistance("identity", statistics=str(tmp_path / "others.npz"))
    (found,) = metric.measure(given)
    assert found.value == pytest.approx(own.value, rel=1e-9)
    assert re.fullmatch(r"identity/statistics-[0-9a-f]{8}-foreign-unknown-N/60", found.protocol)
    assert metric.num_reference == 0
    with pytest.raises(ValueError, match=r"num_reference=5 has no say over the statistics in a.npz; remove it"):
        FrechetDistance("identity", num_reference=5, statistics="a.npz")


def test_statistics_of_other_weights_are_refused(tmp_path):
    given = known()
    statistics = FeatureStatistics.from_features(given.reference.shown)
    metadata = {"extractor": "identity", "checksum": "of other weights", "protocol": "identity"}
    save_statistics(tmp_path / "s.npz", statistics, metadata)
    metric = FrechetDistance("identity", statistics=str(tmp_path / "s.npz"))
    with pytest.raises(ValueError, match="checksum='of other weights', expected"):
        metric.measure(given)
    metric = FrechetDistance("identity", statistics=str(tmp_path / "s.npz"))
    metadata["checksum"] = given.extractors["identity"].checksum
    save_statistics(tmp_path / "s.npz", statistics, metadata)
    assert re.fullmatch(r"identity/statistics-[0-9a-f]{8}-90/60", metric.measure(given)[0].protocol)


def test_the_extrapolated_distance_of_equal_gaussians_is_nought_where_the_plain_one_is_biased():
    rng = torch.Generator().manual_seed(0)
    spec = DataSpec("points", "1", (20,))
    samples = sample_set(torch.randn(400, 20, generator=rng), spec, "generated")
    real = sample_set(torch.randn(20_000, 20, generator=rng), spec, "val")
    given = compared(samples, real)
    value, low, high = (m.value for m in FrechetInfinity("identity").measure(given))
    assert low < 0.05
    assert low < value < high
    assert abs(value) < FrechetDistance("identity").measure(given)[0].value / 3
    # Too few samples cost this row and no others.
    assert all(math.isnan(m.value) for m in FrechetInfinity("identity", num_samples=40).measure(given))
