"""Tilts of the marginals and the decomposition of the transport cost, against closed forms and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.core.seeds import generator
from flowbench.flows import GibbsWeight, UniformWeight, Weight, transport_decomposition

seeds = st.integers(0, 999)
kinds = pytest.mark.parametrize("cost", ["norm", "squared"])


def pairs(seed: int, num: int = 20, dim: int = 3):
    rng = generator(seed, "pairs")
    return torch.randn(num, dim, generator=rng), 1 + torch.randn(num, dim, generator=rng)


def test_gaussian_tilt_follows_the_closed_form():
    """Per coordinate, squared cost: weighted variances and covariance of N(0, a^2) x N(0, b^2)."""
    a, b, eps, num = 1.0, 1.5, 2.0, 400_000
    noise = torch.randn(2, num, 1, generator=generator(0, "tilt"), dtype=torch.float64)
    x, y = a * noise[0], b * noise[1]
    w = GibbsWeight(eps, "squared", "batch")(x, y).weight[:, None]  # d = 1: epsilon = kappa
    denominator = eps + 2 * a**2 + 2 * b**2
    assert (w * y * y).mean().item() == pytest.approx(b**2 * (eps + 2 * a**2) / denominator, rel=0.02)
    assert (w * x * x).mean().item() == pytest.approx(a**2 * (eps + 2 * b**2) / denominator, rel=0.02)
    assert (w * x * y).mean().item() == pytest.approx(2 * a**2 * b**2 / denominator, rel=0.02)


def test_correlation_is_paid_with_variance():
    """With a = b = 1: variance lost delta = 2 / (eps + 4), correlation gained delta / (1 - delta)."""
    noise = torch.randn(2, 400_000, 1, generator=generator(1, "tilt"), dtype=torch.float64)
    w = GibbsWeight(2.0, "squared", "batch")(noise[0], noise[1]).weight[:, None]
    variance, covariance = (w * noise[1] ** 2).mean().item(), (w * noise[0] * noise[1]).mean().item()
    delta = 2 / (2.0 + 4)
    assert 1 - variance == pytest.approx(delta, abs=0.01)
    assert covariance / variance == pytest.approx(delta / (1 - delta), abs=0.02)


def test_a_centred_ring_is_not_tilted_and_a_shifted_one_is():
    rng = generator(0, "ring")
    x0 = torch.randn(4000, 2, generator=rng)
    angle = 2 * math.pi * torch.rand(500, generator=rng)
    ring = 5 * torch.stack([angle.cos(), angle.sin()], 1)
    assert transport_decomposition(GibbsWeight(epsilon=2.0), x0, ring).tilt_target < 0.02
    assert transport_decomposition(GibbsWeight(epsilon=2.0), x0, ring + 2.5).tilt_target > 0.3


# ---- decomposition ------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("transport", ["norm", "squared"])
@given(seed=seeds, epsilon=st.floats(0.3, 20), chunk=st.integers(1, 25), dim=st.sampled_from([1, 3, 40]))
@settings(max_examples=15, deadline=None)
def test_decomposition_equals_brute_force(cost, transport, seed, epsilon, chunk, dim):
    x0, x1 = (x.double().numpy() for x in pairs(seed, dim=dim))
    x1 = x1[:15]
    distance = np.sqrt(((x0[:, None] - x1) ** 2).sum(-1))
    log_weight = -(distance if cost == "norm" else distance**2) / epsilon
    w = np.exp(log_weight - log_weight.max())
    t = distance if transport == "norm" else distance**2
    f, g = w.sum(1), w.sum(0)
    weight = GibbsWeight(epsilon=epsilon, cost=cost)
    found = transport_decomposition(
        weight, torch.from_numpy(x0), torch.from_numpy(x1), transport_cost=transport, chunk=chunk
    )
    tilted = f[:, None] * g
    assert found.independent == pytest.approx(t.mean())
    assert found.weighted == pytest.approx((w * t).sum() / w.sum())
    assert found.tilt_only == pytest.approx((tilted * t).sum() / tilted.sum())
    assert found.tilt_share == pytest.approx((t.mean() - found.tilt_only) / (t.mean() - found.weighted), rel=1e-5)
    assert found.ess == pytest.approx(w.sum() ** 2 / (w.size * (w**2).sum()))
    assert found.tilt_source == pytest.approx(f.var() / f.mean() ** 2, rel=1e-6, abs=1e-12)
    assert found.tilt_target == pytest.approx(g.var() / g.mean() ** 2, rel=1e-6, abs=1e-12)
    norm = np.linalg.norm(x1, axis=1)
    assert found.weighted_norm_ratio == pytest.approx((g * norm).sum() / g.sum() / norm.mean())
    parts = log_weight.mean(1, keepdims=True), log_weight.mean(0)
    assert found.sd_source == pytest.approx(parts[0].std(), rel=1e-6)
    assert found.sd_target == pytest.approx(parts[1].std(), rel=1e-6)
    assert found.sd_interaction == pytest.approx((log_weight - parts[0] - parts[1]).std(), rel=1e-5)


def test_decomposition_of_gaussians_follows_the_closed_form():
    """Squared cost on a line: tilted variances a'^2 and b'^2, covariance c, mean cost a'^2 + b'^2 - 2 c."""
    a, b, eps = 1.0, 1.5, 2.0
    quantiles = torch.special.ndtri((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)[:, None]
    found = transport_decomposition(GibbsWeight(epsilon=eps, cost="squared"), a * quantiles, b * quantiles)
    denominator = eps + 2 * a**2 + 2 * b**2
    tilted = (a**2 * (eps + 2 * b**2) + b**2 * (eps + 2 * a**2)) / denominator
    coupled = tilted - 4 * a**2 * b**2 / denominator
    assert found.independent == pytest.approx(a**2 + b**2, rel=0.003)
    assert found.tilt_only == pytest.approx(tilted, rel=0.003)
    assert found.weighted == pytest.approx(coupled, rel=0.003)
    assert found.tilt_share == pytest.approx((a**2 + b**2 - tilted) / (a**2 + b**2 - coupled), rel=0.003)


def ring(num: int, shift: float, rng: torch.Generator) -> torch.Tensor:
    angle = torch.randint(8, (num,), generator=rng) * math.pi / 4
    points = 5 * torch.stack([angle.cos(), angle.sin()], 1) + 0.2 * torch.randn(num, 2, generator=rng)
    return points + torch.tensor([shift, 0.0])


@pytest.mark.parametrize(
    ("shift", "epsilon", "costs", "ess", "tilt_target"),
    [
        (0.0, 1.0, (27.1, 26.9, 17.5), 0.36, None),
        (0.0, 5.0, (27.1, 26.9, 25.0), 0.96, None),
        (2.5, 1.0, (32.7, 12.0, 7.8), 0.16, 1.98),
        (2.5, 2.0, (32.7, 19.3, 15.7), 0.48, 0.67),
        (2.5, 5.0, (32.7, 26.6, 24.9), 0.86, 0.12),
    ],
)
def test_a_centred_ring_is_coupled_and_a_shifted_one_is_tilted(shift, epsilon, costs, ess, tilt_target):
    """Mean squared costs, independent -> tilt only -> weighted, of an independent computation in NumPy."""
    rng = generator(0, "ring")
    points = torch.randn(1500, 2, generator=rng), ring(1500, shift, rng)
    found = transport_decomposition(GibbsWeight(epsilon=epsilon), *points)
    assert (found.independent, found.tilt_only, found.weighted) == pytest.approx(costs, rel=0.05)
    assert found.ess == pytest.approx(ess, abs=0.03)
    if tilt_target is not None:
        assert found.tilt_target == pytest.approx(tilt_target, rel=0.1)
    assert (abs(found.tilt_share) < 0.1) if shift == 0 else (0.7 < found.tilt_share < 0.9)


def images(num: int, dim: int, rng: torch.Generator) -> torch.Tensor:
    """Uniform directions of log-normal energy |y|^2 (log-sd 0.5), root mean square 0.5 per coordinate."""
    direction = torch.randn(num, dim, generator=rng)
    energy = torch.exp(0.5 * torch.randn(num, 1, generator=rng))
    points = direction / direction.norm(dim=1, keepdim=True) * energy.sqrt()
    return 0.5 * points / points.square().mean().sqrt()


@pytest.mark.parametrize(
    ("dim", "num", "share"), [(2, 2000, 0.63), (64, 1500, 0.77), (1024, 600, 0.95), (3072, 400, 0.98)]
)
def test_the_share_of_the_tilt_rises_with_the_dimension(dim, num, share):
    """At the paper's kappa = 5 / sqrt(3072) a synthetic set of images is nearly only re-weighted."""
    rng = generator(0, "images")
    weight = GibbsWeight(kappa=5 / math.sqrt(3072))
    found = transport_decomposition(weight, torch.randn(num, dim, generator=rng), images(num, dim, rng))
    assert found.tilt_share == pytest.approx(share, abs=0.02)
    if dim == 3072:
        assert found.sd_target == pytest.approx(0.64, rel=0.1)
        assert found.sd_source == pytest.approx(0.14, rel=0.2)
        assert found.sd_interaction == pytest.approx(0.087, rel=0.1)
        assert found.ess == pytest.approx(0.80, abs=0.03)


