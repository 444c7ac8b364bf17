"""Small trainings with known ends: densities that integrate to one, closed-form fields, loss floors."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from flowbench.data import Batch, DataSpec, get_density
from flowbench.families import (
    OTCFM,
    Condition,
    DatasetSource,
    FlowMatching,
    FlowModule,
    FlowScoreDenoiser,
    GaussianNoise,
    TARFlow,
    Tweedie,
    WeightedCFM,
)
from flowbench.flows import GaussianSource, GibbsWeight, RungeKutta4
from flowbench.metrics import path_geometry
from flowbench.networks import MLP
from flowbench.training import OptimizerConfig, TrainingConfig
from flowbench.training.optimizers import learning_rate_factor

POINTS = DataSpec("points", "1", (2,))
NETWORK = partial(MLP, width=48, depth=2)


def train(module: FlowModule, draw, steps: int, batch: int = 256) -> FlowModule:
    """`draw(n, generator)` gives data; the schedule falls to zero at the end."""
    rng = torch.Generator().manual_seed(0)
    optimizer = module.optimizer_config.build(module)
    for step in range(steps):
        factor = learning_rate_factor(module.optimizer_config, (step + 0.5) / steps)
        for group in optimizer.param_groups:
            group["lr"] = module.optimizer_config.lr * factor
        x = draw(batch, rng)
        loss = module.loss(x, Condition(), Batch(x), rng).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        module.ema.update()
    return module


def tarflow() -> TARFlow:
    torch.manual_seed(0)
    return TARFlow(POINTS, layers=[1, 1, 1, 1], width=32, head_dim=16, start="learned", **TRAINING)


def matching(cls=FlowMatching, **options) -> FlowMatching:
    torch.manual_seed(0)
    return cls(POINTS, NETWORK, likelihood_solver=RungeKutta4(num_steps=20), **TRAINING, **options)


TRAINING = {"training": TrainingConfig(OptimizerConfig(lr=4e-3, weight_decay=0.0))}


# An autoregressive flow is trained to a known entropy by every run of tests/numerical/test_autoregressive.
@pytest.fixture(scope="module", params=[pytest.param("tarflow", marks=pytest.mark.slow), "cfm"])
def trained(request) -> FlowModule:
    density = get_density("moons")
    module = tarflow() if request.param == "tarflow" else matching()
    return train(module, density.sample, 300)


@pytest.mark.slow
def test_a_trained_density_integrates_to_one(trained):
    axis = torch.linspace(-8, 8, 141)
    grid = torch.cartesian_prod(axis, axis)
    with trained.evaluating("ema"):
        log_prob = torch.cat([trained.log_prob(part) for part in grid.split(4000)])
    total = log_prob.double().exp().sum() * (axis[1] - axis[0]) ** 2
    assert 0.99 < total < 1.01


def test_training_beats_the_best_gaussian_and_stays_above_the_entropy(trained):
    density = get_density("moons")
    x = density.sample(2000, torch.Generator().manual_seed(5))
    with trained.evaluating("ema"):
        nll = -trained.log_prob(x).mean().item()
    gaussian = 0.5 * math.log((2 * math.pi * math.e) ** 2 * torch.linalg.det(x.T.cov()))
    truth = -density.log_prob(x).mean().item()
    assert truth - 0.02 < nll < gaussian - 0.1


def isotropic(shift: float, std: float):
    mean = torch.tensor([shift, 0.0])
    return lambda n, rng: mean + std * torch.randn(n, 2, generator=rng)


def test_cfm_between_gaussians_learns_the_closed_form_field_and_its_loss_floor():
    """v(t, x) = m + ((t b^2 - (1 - t)) / s^2) (x - t m), and the loss cannot fall below its conditional variance."""
    shift, std = 2.0, 0.5
    module = train(matching(), isotropic(shift, std), 600)
    mean = torch.tensor([shift, 0.0])
    rng = torch.Generator().manual_seed(3)
    n = 4000
    t = torch.rand(n, generator=rng)
    x0 = torch.randn(n, 2, generator=rng)
    x1 = isotropic(shift, std)(n, rng)
    xt = (1 - t[:, None]) * x0 + t[:, None] * x1
    variance = (1 - t) ** 2 + t**2 * std**2
    slope = (t * std**2 - (1 - t)) / variance
    exact = mean + slope[:, None] * (xt - t[:, None] * mean)
    with module.evaluating("ema"), torch.no_grad():
        learned = module.network(xt, t)
    assert (learned - exact).square().mean().sqrt() < 0.15
    # Per dimension Var(x1 - x0 | x_t) = a^2 b^2 / s_t^2.
    floor = (std**2 / variance).mean()
    loss = (learned - (x1 - x0)).square().mean()
    assert loss > floor * 0.97
    assert loss < floor * 1.1


@pytest.mark.slow
def test_straightness_of_a_trained_cfm_is_the_closed_form():
    """S = d a b (2 - pi / 2) for independent pairs of isotropic Gaussians."""
    shift, std = 2.0, 1.0
    module = train(matching(), isotropic(shift, std), 600)
    with module.evaluating("ema"):
        path = module.trajectory(module.draw_noise(torch.arange(2000), 0), None, 33)
    geometry = path_geometry(path.states, path.velocities, path.times).mean()
    assert geometry["straightness"] == pytest.approx(2 * 1.0 * std * (2 - math.pi / 2), rel=0.15)
    assert geometry["path_energy"] == pytest.approx(geometry["straightness"] + geometry["displacement"], rel=1e-6)


@pytest.mark.slow
def test_couplings_and_weights_straighten_the_paths():
    density = get_density("eight_gaussians")

    def straightness(module):
        train(module, density.sample, 300)
        with module.evaluating("ema"):
            path = module.trajectory(module.draw_noise(torch.arange(500), 0), None, 33)
        return path_geometry(path.states, path.velocities, path.times).mean()["straightness"]

    plain = straightness(matching())
    assert straightness(matching(OTCFM)) < 0.3 * plain
    assert straightness(matching(WeightedCFM, weight=GibbsWeight(kappa=1.0))) < 0.8 * plain


def test_a_dataset_can_be_the_source():
    module = matching(OTCFM, source=DatasetSource("moons"))
    noise = module.draw_noise(torch.arange(200), 0)
    direct = get_density("moons").sample(2000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(noise.mean(0), direct.mean(0), atol=0.35, rtol=0)
    train(module, get_density("eight_gaussians").sample, 20)
    assert module.sample(noise).x.shape == (200, 2)
    x = module.sample(noise[:5]).x
    assert torch.isfinite(module.log_prob(x)).all(), "moons have an exact density, so likelihoods are defined"
    with pytest.raises(ValueError, match="points of shape"):
        DatasetSource("moons").sample(3, (1, 8, 8), torch.Generator())


def test_a_wide_source_gives_wide_noise():
    module = matching(source=GaussianSource(std=3.0))
    assert module.draw_noise(torch.arange(3000), 0).std() == pytest.approx(3.0, rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_source_that_is_a_dataset_has_a_density_for_points_on_the_gpu():
    source = DatasetSource("moons")
    x = source.sample(5, (2,), torch.Generator(), "cuda")
    assert source.log_prob(x).device == x.device
    assert torch.equal(source.log_prob(x).cpu(), source.log_prob(x.cpu()))


# ---- an autoregressive flow of noisy labelled Gaussians ---------------------------------------------------

MEANS = torch.tensor([[1.0, -0.5], [-1.0, 0.5]])
COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 0.8]])
NOISE = 0.5
NOISY = COVARIANCE + NOISE**2 * torch.eye(2)


def noisy_flow(denoiser) -> TARFlow:
    torch.manual_seed(0)
    return TARFlow(
        DataSpec("two", "1", (2,), num_classes=2),
        layers=[1, 1],
        width=32,
        head_dim=16,
        start="learned",
        conditional=True,
        augmentation=GaussianNoise(NOISE),
        denoiser=denoiser,
        training=TrainingConfig(OptimizerConfig(lr=4e-3, weight_decay=0.0)),
    )


@pytest.fixture(scope="module")
def gaussians() -> TARFlow:
    """Trained with a denoiser that learns the score from the same backward."""
    flow = noisy_flow(FlowScoreDenoiser(width=32, depth=2, head_dim=16))
    root, rng, steps = torch.linalg.cholesky(COVARIANCE), torch.Generator().manual_seed(0), 500
    optimizer = flow.optimizer_config.build(flow)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * learning_rate_factor(flow.optimizer_config, (step + 0.5) / steps)
        label = torch.randint(0, 2, (256,), generator=rng)
        x = MEANS[label] + torch.randn(256, 2, generator=rng) @ root.T
        optimizer.zero_grad()
        flow.training_loss(Batch(x, label=label), rng).total.backward()
        optimizer.step()
        flow.ema.update()
    return flow


def drawn(label: int, num: int = 4000) -> torch.Tensor:
    """Points of one label, with the augmentation's noise."""
    rng = torch.Generator().manual_seed(9)
    return MEANS[label] + torch.randn(num, 2, generator=rng) @ torch.linalg.cholesky(NOISY).T


