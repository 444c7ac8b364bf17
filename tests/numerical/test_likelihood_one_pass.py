"""Sampling with likelihood in one pass, step control that does not couple samples, and probes in one backward pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from flowbench.core.seeds import generator
from flowbench.flows.likelihood.change_of_variables import log_likelihood, sample_with_log_prob
from flowbench.flows.likelihood.divergence import ExactDivergence, HutchinsonDivergence
from flowbench.flows.solver.adaptive import DormandPrince
from flowbench.flows.solver.base import ConditionedField
from flowbench.flows.solver.fixed_step import Euler, Heun, RungeKutta4
from flowbench.flows.source.base import GaussianSource
from flowbench.networks import MLP
from tests.marks import slow

EXACT, STANDARD = ExactDivergence(), GaussianSource()
ROOT = torch.tensor([[1.5, 0.4, 0.0], [0.4, 0.8, -0.2], [0.0, -0.2, 0.6]], dtype=torch.float64)
SHIFT = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)
TARGET = MultivariateNormal(SHIFT, ROOT @ ROOT)


def transport_field(t, x):
    """Optimal transport from N(0, I) to N(SHIFT, ROOT^2)."""
    return SHIFT + (x - t * SHIFT) @ torch.linalg.inv((1 - t) * EYE + t * ROOT) @ (ROOT - EYE)


def independent_field(t, x):
    """Flow-matching minimiser for independent N(0, I) and N(SHIFT, ROOT^2)."""
    covariance = ROOT @ ROOT
    variance = (1 - t) ** 2 * EYE + t**2 * covariance
    return SHIFT + (x - t * SHIFT) @ torch.linalg.inv(variance) @ (t * covariance - (1 - t) * EYE)


def smooth_field(dim: int = 2, label=None):
    """A random smooth field in float64 with non-zero weights everywhere, one rate per label."""
    rng = generator(0, "field")
    inner = torch.randn(dim + 1, 16, generator=rng, dtype=torch.float64)
    outer = torch.randn(16, dim, generator=rng, dtype=torch.float64) / 4

    def velocity(t, x, label):
        rate = 1.0 if label is None else 1 + 0.3 * label.double()[:, None]
        flat = torch.cat([rate * x, t.to(x).reshape(-1, 1).expand(len(x), 1)], 1)
        return torch.tanh(flat @ inner) @ outer

    return ConditionedField(velocity, label)


def network(dim: int = 2):
    net = MLP((dim,), None, width=16, depth=2).eval()
    rng = generator(0, "weights")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.15)
    return net


def field_of(net):
    return lambda t, x: net(x, t.to(x).expand(len(x)))


def points(num: int = 6, dim: int = 3):
    return torch.randn(num, dim, generator=generator(0, "points"), dtype=torch.float64)


def density(field, x, solver, divergence=EXACT, rng=None):
    return log_likelihood(field, x, STANDARD.log_prob, solver, divergence, rng)


# ---- one pass ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "error"), [(transport_field, 1e-8), (independent_field, 1e-6)])
def test_fifty_steps_give_the_gaussian_density_both_ways(field, error: float):
    z = points(20)
    x, forward = sample_with_log_prob(field, z, STANDARD.log_prob, RungeKutta4(50), EXACT)
    torch.testing.assert_close(forward.log_prob, TARGET.log_prob(x), rtol=0, atol=error)
    assert forward.source is z
    assert forward.network_evaluations == 200
    x = TARGET.mean + points(20) @ ROOT
    backward = density(field, x, RungeKutta4(50))
    torch.testing.assert_close(backward.log_prob, TARGET.log_prob(x), rtol=0, atol=error)


def test_divergence_of_transport_sums_to_the_log_determinant_forward():
    z = points()
    _, likelihood = sample_with_log_prob(transport_field, z, STANDARD.log_prob, RungeKutta4(50), EXACT)
    change = STANDARD.log_prob(z) - likelihood.log_prob
    torch.testing.assert_close(change, torch.logdet(ROOT).expand(6), rtol=0, atol=1e-8)


@pytest.mark.parametrize("solver", [RungeKutta4(100), DormandPrince(1e-9, 1e-9), DormandPrince(1e-9, 1e-9, 999, True)])
@pytest.mark.parametrize("divergence", [EXACT, slow(HutchinsonDivergence(3))], ids=repr)
def test_forward_and_backward_agree(solver, divergence):
    """Fixed probes make the estimate an integral along one path: it agrees as the exact one does."""
    field, z = smooth_field(), points(8, 2)
    x, forward = sample_with_log_prob(field, z, STANDARD.log_prob, solver, divergence, generator(3))
    backward = density(field, x, solver, divergence, generator(3))
    torch.testing.assert_close(forward.log_prob, backward.log_prob, rtol=0, atol=1e-5)
    torch.testing.assert_close(backward.source, z, rtol=0, atol=1e-5)
    if divergence is EXACT:
        assert forward.probe_standard_error is None
    else:
        torch.testing.assert_close(forward.probe_standard_error, backward.probe_standard_error, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_pass_gives_the_sampler_its_own_points(mode):
    net, z = network(), points(5, 2).float()
    with mode():
        x, likelihood = sample_with_log_prob(field_of(net), z + 0, STANDARD.log_prob, Heun(6), EXACT)
    plain = Heun(6).solve(field_of(net), z, torch.tensor([0.0, 1.0])).states[-1].detach()
    torch.testing.assert_close(x, plain, rtol=1e-5, atol=1e-5)
    assert (x.dtype, likelihood.log_prob.dtype) == (torch.float32, torch.float64)
    assert not x.requires_grad
    assert not likelihood.log_prob.requires_grad
    assert all(p.grad is None for p in net.parameters())


# ---- step control ------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [EXACT, HutchinsonDivergence(2)], ids=repr)
def test_the_likelihood_of_a_sample_does_not_depend_on_its_batch(divergence):
    x = 2 * points(6, 2)
    label = torch.tensor([0, 1, 2, 0, 1, 3])
    solver = DormandPrince(1e-5, 1e-5, per_sample=True, separate_divergence=True)
    rngs = [generator(0, i) for i in range(6)]
    whole = density(smooth_field(2, label), x, solver, divergence, rngs).log_prob
    for i in (0, 5):
        rng = [generator(0, i)]
        alone = density(smooth_field(2, label[i : i + 1]), x[i : i + 1], solver, divergence, rng).log_prob
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=1e-9)
    joint = DormandPrince(1e-5, 1e-5)
    one, all_of_them = (density(smooth_field(2, label[:n]), x[:n], joint).log_prob[0] for n in (1, 6))
    assert (one - all_of_them).abs() > 1e-9


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_divergence_can_keep_the_tolerance_for_itself(per_sample: bool):
    """v = a cos(40 t) x in 400 dimensions, near 0: the state hardly moves, its log-volume by 400 a sin(40) / 40."""

    def field(t, x):
        return 0.05 * (40 * t.reshape(-1, 1)).cos() * x

    x = 1e-3 * points(2, 400)
    truth = STANDARD.log_prob(x * math.exp(-0.05 * math.sin(40) / 40)) - 400 * 0.05 * math.sin(40) / 40
    errors, costs = [], []
    for separate in (False, True):
        solver = DormandPrince(1e-5, 1e-5, per_sample=per_sample, separate_divergence=separate)
        probe = HutchinsonDivergence(1)  # exact for a multiple of the identity
        found = density(field, x, solver, probe, generator(0))
        errors.append((found.log_prob - truth).abs().max().item())
        costs.append(found.network_evaluations)
    assert errors[1] < errors[0] / 2
    assert costs[1] > costs[0]


# ---- probes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "several"),
    [
        (EXACT, ExactDivergence(2)),
        (EXACT, ExactDivergence(9)),
        (HutchinsonDivergence(5), HutchinsonDivergence(5, probes_per_pass=3)),
    ],
)
def test_several_probes_in_one_pass_change_nothing(one, several):
    field, x = field_of(network(3)), points().float()
    results = [density(field, x, RungeKutta4(3), d, generator(1)) for d in (one, several)]
    torch.testing.assert_close(results[0].log_prob, results[1].log_prob, rtol=0, atol=1e-6)
    torch.testing.assert_close(results[0].source, results[1].source, rtol=0, atol=0)
    assert repr(one) == repr(several)


def test_trace_full_jacobian_and_mean_of_probes_agree():
    field, x, t = smooth_field(3), points(), torch.tensor(0.3).double()
    x.requires_grad_()
    velocity = field(t, x)
    jacobian = torch.stack([torch.func.jacrev(lambda y: field(t, y[None])[0])(row) for row in x.detach()])
    trace = jacobian.diagonal(dim1=1, dim2=2).sum(1)
    exact = EXACT.reduce(EXACT.integrand(EXACT.products(velocity, x, EXACT.probes(x, None))))[0]
    torch.testing.assert_close(exact, trace)
    estimate = HutchinsonDivergence(1000, probes_per_pass=250)
    mean, error = estimate.reduce(estimate.products(velocity, x, estimate.probes(x, generator(0))))
    assert ((mean - trace).abs() < 4 * error).all()
    symmetric = (jacobian + jacobian.mT) / 2
    variance = 2 * (symmetric.square().sum((1, 2)) - symmetric.diagonal(dim1=1, dim2=2).square().sum(1))
    torch.testing.assert_close(error, (variance / 1000).sqrt(), rtol=0.15, atol=0)


def test_compiled_networks_have_likelihoods():
    net, x = network(), points(4, 2).float()
    expected = density(field_of(net), x, Euler(2)).log_prob
    net.compile(backend="aot_eager")
    for divergence in (EXACT, ExactDivergence(2)):
        torch.testing.assert_close(density(field_of(net), x, Euler(2), divergence).log_prob, expected)


def test_fields_that_cannot_be_vectorised_say_so():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return torch.from_numpy(2 * gradient.numpy())

    x = points()
    with pytest.raises(RuntimeError, match=r"for 3 probes at once \(.*\): set probes_per_pass=1"):
        density(lambda t, x: Doubled.apply(x), x, Euler(2), ExactDivergence(3))
    assert density(lambda t, x: Doubled.apply(x), x, Euler(2)).log_prob.isfinite().all()
    with pytest.raises(ValueError, match=r"probes_per_pass must be a whole number in .*, got 0"):
        ExactDivergence(0)


def test_fields_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"must return the shape of its states \(6, 3\), got \(6, 1, 3\)"):
        density(lambda t, x: x[:, None], points(), Euler(2))
