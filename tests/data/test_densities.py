"""2-D densities against their definitions, SciPy, scikit-learn, quadrature and Monte Carlo."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from sklearn.datasets import make_moons, make_s_curve
from torch import Tensor

from flowbench.data import DENSITIES, Density2D, get_density
from flowbench.data.densities import Moons, SCurve, _Mixture

NAMES = list(DENSITIES)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cells(density: Density2D, num: int, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Edges of a num x num grid over the bounds, and the exact probability of each cell by Gauss-Legendre."""
    x0, x1, y0, y1 = density.bounds
    xs, ys = torch.linspace(x0, x1, num + 1).double(), torch.linspace(y0, y1, num + 1).double()
    u, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(nodes))
    width, height = (x1 - x0) / num, (y1 - y0) / num
    px = (xs[:-1, None] + width * (u + 1) / 2).flatten()
    py = (ys[:-1, None] + height * (u + 1) / 2).flatten()
    p = density.log_prob(torch.cartesian_prod(px, py)).exp().reshape(num, nodes, num, nodes)
    return xs, ys, torch.einsum("aibj,i,j->ab", p, w / 2, w / 2) * width * height


@pytest.mark.parametrize("name", NAMES)
def test_samples_follow_the_density(name: str) -> None:
    density = get_density(name)
    num = 200_000
    xs, ys, probability = cells(density, 24, 8)
    assert probability.sum() == pytest.approx(1.0, abs=1e-6)
    x = density.sample(num, rng()).double().numpy()
    count, _, _ = np.histogram2d(x[:, 0], x[:, 1], bins=[xs.numpy(), ys.numpy()])
    assert count.sum() == num
    expected = probability.numpy() * num
    full = expected >= 5
    rest = num - expected[full].sum()
    observed = np.append(count[full], num - count[full].sum())
    keep = np.append(expected[full], rest)
    if keep[-1] < 1e-3:
        assert observed[-1] == 0
        observed, keep = observed[:-1], keep[:-1]
    chi2 = float(((observed - keep) ** 2 / keep).sum())
    assert scipy.stats.chi2.sf(chi2, len(keep) - 1) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_entropy_is_the_mean_negative_log_prob(name: str) -> None:
    density = get_density(name)
    nll = -density.log_prob(density.sample(40_000, rng(1)))
    assert nll.dtype == torch.float64
    entropy = density.entropy()
    assert entropy is not None
    assert abs(nll.mean() - entropy) <= 4 * nll.std() / math.sqrt(len(nll)) + 1e-9


@pytest.mark.parametrize("name", ["gaussian", "eight_gaussians", "gaussian_mixture", "five_gaussians"])
def test_mixture_log_prob_is_scipys(name: str) -> None:
    density = get_density(name)
    assert isinstance(density, _Mixture)
    x = torch.randn((200, 2), generator=rng()) * 6
    parts = [
        np.log(w) + scipy.stats.multivariate_normal(m, [[a, b], [b, c]]).logpdf(x.double().numpy())
        for w, m, (a, b, c) in zip(density.weights, density.means, density.covariances, strict=True)
    ]
    oracle = scipy.special.logsumexp(np.stack(parts), axis=0)
    np.testing.assert_allclose(density.log_prob(x).numpy(), oracle, rtol=1e-12)


def test_gaussian_is_as_documented() -> None:
    density = get_density("gaussian")
    covariance = [[1.5, 0.8], [0.8, 1.0]]
    assert density.entropy() == pytest.approx(scipy.stats.multivariate_normal([2, -1], covariance).entropy())
    x = density.sample(200_000, rng()).double()
    assert torch.allclose(x.mean(0), torch.tensor([2.0, -1.0]).double(), atol=0.015)
    assert torch.allclose(x.T.cov(), torch.tensor(covariance).double(), atol=0.025)


def test_moons_curve_is_scikit_learns() -> None:
    oracle, label = make_moons(200, shuffle=False, noise=None)
    u = torch.linspace(0, 1, 100, dtype=torch.float64).repeat(2)
    points = Moons().curve(torch.from_numpy(label), u).numpy()
    np.testing.assert_allclose(points, 3 * (oracle - [0.5, 0.25]), atol=1e-12)


def test_s_curve_is_scikit_learns() -> None:
    oracle, t = make_s_curve(200, random_state=0)
    u = torch.from_numpy(np.abs(t) / (1.5 * math.pi))
    points = SCurve().curve(torch.from_numpy((t < 0).astype(np.int64)), u).numpy()
    np.testing.assert_allclose(points, 2 * oracle[:, [0, 2]], atol=1e-12)


@pytest.mark.parametrize("curve", [Moons, SCurve])
def test_curve_quadrature_has_converged(curve: type[Density2D]) -> None:
    fine = type("Fine", (curve,), {"num_nodes": 1024})()
    x = torch.rand((200, 2), generator=rng()).double() * 30 - 15
    torch.testing.assert_close(curve().log_prob(x), fine.log_prob(x), rtol=0, atol=1e-9)


