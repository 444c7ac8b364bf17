"""Measures of modes against brute force, SciPy and POT."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import scipy.spatial
import scipy.stats
import torch

from flowbench.metrics.modes import (
    average_minimum_distance,
    failure_rate,
    mode_discrepancy,
    mode_matched_w2,
    nearest_mode,
)

MODES = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])


def cloud(counts: list[int], seed: int, spread: float = 0.3) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    centre = MODES.repeat_interleave(torch.tensor(counts), dim=0)
    return centre + spread * torch.randn(len(centre), 2, generator=rng)


def test_nearest_distances_are_scipys():
    generated, reference = cloud([40, 30, 30], 0, 1.0), cloud([50, 20, 60], 1)
    distance, _ = scipy.spatial.cKDTree(reference.double().numpy()).query(generated.double().numpy())
    assert average_minimum_distance(generated, reference) == pytest.approx(distance.mean(), rel=1e-12)
    for radius in (0.1, 0.4, 2.0):
        assert failure_rate(generated, reference, radius) == pytest.approx(100 * (distance > radius).mean())
    assert average_minimum_distance(reference, reference) == 0.0
    assert failure_rate(reference, reference, 1e-9) == 0.0


def test_failures_are_per_cent_of_points():
    reference = torch.zeros(3, 2)
    generated = torch.tensor([[0.0, 0.5], [0.0, 1.0], [0.0, 1.5], [3.0, 0.0]])
    assert failure_rate(generated, reference, 1.0) == 50.0


def test_points_belong_to_the_nearest_mode():
    x = cloud([5, 7, 9], 3, 2.0)
    brute = torch.cdist(x, MODES).argmin(1)
    assert torch.equal(nearest_mode(x, MODES), brute)


def test_mode_discrepancy_is_the_divergence_of_the_shares():
    reference, generated = cloud([50, 300, 650], 0, 0.1), cloud([100, 400, 500], 1, 0.1)
    oracle = scipy.stats.entropy([0.05, 0.3, 0.65], [0.1, 0.4, 0.5])
    assert mode_discrepancy(generated, reference, MODES) == pytest.approx(oracle)
    assert mode_discrepancy(reference, reference, MODES) == 0.0
    assert mode_discrepancy(cloud([0, 3, 3], 2, 0.1), reference, MODES) == math.inf
    assert mode_discrepancy(reference, cloud([0, 3, 3], 2, 0.1), MODES) < math.inf


def test_mode_matched_w2_is_the_mean_over_modes_when_they_are_far_apart():
    far = 50 * MODES
    centre = 49 * MODES
    generated, reference = cloud([10, 20, 30], 0), cloud([40, 40, 5], 1)
    generated = generated + centre.repeat_interleave(torch.tensor([10, 20, 30]), dim=0)
    reference = reference + centre.repeat_interleave(torch.tensor([40, 40, 5]), dim=0)
    total, start, other = 0.0, 0, 0
    for count, size in ((10, 40), (20, 40), (30, 5)):
        x, y = generated[start : start + count].double().numpy(), reference[other : other + size].double().numpy()
        total += count / 60 * ot.emd2([], [], ot.dist(x, y))
        start, other = start + count, other + size
    assert mode_matched_w2(generated, reference, far) == pytest.approx(np.sqrt(total), rel=1e-8)
    # The plain distance pays for every point in a mode of another share.
    plain = ot.emd2([], [], ot.dist(generated.double().numpy(), reference.double().numpy()))
    assert math.sqrt(plain) > 50 * mode_matched_w2(generated, reference, far)
    assert mode_matched_w2(reference, reference, far) == pytest.approx(0.0, abs=1e-6)


def test_mistakes_are_one_line():
    x = cloud([3, 3, 3], 0)
    with pytest.raises(ValueError, match=r"radius must be a number in .*, got"):
        failure_rate(x, x, 0.0)
    with pytest.raises(ValueError, match=r"modes \[2\] were generated but hold no reference point"):
        mode_matched_w2(x, x[:6], MODES)
    broken = x.clone()
    broken[0, 0] = math.nan
    for call in (
        lambda: average_minimum_distance(broken, x),
        lambda: mode_discrepancy(broken, x, MODES),
        lambda: mode_matched_w2(x, broken, MODES),
    ):
        with pytest.raises(ValueError, match="rows with NaN or infinity"):
            call()