def test_equal_points_leave_no_drop_to_share_out():
    found = transport_decomposition(GibbsWeight(epsilon=1.0), torch.ones(4, 3), torch.zeros(5, 3))
    assert math.isnan(found.tilt_share)
    assert found.ess == pytest.approx(1)
    assert max(found.tilt_source, found.tilt_target) < 1e-12
    assert found.independent == pytest.approx(3)


class OneByOne(Weight):
    """A Gibbs weight that knows pairs only."""

    def forward(self, x0: torch.Tensor, x1: torch.Tensor):
        return GibbsWeight(epsilon=2.0)(x0, x1)

    def log_weight(self, x0: torch.Tensor, x1: torch.Tensor):
        return GibbsWeight(epsilon=2.0).log_weight(x0, x1)


@pytest.mark.parametrize("correction", ["none", "target", "source", "mixed", "tilt-only"])
@pytest.mark.parametrize("isotropic", [True, False])
def test_the_matrix_of_a_weight_holds_the_weights_of_its_pairs(correction, isotropic):
    x0, x1 = (x.view(-1, 1, 3) for x in pairs(0))
    x1 = x1[:7]
    weight = GibbsWeight(epsilon=2.0, correction=correction)
    weight.fit(x0, x1, generator(0, "fit"), isotropic)
    matrix = weight.log_weight_matrix(x0, x1)
    torch.testing.assert_close(matrix, Weight.log_weight_matrix(weight, x0, x1))
    for row, point in zip(matrix, x0, strict=True):
        torch.testing.assert_close(row, weight.log_weight(point.expand_as(x1), x1))


