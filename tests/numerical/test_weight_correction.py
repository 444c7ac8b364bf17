"""Corrected weights against closed forms, integrals by SciPy, enumeration and Sinkhorn plans."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from torch import Tensor

from flowbench.core.seeds import generator
from flowbench.flows import GibbsWeight, transport_decomposition
from flowbench.flows.coupling.entropic import sinkhorn_plan
from flowbench.flows.weight.marginal import KernelMean
from flowbench.flows.weight.quadrature import EmpiricalRadii, GaussianRadii, radial_log_mean

pytestmark = pytest.mark.filterwarnings("ignore:the Gibbs weight keeps")
kinds = pytest.mark.parametrize("cost", ["norm", "squared"])
corrections = pytest.mark.parametrize("correction", ["target", "source", "mixed", "tilt-only"])


def rng(name: str = "fit"):
    return generator(0, name)


def gaussians(num: int, dim: int = 2, name: str = "points"):
    noise = rng(name)
    return torch.randn(num, dim, generator=noise), 0.7 + 1.5 * torch.randn(num, dim, generator=noise)


def by_integration(radius: float, dim: int, epsilon: float) -> float:
    """E exp(-|X - y| / epsilon), X ~ N(0, I), as an integral over the distance to y and the angle there."""
    if dim == 1:
        density = lambda x: math.exp(-x * x / 2 - abs(x - radius) / epsilon) / math.sqrt(2 * math.pi)  # noqa: E731
        return sum(integrate.quad(density, *ends)[0] for ends in ((-12, radius), (radius, radius + 12)))
    surface = 2 if dim == 2 else 2 * math.pi

    def integrand(angle: float, distance: float) -> float:
        squared = radius**2 + distance**2 + 2 * radius * distance * math.cos(angle)
        volume = surface * distance ** (dim - 1) * math.sin(angle) ** (dim - 2)
        return volume * math.exp(-distance / epsilon - squared / 2) / (2 * math.pi) ** (dim / 2)

    return integrate.dblquad(integrand, 0, min(40 * epsilon, 12 + radius), 0, math.pi, epsabs=1e-13, epsrel=1e-7)[0]


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("epsilon", [0.3, 2.0])
def test_the_gaussian_mean_equals_an_integral(dim, epsilon):
    radius = torch.tensor([0.0, 0.5, 3.0, 6.0])
    found = radial_log_mean(radius, dim, epsilon, "norm", GaussianRadii(1.0))
    expected = [math.log(by_integration(r, dim, epsilon)) for r in radius.tolist()]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 2, 5, 64, 3072])
@pytest.mark.parametrize("kappa", [0.1, 0.5])
def test_the_gaussian_mean_equals_brute_force_and_its_scaling_law(dim, kappa):
    source = 1.3 * torch.randn(4000 if dim < 1000 else 1000, dim, generator=rng(), dtype=torch.float64)
    y = torch.randn(6, dim, generator=rng("y"), dtype=torch.float64) * torch.linspace(0.1, 1.5, 6)[:, None]
    epsilon = kappa * math.sqrt(dim)
    log_kernel = -torch.cdist(source, y) / epsilon
    brute = torch.logsumexp(log_kernel, 0) - math.log(len(source))
    error = (2 * log_kernel - 2 * brute).exp().mean(0).sub(1).div(len(source)).sqrt()
    found = radial_log_mean(y.norm(dim=1), dim, epsilon, "norm", GaussianRadii(1.3))
    assert ((found - brute).abs() < 4 * error + 1e-3).all()
    scaled = radial_log_mean(2 * y.norm(dim=1), dim, 2 * epsilon, "norm", GaussianRadii(2.6))
    torch.testing.assert_close(scaled, found, rtol=0, atol=1e-6)


@given(dim=st.sampled_from([1, 2, 3, 64, 3072]), std=st.floats(0.3, 3), kappa=st.floats(0.3, 5), far=st.floats(0, 2))
@settings(max_examples=30, deadline=None)
def test_squares_follow_the_gaussian_closed_form_and_the_quadrature_over_given_radii(dim, std, kappa, far):
    """A single radius r: E over directions of exp(-(r^2 + R^2 - 2 r R u) / eps), by the confluent series 0F1."""
    epsilon, radius = kappa * math.sqrt(dim) * std**2, torch.tensor([far * std * math.sqrt(dim)], dtype=torch.float64)
    scale = epsilon + 2 * std**2
    closed = dim / 2 * math.log(epsilon / scale) - radius.item() ** 2 / scale
    assert radial_log_mean(radius, dim, epsilon, "squared", GaussianRadii(std)).item() == pytest.approx(closed)
    r = std * math.sqrt(dim)
    half = (r * radius.item() / epsilon) ** 2
    terms = np.arange(1, 4000)
    # log of the terms of 0F1(d / 2, half): half^n / (n! (d / 2)_n)
    steps = np.log(max(half, 1e-300)) - np.log(terms) - np.log(dim / 2 + terms - 1)
    series = np.logaddexp.reduce(np.concatenate([[0.0], np.cumsum(steps)]))
    expected = -(r**2 + radius.item() ** 2) / epsilon + series
    one = EmpiricalRadii(torch.tensor([r], dtype=torch.float64))
    assert radial_log_mean(radius, dim, epsilon, "squared", one).item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@kinds
@pytest.mark.parametrize("dim", [2, 50])
def test_radii_of_a_sample_stand_in_for_their_law(cost, dim):
    source = torch.randn(4000, dim, generator=rng())
    epsilon = (1.0 if cost == "norm" else 4.0) * math.sqrt(dim)
    radius = torch.linspace(0, 1.5 * math.sqrt(dim), 7)
    exact = radial_log_mean(radius, dim, epsilon, cost, GaussianRadii(1.0))
    found = radial_log_mean(radius, dim, epsilon, cost, EmpiricalRadii(source.norm(dim=1)))
    torch.testing.assert_close(found, exact, rtol=0, atol=0.02)


@kinds
def test_the_table_equals_brute_force_for_a_rotation_invariant_source(cost):
    """Any law of the norms: here uniform on a shell."""
    noise = rng("shell")
    direction = torch.randn(20_000, 3, generator=noise)
    source = direction / direction.norm(dim=1, keepdim=True) * (1 + torch.rand(20_000, 1, generator=noise))
    y = 2 * torch.randn(50, 3, generator=noise)
    mean = KernelMean()
    mean.tabulate(y.norm(dim=1), 3, 1.5, cost, EmpiricalRadii(source.norm(dim=1)))
    distance = torch.cdist(source.double(), y.double())
    brute = torch.exp(-(distance if cost == "norm" else distance**2) / 1.5).mean(0)
    # The tail of the square is rarer than the sample can tell.
    near = y.norm(dim=1) < 4
    torch.testing.assert_close(mean(y, 1.5, cost).exp()[near].double(), brute[near], rtol=0.05, atol=0)
    stored = KernelMean()
    stored.store(source, 20_000, noise)
    torch.testing.assert_close(stored(y, 1.5, cost).exp().double(), brute, rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 16])
def test_a_kernel_that_falls_between_the_strata_of_the_norms_is_refused(dim):
    """Where it is not refused the table is that of the Gaussian whose norms they are."""
    norms = torch.randn(8192, dim, generator=rng("norms"), dtype=torch.float64).norm(dim=1)
    exact, table = KernelMean(), KernelMean()
    refused = []
    for epsilon in (0.01, 0.05, 0.1, 0.3, 1.0, 3.0):
        try:
            table.tabulate(norms, dim, epsilon, "norm", EmpiricalRadii(norms))
        except ValueError as error:
            refused.append((epsilon, str(error)))
            continue
        exact.tabulate(norms, dim, epsilon, "norm", GaussianRadii(1.0))
        often = slice(round(float(norms.quantile(0.01)) / exact.step), round(float(norms.quantile(0.99)) / exact.step))
        torch.testing.assert_close(table.table[often], exact.table[often], atol=0.1, rtol=0)
    assert [epsilon for epsilon, _ in refused] == [0.01, 0.05, 0.1]
    assert all("has not converged at epsilon" in message and "\n" not in message for _, message in refused)


def test_a_table_goes_on_beyond_its_end_and_stays_nan_at_nan():
    mean = KernelMean()
    mean.tabulate(torch.tensor([4.0]), 2, 1.0, "norm", GaussianRadii(1.0))
    far = torch.tensor([[40.0, 0.0]])
    expected = radial_log_mean(torch.tensor([40.0]), 2, 1.0, "norm", GaussianRadii(1.0))
    torch.testing.assert_close(mean(far, 1.0, "norm").double(), expected, rtol=0.02, atol=0)
    assert mean(far * math.nan, 1.0, "norm").isnan().all()
    centre = KernelMean()
    centre.tabulate(torch.zeros(3), 2, 1.0, "norm", GaussianRadii(1.0))
    assert centre(torch.zeros(1, 2), 1.0, "norm").isfinite().all()


# ---- corrected weights --------------------------------------------------------------------------------------


def kernel(x0: Tensor, x1: Tensor, epsilon: float, cost: str) -> np.ndarray:
    distance = np.sqrt(((x0.double().numpy()[:, None] - x1.double().numpy()) ** 2).sum(-1))
    return np.exp(-(distance if cost == "norm" else distance**2) / epsilon)


@kinds
@corrections
def test_weights_are_the_kernel_and_its_marginals(cost, correction):
    """Reference points = the batch's points: all means can be enumerated."""
    x0, x1 = gaussians(30)
    k = kernel(x0, x1, 2.0, cost)
    f, g, pairs = k.mean(1), k.mean(0), np.diag(k)
    expected = {"target": pairs / g, "source": pairs / f, "mixed": pairs / (f * g), "tilt-only": f * g}[correction]
    weight = GibbsWeight(epsilon=2.0, cost=cost, correction=correction, normalization="raw")
    assert weight.needs_fit
    weight.fit(x0, x1, rng(), isotropic=False)
    result = weight(x0, x1)
    np.testing.assert_allclose(result.weight.numpy(), expected, rtol=1e-4)
    all_pairs = {"target": k / g, "source": k / f[:, None], "mixed": k / np.outer(f, g), "tilt-only": np.outer(f, g)}
    w = all_pairs[correction]
    found = result.diagnostics()
    for name, mean in (("tilt_source", w.mean(1)), ("tilt_target", w.mean(0))):
        assert found[name].item() == pytest.approx(mean.var() / mean.mean() ** 2, rel=1e-3, abs=1e-6)
    if correction == "target":
        assert found["tilt_target"] < 1e-6 < found["tilt_source"]
    if correction == "source":
        assert found["tilt_source"] < 1e-6 < found["tilt_target"]


