"""What a whole matching flow must do, beyond what each of its parts does: the bridge's limits, Benamou and Brenier."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import ot
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowbench.core.seeds import generator
from flowbench.data import Batch, get_density
from flowbench.data.reference_transport import STANDARD_NORMAL, reference_transport
from flowbench.families import OTCFM, Condition, FlowMatching
from flowbench.flows import LinearPath, PointTimes, SchrodingerBridgePath
from flowbench.flows.coupling.entropic import SchrodingerBridgeCoupling
from flowbench.flows.path.base import PathSample
from flowbench.flows.weight.tilt import effective_share
from flowbench.metrics import path_geometry
from flowbench.networks import MLP
from tests.closeness import assert_near
from tests.marks import slow

from ..contract.builders import POINTS, perturb
from .test_trained import matching, train

# ---- Schroedinger bridge: coupling and path together ------------------------------------------------------

NETWORK = partial(MLP, width=8, depth=1)


def bridge(sigma: float, **options) -> FlowMatching:
    """A flow whose coupling and path are those of the bridge of diffusion sigma."""
    coupling = SchrodingerBridgeCoupling(sigma, tolerance=1e-4, max_iter=300_000)
    options = {"coupling": coupling, "path": SchrodingerBridgePath(sigma, clip=1e-3), **options}
    return FlowMatching(POINTS, NETWORK, **options)


def trained_on(flow: FlowMatching, x1: Tensor, seed: int = 0) -> PathSample:
    """What the network is shown and told in one step: the loss itself asks the path for it."""
    perturb(flow)
    seen = []
    sample = flow.path.sample
    flow.path.sample = lambda *given: seen.append(sample(*given)) or seen[-1]
    loss = flow.loss(x1, Condition(), Batch(x1), generator(seed, "step"))
    (found,) = seen
    with torch.no_grad():
        error = (flow.network(found.xt, found.t, None) - found.velocity).square().mean()
    assert_near(loss.total.detach(), error)
    return found


def data(num: int, seed: int = 0) -> Tensor:
    return torch.tensor([1.0, -0.5]) + 1.5 * torch.randn(num, 2, generator=generator(seed, "data"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_thin_bridge_trains_on_the_pairs_and_targets_of_ot_cfm(seed: int):
    x1 = data(8, seed)
    optimal = trained_on(OTCFM(POINTS, NETWORK), x1, seed)
    agreement, deviation = [], []
    for sigma in (1.0, 0.1, 0.01):
        found = trained_on(bridge(sigma), x1, seed)
        # The step's generator gives the same noise first, so the same source points are there to be chosen.
        same = (found.x0[:, None] == optimal.x0[None]).all(2)
        assert same.any(1).all()
        assert torch.equal(found.x1, x1)
        agreement.append(same.diagonal().float().mean().item())
        line = LinearPath().sample(optimal.x0, x1, found.t)
        off = torch.cat([found.xt - line.xt, found.velocity - line.velocity], 1)
        deviation.append(off.abs().max().item())
    assert agreement[0] < 1, "a wide bridge pairs otherwise, else nothing is tested"
    assert agreement[-1] == 1
    # |noise| < 5 and |d/dt sqrt(t (1 - t))| < 16 between the clips.
    assert deviation[-1] < 5 * 16 * 0.01 < 1 < deviation[0]


def test_a_wide_bridge_trains_on_independent_pairs_and_noise():
    sigma, num, repeats, time = 1e3, 20, 300, 0.3
    x1 = data(num)
    flow = bridge(sigma, times=PointTimes(time))
    counts, ratios = np.zeros((num, num)), []
    for seed in range(repeats):
        noise = flow.source.sample_for(x1, generator(seed, "step"))
        x0 = flow.pairing.pairs(flow, x1, None, Batch(x1), generator(seed, "step")).x0
        chosen = (x0[:, None] == noise[None]).all(2)
        assert (chosen.sum(1) == 1).all()
        counts += chosen.T.numpy()
        ratios.append(((x0 - x1).square().sum() * num / torch.cdist(noise, x1).square().sum()).item())
    # Every data point draws each of the step's source points alike; the columns' sums are given.
    assert scipy.stats.chisquare(counts.ravel(), ddof=num - 1).pvalue > 1e-4
    assert np.mean(ratios) == pytest.approx(1, abs=5 * np.std(ratios) / math.sqrt(repeats))
    found = trained_on(flow, x1)
    t = found.t[0].item()
    assert t == pytest.approx(time, abs=1e-3)
    assert found.noise.abs().mean() > 0.5
    torch.testing.assert_close(found.xt / sigma, math.sqrt(t * (1 - t)) * found.noise, atol=0.01, rtol=0)
    rate = (1 - 2 * t) / (2 * math.sqrt(t * (1 - t)))
    torch.testing.assert_close(found.velocity / sigma, rate * found.noise, atol=0.01, rtol=0)


def slope(y: Tensor, x: Tensor) -> tuple[float, float]:
    """Least-squares slope through the origin, over all coordinates, and its standard error."""
    x, y = x.double().flatten(), y.double().flatten()
    found = (x @ y / (x @ x)).item()
    return found, math.sqrt((y - found * x).square().mean().item() / (x @ x).item())


@pytest.mark.parametrize("time", [0.2, 0.7])
def test_between_the_limits_gaussians_get_the_marginals_of_the_bridge(time: float):
    """Cross-covariance (sqrt(4 a^2 b^2 + sigma^4) - sigma^2) / 2 of the pairs; variance and drift of the path."""
    sigma, a, b, num = 0.7, 1.0, 1.5, 1000
    coupling = SchrodingerBridgeCoupling(sigma)
    steps = []
    for seed in range(3):
        x1 = b * torch.randn(num, 2, generator=generator(seed, "gaussian"))
        steps.append(trained_on(bridge(sigma, coupling=coupling, times=PointTimes(time)), x1, seed))
    x0, x1, xt, velocity = (torch.cat([getattr(s, name) for s in steps]) for name in ("x0", "x1", "xt", "velocity"))
    cross = (math.sqrt(4 * a**2 * b**2 + sigma**4) - sigma**2) / 2
    of_pairs, error = slope(x0, x1)
    assert of_pairs == pytest.approx(cross / b**2, abs=5 * error)
    t = steps[0].t[0].item()
    variance = (1 - t) ** 2 * a**2 + t**2 * b**2 + 2 * t * (1 - t) * cross + sigma**2 * t * (1 - t)
    # Covariance of x_t and its velocity: half the derivative of the variance.
    covariance = -(1 - t) * a**2 + t * b**2 + (1 - 2 * t) * cross + sigma**2 * (1 - 2 * t) / 2
    assert xt.square().mean().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / xt.numel()))
    drift, error = slope(velocity, xt)
    assert drift == pytest.approx(covariance / variance, abs=5 * error)


# ---- weights: the effective sample ------------------------------------------------------------------------


@given(seed=st.integers(0, 999), num=st.integers(2, 40), level=st.floats(-500, 500), step=st.floats(0.01, 20))
@settings(max_examples=30, deadline=None)
def test_the_effective_sample_is_whole_for_constant_weights_and_for_no_others(seed, num, level, step):
    constant = torch.full((num,), level, dtype=torch.float64)
    assert effective_share(constant).item() == pytest.approx(1, abs=1e-9)
    one = constant.clone()
    one[seed % num] += step
    rest = torch.randn(num, generator=generator(seed, "weights"), dtype=torch.float64)
    for log_weight in (one, constant + step * rest):
        found = effective_share(log_weight).item()
        assert 1 / num - 1e-12 <= found < 1
        w = np.exp(log_weight.numpy() - log_weight.max().item())
        assert found == pytest.approx(1 / (1 + w.var() / w.mean() ** 2), rel=1e-9)


# ---- learned fields: no path is cheaper than optimal transport --------------------------------------------


@pytest.fixture(scope="module", params=[slow("cfm"), "ot_cfm"])
def learned(request) -> tuple[str, FlowMatching]:
    flow = matching(OTCFM if request.param == "ot_cfm" else FlowMatching)
    before = [p.detach().clone() for p in flow.parameters()]
    train(flow, get_density("eight_gaussians").sample, 300)
    assert all(not torch.equal(p, q) for p, q in zip(before, flow.parameters(), strict=True))
    return request.param, flow


def w2_squared(x: Tensor, y: Tensor) -> float:
    cost = ot.dist(x.double().numpy(), y.double().numpy())
    return ot.emd2([], [], cost, numItermax=10_000_000)


def paths_of(flow: FlowMatching, num: int):
    """Ends and geometry of the learned ODE's solutions, averaged weights."""
    with flow.evaluating("ema"):
        path = flow.trajectory(flow.draw_noise(torch.arange(num), 0), None, 65)
    return path.states[0], path.states[-1], path_geometry(path.states, path.velocities, path.times)