def test_any_weight_has_a_decomposition():
    x0, x1 = pairs(0)
    known = transport_decomposition(GibbsWeight(epsilon=2.0), x0, x1)
    assert transport_decomposition(OneByOne(), x0, x1).tilt_share == pytest.approx(known.tilt_share, rel=1e-6)
    uniform = transport_decomposition(UniformWeight(), x0, x1)
    assert uniform.ess == pytest.approx(1)
    assert math.isnan(uniform.tilt_share)
    weight = GibbsWeight(epsilon=2.0, correction="tilt-only")
    weight.fit(x0, x1, generator(0, "fit"), False)
    assert transport_decomposition(weight, x0, x1).tilt_share == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": GibbsWeight(epsilon="elbow")}, "is chosen on data"),
        ({"transport_cost": "l1"}, "transport_cost must be"),
        ({"chunk": 0}, "chunk must be a whole number in"),
        ({"x1": torch.zeros(3, 4)}, "points of one shape"),
        ({"x1": torch.zeros(0, 2)}, "non-empty"),
        ({"x1": torch.full((3, 2), math.nan)}, "not finite"),
    ],
)
def test_a_decomposition_refuses_what_it_cannot_use(change, message):
    arguments = {"x0": torch.zeros(3, 2), "x1": torch.ones(3, 2), "weight": GibbsWeight(epsilon=1.0), **change}
    with pytest.raises(ValueError, match=message):
        transport_decomposition(**arguments)


