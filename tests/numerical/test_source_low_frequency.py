"""Low frequencies: the projection against SciPy's transform, the pairs against an assignment, the law of the draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch
from scipy.optimize import linear_sum_assignment

from flowbench.core.seeds import generator
from flowbench.flows import GaussianMixtureSource, GaussianSource, LowFrequencySource, VonMisesFisherSource
from flowbench.flows.source.low_frequency import low_pass_basis

IMAGE = (2, 6, 4)


def images(num: int = 60, seed: int = 0) -> torch.Tensor:
    return 0.7 + torch.randn(num, *IMAGE, generator=generator(seed, "images"), dtype=torch.float64)


def source(cutoff: int = 2, noise: float = 0.5, components: int = 1, **options) -> LowFrequencySource:
    return LowFrequencySource(cutoff, noise=noise, prior=GaussianMixtureSource(components), **options)


def test_coordinates_are_the_lowest_of_the_cosine_transform():
    x = images()
    whole = scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho")
    np.testing.assert_allclose(source().coordinates(x).numpy(), whole[:, :, :2, :2], atol=1e-12)
    whole[:, :, 2:, :], whole[:, :, :, 2:] = 0, 0
    np.testing.assert_allclose(
        source().projected(x).numpy(), scipy.fft.idctn(whole, axes=(2, 3), norm="ortho"), atol=1e-12
    )
    vectors = x.flatten(1)[:, :7]
    expected = scipy.fft.dct(vectors.numpy(), norm="ortho")[:, :3]
    np.testing.assert_allclose(source(3).coordinates(vectors).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("cutoff", [1, 2, 4])
def test_it_is_an_orthogonal_projection(cutoff):
    p, x, y = source(cutoff).projected, images(), images(seed=1)
    torch.testing.assert_close(p(p(x)), p(x))  # idempotent
    torch.testing.assert_close((p(x) * y).sum(), (x * p(y)).sum())  # and its own adjoint
    rank = torch.linalg.matrix_rank(p(torch.eye(48, dtype=torch.float64).reshape(48, *IMAGE)).flatten(1))
    assert int(rank) == 2 * min(cutoff, 6) * min(cutoff, 4)
    basis = low_pass_basis(6, cutoff, torch.device("cpu"), torch.float64)
    torch.testing.assert_close(basis.T @ basis, torch.eye(cutoff, dtype=torch.float64))


def test_each_point_and_its_own_low_frequencies_are_an_optimal_assignment():
    """The subgradients of a convex function are cyclically monotone; with independent noise they need not be."""
    x = images(80)
    low = source().projected(x)
    cost = torch.cdist(low.flatten(1), x.flatten(1)).square().numpy()
    rows, columns = linear_sum_assignment(cost)
    assert np.trace(cost) == pytest.approx(cost[rows, columns].sum(), rel=1e-12)
    noisy = low + 2.0 * torch.randn(x.shape, generator=generator(3, "e"), dtype=torch.float64)
    cost = torch.cdist(noisy.flatten(1), x.flatten(1)).square().numpy()
    assert np.trace(cost) > 1.001 * cost[linear_sum_assignment(cost)].sum()


def test_training_pairs_are_the_points_own_low_frequencies_under_noise():
    x, low = images(4000), source(scale=0.6, noise=0.3)
    low.fit(x, generator(0))
    rest = (low.sample_for(x, generator(1)) - 0.6 * low.projected(x)) / 0.3
    assert scipy.stats.kstest(rest.flatten().numpy()[:20_000], "norm").pvalue > 1e-3
    assert low.is_paired
    assert not low.is_isotropic


def test_samples_have_the_low_frequencies_of_training_and_noise_elsewhere():
    """One Gaussian is what the amplitudes of Gaussian images are: moments of the draws against those of training."""
    x = images(3000).float()
    low = source(components=1)
    low.fit(x, generator(0))
    drawn, own = low.sample(20_000, IMAGE, generator(2)), low.sample_for(x, generator(3))
    a, b = low.coordinates(drawn).flatten(1).double(), low.coordinates(own).flatten(1).double()
    np.testing.assert_allclose(a.mean(0), b.mean(0), atol=5 * math.sqrt(1.3 / 3000))
    np.testing.assert_allclose(a.T.cov(), b.T.cov(), atol=5 * 1.3 * math.sqrt(2 / 3000))
    rest = (drawn - low.projected(drawn)).double()
    whole = scipy.fft.dctn(rest.numpy(), axes=(2, 3), norm="ortho")
    assert abs(whole[:, :, :2, :2]).max() < 1e-5
    assert scipy.stats.kstest(whole[:, :, 2:, :].ravel()[:20_000] / 0.5, "norm").pvalue > 1e-3


def test_with_a_gaussian_prior_the_density_is_a_gaussians():
    x = images(500)
    low = source(components=1)
    low.fit(x, generator(0))
    values = low.prior._values
    covariance = values["factor"][0].double() @ values["factor"][0].double().T
    lift = low.lifted(torch.eye(8, dtype=torch.float64).reshape(8, 2, 2, 2), IMAGE).flatten(1)
    whole = lift.T @ covariance @ lift + 0.25 * (torch.eye(48, dtype=torch.float64) - lift.T @ lift)
    mean = values["mean"][0].double() @ lift
    law = torch.distributions.MultivariateNormal(mean, whole)
    torch.testing.assert_close(low.log_prob(x[:5]), law.log_prob(x[:5].flatten(1)), rtol=1e-5, atol=1e-4)


def test_the_priors_fit_is_counted():
    low = source(components=3)
    assert low.fit_flops == 0
    low.fit(images(400), generator(0))
    steps = low.fit_flops / (4 * 3 * 400 * 8**2)  # 8 amplitudes
    assert steps == int(steps) >= 1
    assert low.fit_seconds > 0


def test_mistakes_are_one_line():
    with pytest.raises(ValueError, match="axis of length 4 has no 5 frequencies"):
        source(5).fit(images(), generator(0))
    with pytest.raises(ValueError, match="draws low frequencies without a data point"):
        LowFrequencySource(1, prior=VonMisesFisherSource(1.0))
    with pytest.raises(ValueError, match="noise must be a number"):
        LowFrequencySource(1, noise=0.0)


def test_a_prior_that_needs_no_fit_is_drawn_as_it_is():
    low = LowFrequencySource(1, noise=0.5, prior=GaussianSource(3.0))
    assert low.needs_fit, "the shape is not known yet"
    low.fit(images(), generator(0))
    drawn = low.coordinates(low.sample(20_000, IMAGE, generator(1))).flatten()
    assert float(drawn.std()) == pytest.approx(3.0, rel=0.02)