@pytest.mark.slow
def test_a_learned_flow_spends_at_least_the_transport_cost_between_its_ends(learned):
    """Benamou-Brenier on the points themselves: their own map is one of the couplings, so nothing is left to chance."""
    name, flow = learned
    start, end, geometry = paths_of(flow, 1000)
    energy, displacement = geometry.path_energy.mean().item(), geometry.displacement.mean().item()
    least = w2_squared(start, end)
    assert least > 5
    assert least <= displacement * (1 + 1e-6)
    assert displacement <= energy * (1 + 1e-6)
    # Pairs of optimal transport nearly reach the bound, independent ones do not.
    assert (energy < 1.05 * least) == (name == "ot_cfm")


@pytest.mark.slow
def test_a_learned_flow_spends_at_least_the_reference_less_the_error_of_its_samples(learned):
    """W2(source, data) <= W2(source, samples) + W2(samples, data), and the path energy bounds the first of these."""
    _, flow = learned
    _, end, geometry = paths_of(flow, 2000)
    energy = geometry.path_energy
    # Between finite samples W2 is too large on average, which widens the allowance.
    density = get_density("eight_gaussians")
    error = math.sqrt(w2_squared(end, density.sample(2000, generator(1, "fresh"))))
    reference = reference_transport(STANDARD_NORMAL, density.spec)
    monte_carlo = 4 * energy.std().item() / math.sqrt(len(energy))
    assert error < 1.0, "no bound where the samples are far from the data"
    assert math.sqrt(energy.mean().item() + monte_carlo) >= math.sqrt(reference.w2_squared) - error