@kinds
@pytest.mark.parametrize("isotropic", [True, False])
def test_a_corrected_target_keeps_the_moments_of_the_data(cost, isotropic):
    """Independent fresh pairs: the re-weighted data have the data's mean and variance; plain weights do not."""
    source, data = gaussians(1000)
    num, tolerance = (100_000, 0.03) if isotropic else (20_000, 0.08)
    x0, x1 = gaussians(num, name="fresh")
    options = {"epsilon": 2.0 if cost == "norm" else 6.0, "cost": cost}
    corrected = GibbsWeight(correction="target", num_reference=1000, **options)
    corrected.fit(source, data, rng(), isotropic, source_std=1.0 if isotropic else None)

    def moments(weight):
        w = weight(x0, x1).weight[:, None]
        mean = (w * x1).sum(0) / w.sum()
        return mean, (w * (x1 - mean) ** 2).sum(0) / w.sum()

    mean, variance = moments(corrected)
    torch.testing.assert_close(mean, torch.full((2,), 0.7), rtol=0, atol=tolerance)
    torch.testing.assert_close(variance, torch.full((2,), 1.5**2), rtol=tolerance, atol=0)
    mean, variance = moments(GibbsWeight(**options))
    assert (mean < 0.55).all()
    assert (variance < 0.85 * 1.5**2).all()


