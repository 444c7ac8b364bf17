"""Data carried to noise and back, against exact flows and the steps of the solvers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flowbench.families import Condition, FlowMatching
from flowbench.families.zero_shot import reconstruct
from flowbench.flows import (
    DormandPrince,
    ExactDivergence,
    Midpoint,
    RungeKutta4,
    VariancePreservingPath,
    log_likelihood,
)
from tests.contract.builders import IMAGES, POINTS, build

from .gaussian_flow import GaussianFlow, data


@pytest.mark.parametrize("spec", [IMAGES, POINTS], ids=lambda spec: spec.name)
@pytest.mark.parametrize("conditional", [False, True])
def test_an_autoregressive_flow_returns_its_data_in_float64(spec, conditional):
    module = build("tarflow", spec, conditional=conditional).double().eval()
    x = data(spec) * 0.5
    label = torch.arange(5) % 3 if conditional else None
    found = reconstruct(module, x, label)
    assert float((found.noise - x).abs().max()) > 0.05
    assert float(found.flow_error.max()) < 1e-10
    assert float(found.data_error.max()) < 1e-10
    assert found.autoencoder_psnr is None
    assert found.network_evaluations == 2


def test_encoding_is_the_inverse_of_sampling_and_keeps_the_density():
    """log p(x) = log N(z) + log |dz/dx|, the Jacobian by differences."""
    module = build("tarflow", IMAGES, conditional=True).double().eval()
    x, label = data(IMAGES, 2) * 0.5, torch.tensor([0, 2])
    noise = module.encode(x, label)
    assert not noise.requires_grad
    torch.testing.assert_close(module.flow_decode(noise, Condition(label)).x, x, rtol=0, atol=1e-10)

    step = 1e-5
    probes = x[:1] + step * torch.eye(16, dtype=torch.float64).view(16, 1, 4, 4)
    ahead, behind = (module.encode(p, label[:1].expand(16)).flatten(1) for p in (probes, 2 * x[:1] - probes))
    jacobian = (ahead - behind) / (2 * step)
    expected = module.source.log_prob(noise[:1]) + torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(module.log_prob(x[:1], label[:1]), expected, rtol=0, atol=1e-6)


class LinearField(nn.Module):
    """v = RATE x, whatever the time and the label."""

    RATE = 1.5

    def __init__(self, *_):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(self.RATE))

    def forward(self, x, t, label=None):
        return self.rate * x


def linear_flow(path=None, **options) -> FlowMatching:
    return FlowMatching(POINTS, LinearField, path=path, **options).double().eval()


@pytest.mark.parametrize("steps", [4, 40])
def test_a_continuous_flow_takes_the_steps_of_its_solver_backward(steps):
    """The midpoint rule on v = a x multiplies by 1 + ah + (ah)^2 / 2 at each step, and by its value at -h backward."""
    module, x = linear_flow(solver=Midpoint(steps)), data(POINTS)
    step = LinearField.RATE / steps
    ahead, back = (1 + h + h**2 / 2 for h in (step, -step))
    torch.testing.assert_close(module.encode(x), x * back**steps, rtol=0, atol=1e-12)
    found = reconstruct(module, x)
    error = (x * ((ahead * back) ** steps - 1)).abs().amax(1)
    torch.testing.assert_close(found.flow_error, error, rtol=0, atol=1e-12)
    assert found.network_evaluations == 4 * steps


def test_encoding_approaches_the_exact_flow():
    x = data(POINTS)
    fine = linear_flow(solver=RungeKutta4(100)).encode(x)
    torch.testing.assert_close(fine, x * math.exp(-LinearField.RATE), rtol=0, atol=1e-8)
    adaptive = linear_flow(solver=DormandPrince(1e-10, 1e-10))
    torch.testing.assert_close(adaptive.encode(x), x * math.exp(-LinearField.RATE), rtol=0, atol=1e-8)
    assert reconstruct(adaptive, x).network_evaluations is None


def test_a_path_that_is_singular_at_its_end_is_encoded_from_just_before():
    path = VariancePreservingPath()
    first, last = path.interval
    assert last < 1
    found = linear_flow(path, solver=RungeKutta4(100)).encode(data(POINTS))
    expected = data(POINTS) * math.exp(-LinearField.RATE * (last - first))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_a_continuous_flow_encodes_to_where_its_likelihood_ends():
    """Against the source end of the instantaneous change of variables."""
    module = build("wcfm", POINTS, solver=RungeKutta4(40)).double().eval()
    x = data(POINTS)
    solver = RungeKutta4(80)
    expected = log_likelihood(module.field(Condition()), x, module.source.log_prob, solver, ExactDivergence()).source
    assert float((expected - x).abs().max()) > 1e-2
    torch.testing.assert_close(module.encode(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["starflow", "latent_cfm"])
def test_latent_families_report_the_autoencoder_apart(name):
    module = build(name, IMAGES).eval()
    x = data(IMAGES).float() * 0.5
    found, again = reconstruct(module, x), reconstruct(module, x)
    assert torch.equal(found.noise, again.noise)  # the mean, not a draw
    plain = module.space.decode(module.space.encode_mean(x))
    mse = (plain.double() - x.double()).flatten(1).square().mean(1)
    torch.testing.assert_close(found.autoencoder_psnr, 20 * torch.log10(2 / mse.sqrt()))
    assert float(found.flow_error.max()) < 1e-3
    assert float(found.data_error.max()) > 10 * float(found.flow_error.max())


def test_encode_refuses_other_shapes_and_labels():
    module = GaussianFlow()
    with pytest.raises(ValueError, match=r"expected points of shape \(1, 4, 4\), got \(1, 2, 2\)"):
        module.encode(torch.zeros(3, 1, 2, 2))
    with pytest.raises(ValueError, match="unconditional"):
        module.encode(torch.zeros(3, 1, 4, 4), torch.zeros(3, dtype=torch.long))
