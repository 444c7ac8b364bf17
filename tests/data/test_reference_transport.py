"""The table of reference W2^2 against closed forms, exact assignment between fresh samples, and its own versions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.spatial.distance
import scipy.stats
import torch

from flowbench.data import DENSITIES, get_density
from flowbench.data.reference_transport import REFERENCES, STANDARD_NORMAL, Reference, reference_transport
from flowbench.data.spec import DataSpec


def draw(name: str, num: int, seed: int) -> np.ndarray:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn((num, 2), generator=rng) if name == STANDARD_NORMAL else get_density(name).sample(num, rng)
    return x.double().numpy()


def known(source: str, target: str) -> Reference:
    found = reference_transport(source, get_density(target).spec)
    assert found is not None
    return found


def test_every_density_has_a_reference_from_standard_normal_noise():
    assert {target for source, _, target, _ in REFERENCES if source == STANDARD_NORMAL} == set(DENSITIES)
    for name in DENSITIES:
        assert known(STANDARD_NORMAL, name).w2_squared > 0


def test_the_pairs_of_the_study_have_references():
    for source, target in [("moons", "eight_gaussians"), ("gaussian_mixture", "five_gaussians")]:
        assert known(source, target).w2_squared > 0
        assert known(target, source) == known(source, target), "a distance has no direction"


def test_the_table_is_of_the_present_versions():
    """Whoever changes a density computes its distances anew."""
    for source, source_version, target, target_version in REFERENCES:
        assert source_version == ("1" if source == STANDARD_NORMAL else get_density(source).version)
        assert target_version == get_density(target).version


def test_errors_are_stated_and_small():
    for reference in REFERENCES.values():
        assert 0 <= reference.standard_error < 2e-3 * reference.w2_squared
        assert (reference.standard_error == 0) == ("closed form" in reference.method)


def test_two_gaussians_by_their_matrices():
    """Bures: |m|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2); with A = I the last is the sum of the roots of B's spectrum."""
    covariance = np.array([[1.5, 0.8], [0.8, 1.0]])
    roots = np.sqrt(np.linalg.eigvalsh(covariance)).sum()
    expected = 2**2 + 1**2 + 2 + np.trace(covariance) - 2 * roots
    assert known(STANDARD_NORMAL, "gaussian").w2_squared == pytest.approx(expected, abs=1e-8)


def test_the_ring_by_the_quantiles_of_its_radius():
    rice, rayleigh = scipy.stats.rice(4 / 0.3, scale=0.3), scipy.stats.rayleigh()
    expected, _ = scipy.integrate.quad(lambda u: (rice.ppf(u) - rayleigh.ppf(u)) ** 2, 0, 1, limit=300)
    assert known(STANDARD_NORMAL, "ring").w2_squared == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair, marks=[pytest.mark.slow] * (number % 3 > 0), id=f"{pair[0]}-{pair[2]}")
        for number, pair in enumerate(REFERENCES)
    ],
)
def test_the_table_agrees_with_fresh_samples(pair):
    """Six hundred points a side: the bias is some hundredths, and the spread is that of four draws."""
    values = []
    for seed in range(4):
        x, y = draw(pair[0], 600, 2 * seed), draw(pair[2], 600, 2 * seed + 1)
        cost = scipy.spatial.distance.cdist(x, y, "sqeuclidean")
        values.append(cost[scipy.optimize.linear_sum_assignment(cost)].mean())
    spread = np.std(values, ddof=1) / math.sqrt(len(values))
    assert np.mean(values) == pytest.approx(REFERENCES[pair].w2_squared, abs=5 * spread + 0.06)


def test_what_is_not_in_the_table_has_no_reference():
    assert reference_transport("checkerboard", get_density("moons").spec) is None
    assert reference_transport(STANDARD_NORMAL, DataSpec("moons", "2", (2,))) is None
    assert reference_transport(STANDARD_NORMAL, DataSpec("digits", "1", (1, 8, 8), 10, 17)) is None
    assert reference_transport("a source of the user's", get_density("moons").spec) is None