def test_a_corrected_source_keeps_the_moments_of_the_noise():
    source, data = gaussians(1000)
    x0, x1 = gaussians(20_000, name="fresh")
    weight = GibbsWeight(epsilon=1.0, correction="source", num_reference=1000)
    weight.fit(source, data, rng(), isotropic=True)
    for corrected in (True, False):
        w = (weight if corrected else GibbsWeight(epsilon=1.0))(x0, x1).weight[:, None]
        mean, square = (w * x0).sum(0) / w.sum(), (w * x0**2).sum(0) / w.sum()
        kept = torch.allclose(mean, torch.zeros(2), atol=0.08) and torch.allclose(square, torch.ones(2), atol=0.1)
        assert kept == corrected


def test_plain_weights_keep_a_centred_ring_and_corrected_ones_keep_a_shifted_one():
    noise = rng("ring")
    x0 = torch.randn(100_000, 2, generator=noise)
    angle = 2 * math.pi * torch.rand(100_000, generator=noise)
    ring = 5 * torch.stack([angle.cos(), angle.sin()], 1)
    assert transport_decomposition(GibbsWeight(epsilon=2.0), x0[:2000], ring[:300]).tilt_target < 0.03
    for shift, correction in ((0.0, "none"), (2.5, "target")):
        weight = GibbsWeight(epsilon=2.0, correction=correction)
        weight.fit(x0[:4096], ring[:4096] + shift, rng(), isotropic=True, source_std=1.0)
        w = weight(x0, ring + shift).weight[:, None]
        # First two circular moments of the weighted angles: zero for a uniform law.
        for order in (1, 2):
            moment = (w[:, 0] * torch.exp(1j * order * angle)).sum() / w.sum()
            assert moment.abs() < 0.03