# ---- what the tilt does to a flow ---------------------------------------------------------------------------


@pytest.mark.parametrize("correction", ["none", "target", "tilt-only"])
def test_the_best_velocity_of_two_times_two_points_is_the_enumerated_one(correction):
    """Paths 0 -> 3 and 1 -> 2 meet at t = 1/2: there the best velocity is the weighted mean of 3 and 1."""
    ends, epsilon = np.array([[0.0, 2.0], [0.0, 3.0], [1.0, 2.0], [1.0, 3.0]]), 1.3
    kernel = np.exp(-np.abs(ends[:, 1] - ends[:, 0]) / epsilon)
    f = {x: kernel[ends[:, 0] == x].mean() for x in (0.0, 1.0)}
    g = {y: kernel[ends[:, 1] == y].mean() for y in (2.0, 3.0)}
    weights = {
        "none": kernel,
        "target": np.array([k / g[y] for k, (_, y) in zip(kernel, ends, strict=True)]),
        "tilt-only": np.array([f[x] * g[y] for x, y in ends]),
    }[correction]
    expected = {1.0: 2.0, 2.0: 2.0, 1.5: (weights[1] * 3 + weights[2] * 1) / (weights[1] + weights[2])}
    pairs_ = torch.from_numpy(ends)[torch.randint(4, (4000,), generator=generator(0, "draw"))]
    x0, x1 = pairs_[:, :1], pairs_[:, 1:]
    weight = GibbsWeight(epsilon=epsilon, correction=correction)
    weight.fit(torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]]), generator(0, "fit"), False)
    result, middle = weight(x0, x1).weight, ((x0 + x1) / 2).squeeze(1)
    for place, velocity in expected.items():
        here = middle == place
        learned = (result * (x1 - x0).squeeze(1))[here].sum() / result[here].sum()
        assert learned.item() == pytest.approx(velocity, abs=0.05)


def test_a_weighted_flow_shrinks_the_variance_by_the_golden_value():
    """Squared cost, N(0, a^2) -> N(0, b^2): the best field is linear, v = Cov(y - x, x_t) / Var(x_t) x.

    It carries the tilted source to the tilted data, so from the untilted source the samples' variance is
    a^2 Var~(y) / Var~(x) = b^2 (eps + 2 a^2) / (eps + 2 b^2): 1.6 in place of 4 for a = 1, b = 2, eps = 2.
    """
    a, b, eps = 1.0, 2.0, 2.0
    noise = torch.randn(2, 200_000, 1, generator=generator(0, "shrinkage"), dtype=torch.float64)
    x, y = a * noise[0], b * noise[1]
    w = GibbsWeight(epsilon=eps, cost="squared")(x, y).weight[:, None]
    steps, scale = 50, 1.0
    for t in (np.arange(steps) + 0.5) / steps:
        xt = (1 - t) * x + t * y
        slope = ((w * (y - x) * xt).sum() / (w * xt * xt).sum()).item()
        scale *= math.exp(slope / steps)
    assert (a * scale) ** 2 == pytest.approx(b**2 * (eps + 2 * a**2) / (eps + 2 * b**2), rel=0.02)
