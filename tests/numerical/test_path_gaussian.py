"""Paths between distributions whose optimal velocity is known: Gaussians and finite data sets."""

from __future__ import annotations

import math

import pytest
import torch

from flowbench.core.seeds import generator
from flowbench.flows.path.affine import CosinePath, LinearPath, TargetConditionalPath
from flowbench.flows.path.base import Path
from flowbench.flows.path.bridge import SchrodingerBridgePath
from flowbench.flows.path.diffusion import VariancePreservingPath
from flowbench.flows.solver.fixed_step import RungeKutta4
from flowbench.metrics.straightness import path_geometry

from .gaussian_flow import GaussianFlow

SMOOTH = [LinearPath(), CosinePath(), TargetConditionalPath(0.2), VariancePreservingPath()]
NOISY = [LinearPath(0.3), SchrodingerBridgePath(0.7)]
MEAN = torch.tensor([1.5, -0.5, 0.2], dtype=torch.float64)
A, B = 1.3, 0.7


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("path", SMOOTH + NOISY, ids=repr)
@pytest.mark.parametrize("time", [0.1, 0.5, 0.9])
def test_best_gaussian_velocity_reaches_the_loss_floor_and_nothing_beats_it(path: Path, time: float):
    a, b, shift, num = 1.0, 0.6, 1.5, 100_000
    flow = GaussianFlow(path, a, b, torch.tensor([shift], dtype=torch.float64))
    noise = normal(2, num, 1, seed=3)
    t = torch.full((num,), time, dtype=torch.float64)
    s = path.sample(a * noise[0], shift + b * noise[1], t, generator(4))
    best = flow(t[0], s.xt)
    loss = (s.velocity - best).square().mean().item()
    # Var(u | x_t) of a joint Gaussian: Var u - Cov(u, x_t)^2 / Var x_t.
    c, d_gamma = path.coefficients(t[0]), path.noise_scale(t[0])[1]
    variance, covariance = flow.variance_and_rate(t[0])
    floor = (c.d_alpha * b) ** 2 + (c.d_sigma * a) ** 2 + d_gamma**2 - covariance**2 / variance
    assert loss == pytest.approx(floor.item(), rel=0.03)
    # Nothing beats the best but by sampling error; a worse field is worse by its squared distance.
    size = best.square().mean().sqrt()
    for other in (best + 0.2 * size, best * 1.2, best + 0.2 * size * (s.xt - s.xt.mean())):
        assert (s.velocity - other).square().mean().item() > loss
    # The least-squares line through the samples is the closed form.
    centred = s.xt - s.xt.mean()
    fitted = (centred * s.velocity).mean() / centred.square().mean()
    error = math.sqrt(floor / (num * variance))
    assert fitted.item() == pytest.approx((covariance / variance).item(), abs=5 * error)


def test_a_trained_network_nears_the_floor_on_held_out_pairs_and_stays_above():
    flow = GaussianFlow(LinearPath(), 1.0, 0.6, torch.tensor([1.5], dtype=torch.float64))

    def pairs(num: int, seed: int):
        x0, z = normal(2, num, 1, seed=seed)
        t = torch.rand(num, generator=generator(seed, "time"), dtype=torch.float64)
        return LinearPath().sample(x0, 1.5 + 0.6 * z, t)

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).double()
    before = [p.clone() for p in network.parameters()]
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=600)
    for step in range(600):
        s = pairs(512, step)
        loss = (network(torch.cat([s.xt, s.t[:, None]], 1)) - s.velocity).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert all(not torch.equal(p, q) for p, q in zip(before, network.parameters(), strict=True))
    held_out = pairs(50_000, 10_000)
    with torch.no_grad():
        reached = network(torch.cat([held_out.xt, held_out.t[:, None]], 1))
    floor = (flow(held_out.t[:, None], held_out.xt) - held_out.velocity).square().mean().item()
    assert floor < (reached - held_out.velocity).square().mean().item() < 1.05 * floor


@pytest.mark.parametrize("path", SMOOTH, ids=repr)
@pytest.mark.parametrize("time", [0.05, 0.5, 0.95])
def test_conversions_of_the_marginal_velocity_are_posterior_means(path: Path, time: float):
    flow = GaussianFlow(path, A, B, MEAN)
    t, x = torch.tensor(time, dtype=torch.float64), normal(5, 3)
    c, (variance, _) = path.coefficients(t), flow.variance_and_rate(t)
    centred = (x - c.alpha * MEAN) / variance
    velocity, score = flow(t, x), flow.score(t, x)
    torch.testing.assert_close(path.velocity_to_data(velocity, x, t), MEAN + c.alpha * B**2 * centred)
    torch.testing.assert_close(path.velocity_to_source(velocity, x, t), c.sigma * A**2 * centred)
    torch.testing.assert_close(path.velocity_to_score(velocity, x, t, A), score)
    torch.testing.assert_close(path.score_to_velocity(score, x, t, A), velocity)