def test_the_control_has_the_marginals_of_the_weight_and_no_coupling():
    x, y = gaussians(20_000)
    weight = GibbsWeight(epsilon=4.0, cost="squared", correction="tilt-only", num_reference=1000)
    weight.fit(*gaussians(4000, name="fit"), rng(), isotropic=True, source_std=1.0)
    w = weight(x, y).weight[:, None]
    plain = GibbsWeight(epsilon=4.0, cost="squared")(x, y).weight[:, None]

    def moments(w):
        mean_x, mean_y = (w * x).sum(0) / w.sum(), (w * y).sum(0) / w.sum()
        covariance = (w * (x - mean_x) * (y - mean_y)).sum(0) / w.sum()
        return torch.stack([mean_x, mean_y]), covariance

    torch.testing.assert_close(moments(w)[0], moments(plain)[0], rtol=0, atol=0.08)
    assert (moments(w)[1].abs() < 0.05).all()
    assert (moments(plain)[1] > 0.3).all()


@kinds
def test_scaling_by_the_corrections_in_turn_is_the_entropic_plan(cost):
    """The mixed correction divides by both marginals at once; taken in turn and repeated this is Sinkhorn's plan."""
    x0, x1 = gaussians(12)
    k = kernel(x0, x1, 2.0, cost)
    plan = sinkhorn_plan(torch.from_numpy(-2.0 * np.log(k)), 2.0, tolerance=1e-10).numpy()

    def corrected(correction):
        weight = GibbsWeight(epsilon=2.0, cost=cost, correction=correction, normalization="raw")
        weight.fit(x0, x1, rng(), isotropic=False)
        left, right = x0.repeat_interleave(12, 0), x1.repeat(12, 1)
        return weight(left, right).weight.double().view(12, 12).numpy()

    def sinkhorn(w):
        for _ in range(300):
            w = w / w.mean(0)
            w = w / w.mean(1, keepdims=True)
        return w / w.size

    def uneven(w):
        return np.abs(w.mean(1) / w.mean() - 1).max() + np.abs(w.mean(0) / w.mean() - 1).max()

    for correction in ("source", "target", "mixed"):
        np.testing.assert_allclose(sinkhorn(corrected(correction)), plan, rtol=1e-4)
    with_both = corrected("mixed")
    assert uneven(with_both) < uneven(k)
    assert uneven(with_both) > 1e-3, "exact for neither marginal"
    assert not np.allclose(sinkhorn(corrected("tilt-only")), plan, rtol=0.1)


# ---- fits and checkpoints -----------------------------------------------------------------------------------