def test_the_rings_radius_is_rice_distributed() -> None:
    density = get_density("ring")
    radius = scipy.stats.rice(4 / 0.3, scale=0.3)
    x = torch.tensor([[0.1, -0.2], [3.0, 2.0], [-4.0, 0.3], [0.0, -5.5]], dtype=torch.float64)
    r = x.norm(dim=1).numpy()
    np.testing.assert_allclose(density.log_prob(x).numpy(), radius.logpdf(r) - np.log(2 * np.pi * r), rtol=1e-9)
    # Far outside too, where the Bessel function overflows: the mode of the noise is on the circle's near side.
    far = float(density.log_prob(torch.tensor([[300.0, 0.0]]))[0])
    assert far == pytest.approx(-((300 - 4) ** 2) / 0.18, rel=1e-3)
    drawn = density.sample(20_000, rng())
    assert scipy.stats.kstest(drawn.norm(dim=1).numpy(), radius.cdf).pvalue > 1e-3
    angle = torch.atan2(drawn[:, 1], drawn[:, 0]).numpy() / (2 * math.pi) + 0.5
    assert scipy.stats.kstest(angle, "uniform").pvalue > 1e-3
    # Polar coordinates: entropy of the radius' density on the plane, by SciPy.
    entropy, _ = scipy.integrate.quad(
        lambda r: -radius.pdf(r) * (radius.logpdf(r) - math.log(2 * math.pi * r)), 1, 7, epsabs=1e-10
    )
    assert density.entropy() == pytest.approx(entropy, abs=1e-8)


def test_five_gaussians_stand_on_a_pentagon() -> None:
    x, label = get_density("five_gaussians").sample_labelled(20_000, rng())
    assert label is not None
    centre = torch.stack([x[label == k].mean(0) for k in range(5)]).double()
    assert torch.allclose(centre.norm(dim=1), torch.full((5,), 4.0).double(), atol=0.03)
    assert torch.allclose(centre[0], torch.tensor([0.0, 4.0]).double(), atol=0.03)
    side = (centre - centre.roll(1, 0)).norm(dim=1)
    assert torch.allclose(side, torch.full((5,), 8 * math.sin(math.pi / 5)).double(), atol=0.05)
    # Modes so far apart overlap little: ln 5 and the entropy of one.
    one = scipy.stats.norm(scale=0.4).entropy() * 2
    assert get_density("five_gaussians").entropy() == pytest.approx(math.log(5) + one, abs=1e-3)


def test_checkerboard_squares() -> None:
    x = torch.tensor([[-3.0, -3.0], [-1.0, -3.0], [1.0, 1.0], [3.0, 1.0], [-1.0, -1.0], [4.5, 4.5], [0.0, 0.0]])
    inside = [True, False, True, False, True, False, True]
    assert torch.isfinite(get_density("checkerboard").log_prob(x)).tolist() == inside
    assert torch.isfinite(get_density("checkerboard").log_prob(get_density("checkerboard").sample(50_000, rng()))).all()


def test_labels_name_the_component() -> None:
    x, label = get_density("eight_gaussians").sample_labelled(20_000, rng())
    assert label is not None
    angle = torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 4)
    assert ((angle.round().long() % 8) == label).float().mean() > 0.999
    _, label = get_density("gaussian_mixture").sample_labelled(50_000, rng())
    assert label is not None
    share = label.bincount(minlength=5) / 50_000
    assert torch.allclose(share, torch.tensor([0.30, 0.25, 0.20, 0.15, 0.10]), atol=0.01)
    x, label = get_density("moons").sample_labelled(5_000, rng())
    assert label is not None
    assert x[label == 0, 1].mean() > 1 > -1 > x[label == 1, 1].mean()


@pytest.mark.parametrize("name", NAMES)
def test_sampling_is_a_function_of_the_generator(name: str) -> None:
    density = get_density(name)
    x, label = density.sample_labelled(100, rng(3))
    assert x.dtype == torch.float32
    assert x.shape == (100, 2)
    assert torch.equal(x, density.sample(100, rng(3)))
    assert not torch.equal(x, density.sample(100, rng(4)))
    assert (label is None) == (density.num_classes is None)
    assert density.spec.shape == (2,)


def test_a_density_without_closed_form_says_so() -> None:
    class Blob(Density2D):
        name = "blob"
        bounds = (-1, 1, -1, 1)

        def sample_labelled(self, num, generator):
            return torch.rand((num, 2), generator=generator), None

    assert Blob().entropy() is None
    with pytest.raises(ValueError, match="blob: this density has no closed-form"):
        Blob().log_prob(torch.zeros(1, 2))


def test_unknown_density() -> None:
    with pytest.raises(ValueError, match="unknown name 'moon'"):
        get_density("moon")
