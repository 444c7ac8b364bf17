"""Likelihoods against analytic Gaussians, full Jacobians, quadrature and counted bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal

from flowbench.core.seeds import generator
from flowbench.flows import (
    Divergence,
    DormandPrince,
    ExactDivergence,
    GaussianSource,
    HutchinsonDivergence,
    RungeKutta4,
    VariancePreservingPath,
    bits_per_dim,
    log_likelihood,
)

EXACT, RK4 = ExactDivergence(), RungeKutta4(50)
STANDARD = GaussianSource()
ROOT = torch.tensor([[1.5, 0.4, 0.0], [0.4, 0.8, -0.2], [0.0, -0.2, 0.6]], dtype=torch.float64)
SHIFT = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)


def transport_field(t, x):
    """Optimal transport from N(0, I) to N(SHIFT, ROOT^2)."""
    return SHIFT + (x - t * SHIFT) @ torch.linalg.inv((1 - t) * EYE + t * ROOT) @ (ROOT - EYE)


def independent_field(t, x):
    """Flow-matching minimiser for independent N(0, I) and N(SHIFT, ROOT^2): another flow to the same law."""
    covariance = ROOT @ ROOT
    variance = (1 - t) ** 2 * EYE + t**2 * covariance
    return SHIFT + (x - t * SHIFT) @ torch.linalg.inv(variance) @ (t * covariance - (1 - t) * EYE)


def network(dim: int, seed: int = 0, scale: float = 1.0):
    """A random smooth field on R^dim with non-zero weights everywhere."""
    rng = generator(seed, "network")
    inner = torch.randn(16, dim + 1, generator=rng, dtype=torch.float64)
    outer = scale * torch.randn(dim, 16, generator=rng, dtype=torch.float64) / 4

    def field(t, x):
        flat = torch.cat([x.flatten(1), t.expand(len(x), 1)], 1)
        return (torch.tanh(flat @ inner.T.to(x)) @ outer.T.to(x)).view_as(x)

    return field


def points(num: int = 6, dim: int = 3, seed: int = 0):
    return torch.randn(num, dim, generator=generator(seed, "points"), dtype=torch.float64)


def density(field, x, divergence: Divergence = EXACT, solver=RK4, rng=None):
    return log_likelihood(field, x, STANDARD.log_prob, solver, divergence, rng)


@pytest.mark.parametrize("field", [transport_field, independent_field])
@pytest.mark.parametrize("solver", [RungeKutta4(100), DormandPrince(1e-10, 1e-10)], ids=repr)
def test_gaussian_flows_have_the_analytic_density(field, solver):
    x = SHIFT + 1.5 * points()
    result = density(field, x, solver=solver)
    expected = MultivariateNormal(SHIFT, ROOT @ ROOT).log_prob(x)
    torch.testing.assert_close(result.log_prob, expected, rtol=0, atol=1e-6)
    forward = solver.solve(field, result.source, torch.tensor([0.0, 1.0]).double()).states[-1]
    torch.testing.assert_close(forward, x, rtol=0, atol=1e-6)
    assert result.probe_standard_error is None


def test_divergence_of_optimal_transport_integrates_to_the_log_determinant():
    x = points()
    result = density(transport_field, x)
    change = STANDARD.log_prob(result.source) - result.log_prob
    torch.testing.assert_close(change, torch.logdet(ROOT).expand(6), rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", [pytest.param((3,), marks=pytest.mark.slow), (1, 2, 2)])
def test_change_of_variables_agrees_with_the_jacobian_of_the_flow(shape):
    dim = math.prod(shape)
    field, z = network(dim), points(4, dim).view(4, *shape)
    times = torch.tensor([0.0, 1.0]).double()

    def flow(z):
        return RungeKutta4(100).solve(field, z[None], times).states[-1, 0]

    x = torch.stack([flow(point) for point in z])
    jacobians = torch.stack([torch.func.jacrev(flow)(point).reshape(dim, dim) for point in z])
    expected = STANDARD.log_prob(z) - torch.linalg.slogdet(jacobians)[1]
    result = density(field, x, solver=RungeKutta4(100))
    torch.testing.assert_close(result.log_prob, expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(result.source, z, rtol=0, atol=1e-7)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_with_the_known_variance(distribution):
    matrix = points(4, 4, seed=3)
    symmetric = (matrix + matrix.T) / 2
    squared = symmetric.square().sum()
    if distribution == "rademacher":
        squared = squared - symmetric.diagonal().square().sum()
    num_probes = 20_000
    divergence = HutchinsonDivergence(num_probes, distribution)
    probes = divergence.probes(torch.zeros(1, 4).double(), generator(0, "probes"))
    products = torch.einsum("kbi,ij,kbj->kb", probes, matrix, probes)
    mean, error = divergence.reduce(products)
    assert error.item() == pytest.approx((2 * squared / num_probes).sqrt().item(), rel=0.05)
    assert abs(mean.item() - matrix.trace().item()) < 4 * error.item()


@pytest.mark.parametrize("distribution", ["rademacher", pytest.param("gaussian", marks=pytest.mark.slow)])
def test_hutchinson_likelihood_agrees_with_the_exact_one_within_its_error(distribution):
    field, x = network(3), points(16)
    solver = RungeKutta4(8)
    exact = density(field, x, solver=solver).log_prob
    estimate = density(field, x, HutchinsonDivergence(200, distribution), solver, generator(1))
    deviation = (estimate.log_prob - exact) / estimate.probe_standard_error
    assert deviation.abs().max() < 4.5
    assert deviation.square().mean().item() == pytest.approx(1, abs=0.9)


def test_one_probe_has_no_standard_error_and_the_generator_decides():
    field, x = network(3), points().float()
    first, same, other = (density(field, x, HutchinsonDivergence(), RungeKutta4(5), generator(s)) for s in (1, 1, 2))
    assert first.probe_standard_error is None
    assert torch.equal(first.log_prob, same.log_prob)
    assert not torch.equal(first.log_prob, other.log_prob)
    with pytest.raises(ValueError, match=r"draws probes: pass a torch.Generator"):
        density(field, x, HutchinsonDivergence())


def test_probes_stay_fixed_along_the_path():
    """Integrate dl/dt = p^T J(t, z) p with the one probe p that the generator gives."""
    field, x = network(2), points(3, 2)
    p = HutchinsonDivergence().probes(x, generator(5))[0]

    def augmented(t, state):
        z = state[:, :2]
        velocity, product = torch.func.jvp(lambda y: field(t, y), (z,), (p,))
        return torch.cat([velocity, (p * product).sum(1, keepdim=True)], 1)

    start = torch.cat([x, torch.zeros(3, 1).double()], 1)
    end = RK4.solve(augmented, start, torch.tensor([1.0, 0.0])).states[-1]
    result = density(field, x, HutchinsonDivergence(), rng=generator(5))
    torch.testing.assert_close(result.log_prob, STANDARD.log_prob(end[:, :2]) + end[:, 2])


@pytest.mark.parametrize("seed", range(3))
def test_density_of_a_random_flow_integrates_to_one(seed: int):
    axis = torch.linspace(-9, 9, 91, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    log_prob = density(network(2, seed, scale=0.7), grid, solver=RungeKutta4(15)).log_prob
    mass = log_prob.exp().sum().item() * (axis[1] - axis[0]).item() ** 2
    assert mass == pytest.approx(1, abs=0.01)


@given(seed=st.integers(0, 99), scale=st.floats(0.3, 4))
@settings(max_examples=10, deadline=None)
def test_rotating_or_scaling_data_and_model_shifts_the_density_as_it_must(seed: int, scale: float):
    field, x = network(3, seed), points(seed=seed)
    rotation = torch.linalg.qr(points(3, 3, seed))[0]
    solver = RungeKutta4(8)
    log_prob = density(field, x, solver=solver).log_prob
    rotated = density(lambda t, y: field(t, y @ rotation.T) @ rotation, x @ rotation, solver=solver).log_prob
    torch.testing.assert_close(rotated, log_prob)
    scaled = log_likelihood(
        lambda t, y: scale * field(t, y / scale), scale * x, GaussianSource(scale).log_prob, solver, EXACT
    ).log_prob
    torch.testing.assert_close(scaled, log_prob - 3 * math.log(scale))
    # Bits per dimension do not see the unit.
    torch.testing.assert_close(bits_per_dim(scaled, 3, scale * 0.1), bits_per_dim(log_prob, 3, 0.1))


def test_variance_preserving_flow_uses_its_interval():
    """Gaussian data of half the unit scale under the variance-preserving path."""
    path, b = VariancePreservingPath(), 0.5

    def field(t, x):
        c = path.coefficients(t)
        variance = c.sigma**2 + (c.alpha * b) ** 2
        return (c.sigma * c.d_sigma + c.alpha * c.d_alpha * b**2) / variance * x

    x = b * points()
    result = log_likelihood(field, x, STANDARD.log_prob, DormandPrince(1e-9, 1e-9), EXACT, interval=path.interval)
    # alpha(0) is not 0, so the source is matched to about alpha(0)^2 = 4e-5 only.
    torch.testing.assert_close(result.log_prob, GaussianSource(b).log_prob(x), rtol=0, atol=1e-3)


class Inner(torch.nn.Module):
    """Velocity network in float32."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))

    def forward(self, t, x):
        assert t.ndim == 0
        assert t.dtype == x.dtype == torch.float32
        return self.net(x) * (1 + t)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients_get_the_same_numbers(mode):
    torch.manual_seed(0)
    field, x = Inner(), points(4, 2).float()
    solver = RungeKutta4(4)
    expected = density(field, x, solver=solver)
    with mode():
        result = density(field, x + 0, solver=solver)
    torch.testing.assert_close(result.log_prob, expected.log_prob)
    assert result.log_prob.dtype == torch.float64
    assert result.source.dtype == torch.float32
    assert not result.log_prob.requires_grad
    assert all(p.grad is None for p in field.parameters())


