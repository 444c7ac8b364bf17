"""Isotropic sources against SciPy's chi distribution."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from flowbench.core.seeds import generator
from flowbench.flows import GaussianSource
from flowbench.flows.source.radial import NormAlignedSource, RadialSource, draw_chi, log_chi, mean_chi
from tests.numerical.sources import data


@pytest.mark.parametrize("dof", [0.5, 1, 2, 3.7, 64, 3072])
def test_chi_is_scipys(dof: float):
    radius = draw_chi(4000, dof, generator(0, "chi"))
    assert radius.dtype == torch.float64
    assert scipy.stats.kstest(radius.numpy(), scipy.stats.chi(dof).cdf).pvalue > 1e-3
    assert mean_chi(dof) == pytest.approx(scipy.stats.chi(dof).mean(), rel=1e-9)
    np.testing.assert_allclose(log_chi(radius[:50], dof), scipy.stats.chi(dof).logpdf(radius[:50].numpy()), rtol=1e-6)


def test_norms_are_aligned_with_the_data():
    x = data(2000, (1, 4, 5))
    for ratio in (0.5, 1.0, 2.0):
        source = NormAlignedSource(ratio)
        source.fit(x, generator(0, "fit"))
        noise = source.sample(20_000, (1, 4, 5), generator(0, "x"))
        wanted = ratio * float(x.flatten(1).norm(dim=1).mean())
        assert float(noise.flatten(1).norm(dim=1).mean()) == pytest.approx(wanted, rel=0.01)
        torch.testing.assert_close(source.log_prob(x), GaussianSource(source.std).log_prob(x))


def test_a_gaussian_is_a_chi_sphere():
    source = RadialSource("chi")
    x = source.sample(20_000, (3, 2, 2), generator(0, "x")).flatten(1)
    assert scipy.stats.kstest(x.square().sum(1).numpy(), scipy.stats.chi2(12).cdf).pvalue > 1e-3
    for column in x.T:
        assert scipy.stats.kstest(column.numpy(), scipy.stats.norm.cdf).pvalue > 1e-4
    direction = x / x.norm(dim=1, keepdim=True)
    assert direction.mean(0).abs().max() < 5 / (20_000 * 12) ** 0.5
    torch.testing.assert_close(source.log_prob(x[:20]), GaussianSource().log_prob(x[:20]))
    assert not source.needs_fit


def test_the_radius_of_a_large_gaussian_in_the_plane():
    x = RadialSource("chi", dof=3072, scale=1 / 30).sample(8000, (2,), generator(1, "x"))
    radius = 30 * x.double().norm(dim=1)
    assert scipy.stats.kstest(radius.numpy(), scipy.stats.chi(3072).cdf).pvalue > 1e-3
    angle = torch.atan2(x[:, 1], x[:, 0])
    assert scipy.stats.kstest(angle.numpy(), scipy.stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3


def test_radii_of_the_data():
    x = data(3000)
    source = RadialSource("data")
    source.fit(x, generator(0, "fit"))
    drawn = source.sample(3000, (2,), generator(1, "x"))
    assert scipy.stats.ks_2samp(drawn.norm(dim=1).numpy(), x.norm(dim=1).numpy()).pvalue > 1e-3
    assert source.log_prob(torch.tensor([[0.0, 100.0]])).item() == -np.inf


def test_mistakes_are_one_line():
    ring = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    with pytest.raises(ValueError, match="all 3 data points have norm 1"):
        RadialSource("data").fit(ring, generator(0, "fit"))
    for arguments, match in (
        ({"radius": "ring"}, "radius must be"),
        ({"radius": "data", "dof": 3.0}, "leave out dof=3"),
        ({"dof": 0.0}, "dof must be a number in"),
        ({"scale": float("nan")}, "scale must be a number in"),
    ):
        with pytest.raises(ValueError, match=match):
            RadialSource(**arguments)
    with pytest.raises(ValueError, match="ratio must be a number in"):
        NormAlignedSource(0.0)