class FiniteData:
    """One-dimensional data of three values, a standard normal source: everything by enumeration on a grid."""

    values = torch.tensor([-1.5, 0.2, 1.0], dtype=torch.float64)
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]

    def __init__(self, path: Path, time: float) -> None:
        self.path, self.t = path, torch.tensor(time, dtype=torch.float64)
        c = path.coefficients(self.t)
        z = (self.grid - c.alpha * self.values) / c.sigma  # the source point, (grid, values)
        self.joint = (-z.square() / 2).exp() / (c.sigma * math.sqrt(2 * math.pi) * len(self.values))
        self.velocity = path.sample(
            z.flatten(), self.values.expand_as(z).flatten(), self.t.expand(z.numel())
        ).velocity.view_as(z)
        self.posterior = self.joint / self.joint.sum(1, keepdim=True)

    def marginal_velocity(self) -> torch.Tensor:
        return self.path.data_to_velocity(self.posterior @ self.values, self.grid[:, 0], self.t)


@pytest.mark.parametrize("path", SMOOTH, ids=repr)
@pytest.mark.parametrize("time", [0.3, 0.8])
def test_the_gradient_of_conditional_flow_matching_is_that_of_flow_matching(path: Path, time: float):
    data = FiniteData(path, time)
    weights = (0.3 * normal(9)).requires_grad_()  # not zero
    hidden = torch.tanh(data.grid * weights[:4] + weights[4:8])
    model = (hidden * weights[4:8]).sum(1) + weights[8]
    step = data.grid[1, 0] - data.grid[0, 0]
    assert data.joint.sum().item() * step.item() == pytest.approx(1, abs=1e-9)
    conditional = (data.joint * (model[:, None] - data.velocity).square()).sum() * step
    marginal = (data.joint.sum(1) * (model - data.marginal_velocity()).square()).sum() * step
    (left,) = torch.autograd.grad(conditional, weights, retain_graph=True)
    (right,) = torch.autograd.grad(marginal, weights)
    assert left.abs().max() > 0.01
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)
    assert conditional > marginal  # the floor that no network gets below


@pytest.mark.parametrize("path", SMOOTH, ids=repr)
@pytest.mark.parametrize("time", [0.3, 0.8])
def test_the_score_is_the_gradient_of_the_log_density(path: Path, time: float):
    data = FiniteData(path, time)
    c = path.coefficients(data.t)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    log_density = torch.logsumexp(-(((x[:, None] - c.alpha * data.values) / c.sigma) ** 2) / 2, 1)
    (expected,) = torch.autograd.grad(log_density.sum(), x)
    weights = torch.softmax(-(((x[:, None] - c.alpha * data.values) / c.sigma) ** 2) / 2, 1)
    torch.testing.assert_close(path.data_to_score(weights @ data.values, x, data.t), expected)


# ---- flows between Gaussians --------------------------------------------------------------------------


def geometry(field, x: torch.Tensor, steps: int = 100):
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    states = RungeKutta4(steps).solve(field, x, times).states
    return states, path_geometry(states, torch.stack([field(t, z) for t, z in zip(times, states, strict=True)]), times)


def test_independent_linear_flow_is_curved_although_its_map_is_optimal():
    flow = GaussianFlow(LinearPath(), A, B, MEAN)
    z0 = flow.noise(4000)
    states, paths = geometry(flow, z0)
    torch.testing.assert_close(states[-1], MEAN + B / A * z0, rtol=0, atol=1e-7)
    golden = (2 - math.pi / 2) * 3 * A * B  # 0.4292 d a b
    s = paths.straightness
    assert s.mean().item() == pytest.approx(golden, abs=4 * s.std().item() / math.sqrt(len(s)))
    # S of a sample is proportional to |z0|^2: the constant has no sampling error.
    torch.testing.assert_close(s * 3 * A**2 / z0.square().sum(1), torch.full_like(s, golden), rtol=1e-5, atol=0)
    w2_squared = MEAN.square().sum() + 3 * (A - B) ** 2
    energy = paths.path_energy
    error = 4 * energy.std().item() / math.sqrt(len(s))
    assert energy.mean().item() == pytest.approx(golden + w2_squared.item(), abs=error)


def test_optimal_coupling_makes_the_flow_straight():
    root = normal(3, 3, seed=1)
    stretch = root @ root.T / 3 + 0.3 * torch.eye(3, dtype=torch.float64)  # the optimal map of the covariances
    eye = torch.eye(3, dtype=torch.float64)

    def field(t, x):
        inverse = torch.linalg.inv((1 - t) * eye + t * stretch)
        return MEAN + (x - t * MEAN) @ ((stretch - eye) @ inverse).T

    z0 = normal(500, 3)
    states, paths = geometry(field, z0)
    assert paths.straightness.max() < 1e-8
    torch.testing.assert_close(states[-1], MEAN + z0 @ stretch.T)
    # The closed form is what the path's own samples give: x1 = m + A x0 at every x_t.
    t = torch.full((500,), 0.4, dtype=torch.float64)
    sample = LinearPath().sample(z0, MEAN + z0 @ stretch.T, t)
    torch.testing.assert_close(sample.velocity, field(t[0], sample.xt))
    torch.testing.assert_close(paths.path_energy, (MEAN + z0 @ (stretch - eye).T).square().sum(1))