def test_fields_that_ignore_the_state_have_no_divergence():
    x, speed = points(), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    for field in (lambda t, x: torch.ones_like(x), lambda t, x: speed.expand_as(x)):
        result = density(field, x)
        torch.testing.assert_close(result.log_prob, STANDARD.log_prob(x - 1))


def test_evaluations_are_counted():
    assert density(network(3), points()).network_evaluations == 200
    calls = []
    field = network(3)
    result = density(lambda t, x: calls.append(1) or field(t, x), points(), solver=DormandPrince())
    assert result.network_evaluations == len(calls)


@given(num_dims=st.integers(1, 3072))
@settings(max_examples=20, deadline=None)
def test_a_uniform_model_costs_eight_bits(num_dims: int):
    log_prob = torch.full((2,), -num_dims * math.log(2.0), dtype=torch.float64)  # uniform on [-1, 1]^D
    torch.testing.assert_close(bits_per_dim(log_prob, num_dims, 2 / 256), torch.full((2,), 8.0).double())


def test_bits_follow_the_published_formula():
    """TARFlow's evaluation: nats per dimension of the density of x in [-1, 1), plus log 128, over log 2."""
    z, log_determinant = points(5, 12), points(5, 12, seed=1).sum(1)
    log_prob = STANDARD.log_prob(z) + log_determinant
    nats = (0.5 * z.square().mean(1) + 0.5 * math.log(2 * math.pi)) - log_determinant / 12
    torch.testing.assert_close(bits_per_dim(log_prob, 12, 1 / 128), (nats + math.log(128)) / math.log(2))
    # Data normalised as 2 k / 255 - 1: 6.9944 bits.
    assert bits_per_dim(torch.zeros(()), 5, 2 / 255).item() == pytest.approx(6.9944, abs=1e-4)


def test_bits_of_a_coin_are_its_entropy():
    """One dimension, two levels of probability p and 1 - p, a model that is piecewise constant."""
    p = torch.tensor([0.2, 0.8], dtype=torch.float64)
    log_density = (p / 1.0).log()  # two bins of width 1 on [-1, 1)
    mean = (p * bits_per_dim(log_density, 1, 1.0)).sum().item()
    assert mean == pytest.approx(-(p * p.log2()).sum().item())


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="num_probes must be a whole number in"):
        HutchinsonDivergence(0)
    with pytest.raises(ValueError, match="distribution must be"):
        HutchinsonDivergence(2, "uniform")