@corrections
@pytest.mark.parametrize("isotropic", [True, False])
def test_fitted_weights_load_into_fresh_ones(correction, isotropic):
    source, data = (x.reshape(-1, 1, 2, 1) for x in gaussians(300))
    options = {"epsilon": "elbow", "correction": correction, "num_reference": 200}
    weight, fresh = GibbsWeight(**options), GibbsWeight(**options)
    with pytest.raises(ValueError, match="chosen on data: call fit"):
        weight(source, data)
    weight.fit(source, data, rng(), isotropic)
    weight(source, data)
    file = io.BytesIO()
    torch.save(weight.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):
        assert torch.equal(fresh(source, data).weight, weight(source, data).weight)
    # Moved as modules are: to float64 here, to a device elsewhere.
    torch.testing.assert_close(
        fresh.double()(source.double(), data.double()).weight.float(), weight(source, data).weight, rtol=1e-3, atol=1e-5
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@corrections
@pytest.mark.parametrize("isotropic", [True, False])
def test_weights_on_the_gpu_are_those_on_the_cpu(correction, isotropic):
    """Fitted on either side, and loaded from a checkpoint that was read to the CPU."""
    x0, x1 = gaussians(300, 20)
    on_cpu, on_gpu, loaded = (GibbsWeight(epsilon="elbow", correction=correction) for _ in range(3))
    on_cpu.fit(x0, x1, rng(), isotropic)
    on_gpu.cuda().fit(x0.cuda(), x1.cuda(), rng(), isotropic)
    loaded.cuda().load_state_dict(on_cpu.state_dict())
    expected = on_cpu(x0, x1).weight
    for weight in (on_gpu, loaded):
        result = weight(x0.cuda(), x1.cuda())
        torch.testing.assert_close(result.weight.cpu(), expected, rtol=1e-3, atol=1e-5)
        assert all(value.isfinite() for value in result.diagnostics().values())


def test_a_checkpoint_of_another_weight_is_refused():
    plain, corrected = GibbsWeight(0.5), GibbsWeight(0.5, correction="target")
    corrected.fit(*gaussians(50), rng(), True)
    with pytest.raises(RuntimeError, match="Missing key"):
        corrected.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        plain.load_state_dict(corrected.state_dict())
    other = GibbsWeight(0.7, correction="target")
    other.load_state_dict(corrected.state_dict())
    with pytest.raises(ValueError, match=r"fitted at epsilon = 0.707107 but now has 0.989949: fit it again"):
        other(*gaussians(5))


def test_a_fit_is_a_pure_function_of_points_and_generator():
    weights = [GibbsWeight(0.5, correction="mixed", num_reference=20) for _ in range(2)]
    for weight in weights:
        weight.fit(*gaussians(100), rng(), False)
    assert len(weights[0].source_mean.reference) == len(weights[0].target_mean.reference) == 20
    assert torch.equal(*(weight(*gaussians(10)).weight for weight in weights))


@pytest.mark.parametrize(
    ("source", "data", "message"),
    [
        (torch.zeros(5, 2), torch.zeros(5, 3), "points of one shape"),
        (torch.zeros(0, 2), torch.zeros(5, 2), "non-empty"),
        (torch.zeros(5, 2), torch.full((5, 2), math.nan), "not finite"),
    ],
)
def test_bad_samples_are_refused(source, data, message):
    with pytest.raises(ValueError, match=message):
        GibbsWeight(0.5, correction="mixed").fit(source, data, rng(), True)


def test_one_point_and_equal_points_can_be_fitted():
    for num in (1, 4):
        weight = GibbsWeight(0.5, correction="mixed")
        weight.fit(torch.zeros(num, 2), torch.zeros(num, 2), rng(), True)
        torch.testing.assert_close(weight(torch.zeros(3, 2), torch.zeros(3, 2)).weight, torch.ones(3))


def test_autocast_does_not_touch_the_means():
    x0, x1 = gaussians(40, 32)
    weight = GibbsWeight(0.5, correction="mixed", normalization="batch")
    weight.fit(x0, x1, rng(), False)
    expected = weight(x0, x1).weight
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(weight(x0, x1).weight, expected)