def test_cosine_path_bends_a_pure_shift():
    flow = GaussianFlow(CosinePath(), A, A, MEAN)
    states, paths = geometry(flow, flow.noise(50))
    golden = (math.pi**2 / 8 - 1) * MEAN.square().sum()  # 0.2337 |m|^2, the same for every sample
    torch.testing.assert_close(paths.straightness, golden.expand(50), rtol=1e-6, atol=0)
    torch.testing.assert_close(states[-1] - states[0], MEAN.expand(50, 3), rtol=0, atol=1e-7)


@pytest.mark.parametrize("path", [CosinePath(), TargetConditionalPath(0.2), LinearPath(0.3)], ids=repr)
def test_the_optimal_field_carries_the_marginals(path: Path):
    flow = GaussianFlow(path, 1.0, B, MEAN)
    start, end = (flow.variance_and_rate(torch.tensor(t, dtype=torch.float64))[0] for t in (0.0, 1.0))
    z0 = normal(20, 3) * start.sqrt()  # both ends smoothed where the path has noise
    reached = RungeKutta4(100).solve(flow, z0, torch.tensor([0.0, 1.0], dtype=torch.float64)).states[-1]
    torch.testing.assert_close(reached, MEAN + (end / start).sqrt() * z0, rtol=0, atol=1e-6)


# ---- the bridge ---------------------------------------------------------------------------------------


def entropic_cross_covariance(sigma: float) -> float:
    return (math.sqrt(4 * A**2 * B**2 + sigma**4) - sigma**2) / 2


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_bridge_between_gaussians_has_the_closed_form_marginals(sigma: float):
    path, num, cross = SchrodingerBridgePath(sigma), 100_000, entropic_cross_covariance(sigma)
    x0, z = normal(2, num, 1)
    x0 = A * x0
    x1 = cross / A**2 * x0 + math.sqrt(B**2 - (cross / A) ** 2) * z  # Var B^2, covariance with x0 `cross`
    flow = GaussianFlow(path, A, B, torch.zeros(1, dtype=torch.float64), cross)
    for time in (0.1, 0.5, 0.8):
        t = torch.full((num,), time, dtype=torch.float64)
        s = path.sample(x0, x1, t, generator(5))
        variance = (1 - time) ** 2 * A**2 + time**2 * B**2 + 2 * time * (1 - time) * cross
        variance += sigma**2 * time * (1 - time)
        assert s.xt.var().item() == pytest.approx(variance, rel=0.03)
        slope = (s.xt * s.velocity).mean() / s.xt.square().mean()
        expected = flow.variance_and_rate(t[0])[1].item() / variance
        error = math.sqrt(s.velocity.var().item() / (num * variance))
        assert slope.item() == pytest.approx(expected, abs=5 * error)


def test_entropic_covariance_runs_from_optimal_to_independent():
    assert entropic_cross_covariance(1e-4) == pytest.approx(A * B)
    assert entropic_cross_covariance(1e3) == pytest.approx(0, abs=1e-5)


def test_bridge_without_diffusion_is_the_line_and_with_much_of_it_is_noise():
    x0, x1 = normal(2, 1000, 2)
    t = torch.linspace(0.01, 0.99, 1000, dtype=torch.float64)
    line = LinearPath().sample(x0, x1, t)
    thin = SchrodingerBridgePath(1e-9).sample(x0, x1, t, generator(0))
    torch.testing.assert_close((thin.xt, thin.velocity), (line.xt, line.velocity), rtol=0, atol=1e-7)
    wide = SchrodingerBridgePath(1e9).sample(x0, x1, t, generator(0))
    bridge = (t * (1 - t)).sqrt()[:, None] * wide.noise
    torch.testing.assert_close(wide.xt / 1e9, bridge, rtol=0, atol=1e-7)
    assert wide.noise.var().item() == pytest.approx(1, abs=0.1)


def test_only_the_clip_keeps_the_bridges_velocity_finite_on_average():
    # E|velocity|^2 exceeds that of the line by sigma^2 / 4 times the integral of (1 - 2t)^2 / (t (1 - t)), which grows
    # by 2 log 10 with every decimal that the clip gains.
    def excess(clip: float) -> float:
        t = torch.special.expit(torch.linspace(-1, 1, 20_001, dtype=torch.float64) * math.log((1 - clip) / clip))
        rate = SchrodingerBridgePath(1.0, clip).noise_scale(t)[1].square()
        return torch.trapezoid(rate, t).item()

    assert excess(1e-5) - excess(1e-4) == pytest.approx(math.log(10) / 2, rel=0.01)
    assert excess(1e-4) - excess(1e-3) == pytest.approx(math.log(10) / 2, rel=0.01)