@pytest.mark.slow
@pytest.mark.parametrize("label", [0, 1])
def test_a_conditional_density_integrates_to_one_and_reaches_the_entropy(gaussians, label):
    axis = torch.linspace(-9, 9, 121)
    grid = torch.cartesian_prod(axis, axis)
    x = drawn(label)
    with gaussians.evaluating("ema"):
        mass = gaussians.log_prob(grid, torch.full((len(grid),), label)).double().exp().sum() * (axis[1] - axis[0]) ** 2
        nll = -gaussians.log_prob(x, torch.full((len(x),), label)).mean()
    assert float(mass) == pytest.approx(1.0, abs=1e-3)
    # Against the truth on the same points, which leaves the luck of the draw out.
    truth = torch.distributions.MultivariateNormal(MEANS[label], NOISY)
    assert float(truth.entropy()) == pytest.approx(-float(truth.log_prob(x).mean()), abs=0.05)
    assert -0.01 < float(nll + truth.log_prob(x).mean()) < 0.02


@pytest.mark.slow
def test_a_fitted_flow_sends_data_to_unit_normals_and_back(gaussians):
    x, label = torch.cat([drawn(0), drawn(1)]), torch.arange(2).repeat_interleave(4000)
    with gaussians.evaluating("ema"):
        z = gaussians.encode(x, label)
        noise = torch.randn(8000, 2, generator=torch.Generator().manual_seed(3))
        back = gaussians.flow_decode(noise, Condition(label)).x
    assert float(0.5 * z.square().mean()) == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(z.T.cov(), torch.eye(2), atol=0.06, rtol=0.0)
    for k in (0, 1):
        torch.testing.assert_close(back[label == k].mean(0), MEANS[k], atol=0.08, rtol=0.0)
        torch.testing.assert_close(back[label == k].T.cov(), NOISY, atol=0.12, rtol=0.0)


@pytest.mark.slow
def test_denoisers_of_a_fitted_flow_are_wieners_filter(gaussians):
    """E[clean | noisy] = m + C (C + n^2)^-1 (noisy - m), by Tweedie's formula and by the network that learned it."""
    x, label = drawn(1, 500), torch.ones(500, dtype=torch.long)
    wiener = MEANS[1] + (x - MEANS[1]) @ torch.linalg.solve(NOISY, COVARIANCE)
    tweedie = noisy_flow(Tweedie())
    with gaussians.evaluating("ema"):
        tweedie.flow.load_state_dict(gaussians.flow.state_dict())
        learned = gaussians.flow_denoise(x, Condition(label))
    exact = tweedie.flow_denoise(x, Condition(label))
    step = (wiener - x).square().mean()
    assert float((exact - wiener).square().mean() / step) < 0.02
    assert float((learned - wiener).square().mean() / step) < 0.04
    assert float((learned - exact).square().mean() / step) < 0.02
