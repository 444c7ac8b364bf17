from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.integrate
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.core.seeds import generator
from flowbench.metrics import (
    PathEnergySplit,
    PathGeometry,
    block_geometry,
    normalized_path_energy,
    path_geometry,
)


def normal(*shape, name="z"):
    return torch.randn(*shape, generator=generator(2, name), dtype=torch.float64)


def rk4(field, z, times):
    """States and velocities on the grid, by classical Runge-Kutta written for this test."""
    states, velocities = [z], [field(times[0], z)]
    for t, after in pairwise(times):
        h = after - t
        k1 = velocities[-1]
        k2 = field(t + h / 2, z + h / 2 * k1)
        k3 = field(t + h / 2, z + h / 2 * k2)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + field(after, z + h * k3))
        states.append(z)
        velocities.append(field(after, z))
    return torch.stack(states), torch.stack(velocities)


def integrate(field, z, num=100):
    times = torch.linspace(0, 1, num + 1, dtype=torch.float64)
    return path_geometry(*rk4(field, z, times), times)


def independent_field(a, b, m):
    """Marginal field of independent coupling, N(0, a^2) to N(m, b^2), linear path."""

    def field(t, x):
        variance = (1 - t) ** 2 * a**2 + t**2 * b**2
        return m + (t * b**2 - (1 - t) * a**2) / variance * (x - t * m)

    return field


def assert_invariants(g):
    torch.testing.assert_close(g.path_energy, g.straightness + g.displacement, rtol=1e-9, atol=1e-12)
    slack = 1 + 1e-12
    assert (g.path_energy.sqrt() * slack >= g.length).all()
    assert (g.length * slack >= g.displacement.sqrt()).all()
    assert (g.path_length_ratio * slack >= 1).all()
    assert (g.straightness >= 0).all()
    if g.curvature is not None:
        # Wirtinger: a velocity that deviates from its mean must bend; and v(0) is at most that far from the mean.
        assert (g.curvature * slack >= math.pi**2 * g.straightness - 1e-12).all()
        assert (g.one_step_error <= g.curvature / 3 * slack + 1e-12).all()


@pytest.mark.parametrize(("a", "b", "d"), [(1.0, 1.0, 3), (1.0, 0.3, 5), (2.0, 0.5, 2)])
def test_golden_independent_gaussian(a, b, d):
    # Per path, S = a b (2 - pi / 2) |zeta|^2 with Z_0 = a zeta: exact sample by sample, no Monte Carlo error.
    zeta = normal(256, d)
    m = torch.linspace(-1, 2, d, dtype=torch.float64)
    g = integrate(independent_field(a, b, m), a * zeta)
    norm = zeta.square().sum(dim=1)
    torch.testing.assert_close(g.straightness, a * b * (2 - math.pi / 2) * norm, rtol=2e-5, atol=1e-6)
    displacement = (m + (b - a) * zeta).square().sum(dim=1)
    torch.testing.assert_close(g.displacement, displacement, rtol=1e-5, atol=1e-7)
    assert g.defect.max() < 0.01
    assert_invariants(g)
    # Averaged over N(0, I): S = 0.4292 d a b.
    ratio = g.mean()["straightness"] / float(norm.mean())
    assert ratio == pytest.approx(0.4292 * a * b, rel=1e-3)


def test_golden_variance_preserving_shift():
    # Deterministic coupling, mean moves as sin(pi t / 2) m: S = (pi^2 / 8 - 1) |m|^2.
    m = torch.tensor([1.0, -2.0], dtype=torch.float64)
    g = integrate(lambda t, x: math.pi / 2 * torch.cos(math.pi / 2 * t) * m.expand_as(x), normal(8, 2))
    expected = torch.full((8,), 0.2337005501 * 5, dtype=torch.float64)
    torch.testing.assert_close(g.straightness, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(g.path_length_ratio, torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(g.curvature, torch.full_like(expected, (math.pi / 2) ** 4 / 2 * 5), rtol=1e-7, atol=0)
    one_step = torch.full_like(expected, (math.pi / 2 - 1) ** 2 * 5)
    torch.testing.assert_close(g.one_step_error, one_step, rtol=1e-7, atol=0)
    assert_invariants(g)


def test_golden_optimal_transport_field_is_straight():
    root = normal(4, 4, name="A")
    target = root @ root.T / 4 + 0.2 * torch.eye(4, dtype=torch.float64)  # OT map of N(0, I): symmetric root
    eye, m = torch.eye(4, dtype=torch.float64), normal(4, name="m")

    def field(t, x):
        return m + (x - t * m) @ torch.linalg.inv((1 - t) * eye + t * target) @ (target - eye)

    z = normal(50, 4)
    g = integrate(field, z)
    assert g.straightness.max() < 1e-10
    assert g.curvature.max() < 1e-8
    assert g.one_step_error.max() < 1e-10
    torch.testing.assert_close(g.path_energy, (z @ target + m - z).square().sum(dim=1), rtol=1e-7, atol=0)
    assert normalized_path_energy(g.mean()["path_energy"], g.mean()["displacement"]) == pytest.approx(0, abs=1e-9)


def test_golden_rotation_has_the_circles_length():
    # A half turn of radius r: length pi r, PE = pi^2 r^2, |Z_1 - Z_0| = 2 r.
    spin = math.pi * torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    z = normal(20, 2)
    g = integrate(lambda t, x: x @ spin, z)
    r = z.norm(dim=1)
    torch.testing.assert_close(g.length, math.pi * r, rtol=1e-6, atol=0)
    torch.testing.assert_close(g.path_energy, (math.pi * r) ** 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        g.path_length_ratio, torch.full((20,), math.pi / 2, dtype=torch.float64), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(g.straightness, (math.pi**2 - 4) * r**2, rtol=1e-6, atol=0)
    torch.testing.assert_close(g.curvature, math.pi**4 * r**2, rtol=1e-6, atol=0)
    # One Euler step goes pi r along the tangent, the end is 2 r across.
    torch.testing.assert_close(g.one_step_error, (math.pi**2 + 4) * r**2, rtol=1e-6, atol=0)


def exact_curvature(field, solution, num=200):
    """Integral of |d_t v + J v|^2 along known states, by automatic differentiation and Gauss-Legendre nodes."""
    nodes, weights = np.polynomial.legendre.leggauss(num)
    total = 0.0
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        t = torch.tensor(node, dtype=torch.float64)
        x = solution(t)
        _, acceleration = torch.func.jvp(field, (t, x), (torch.ones_like(t), field(t, x)))
        total = total + weight * acceleration.square().sum(dim=1)
    return total


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (1.0, 0.4)])
def test_curvature_converges_to_the_derivative_of_the_field(a, b):
    m = torch.tensor([1.0, -0.5], dtype=torch.float64)
    field, zeta = independent_field(a, b, m), normal(12, 2)

    def solution(t):  # the affine field carries N(0, a^2) along its own standard deviation
        return t * m + ((1 - t) ** 2 * a**2 + t**2 * b**2).sqrt() * zeta

    exact = exact_curvature(field, solution)
    # By hand: Z_t'' = s'' zeta with s'' = a^2 b^2 / s^3.
    by_hand, _ = scipy.integrate.quad(lambda t: a**4 * b**4 / ((1 - t) ** 2 * a**2 + t**2 * b**2) ** 3, 0, 1)
    torch.testing.assert_close(exact, by_hand * zeta.square().sum(dim=1), rtol=1e-9, atol=0)
    fine, coarse = (integrate(field, a * zeta, num).curvature for num in (100, 50))
    torch.testing.assert_close(fine, exact, rtol=1e-4, atol=0)
    order = math.log2(float((coarse - exact).abs().max() / (fine - exact).abs().max()))
    assert 3.5 < order < 4.5
    # One Euler step from a zeta: v(0) = m - a zeta, so it ends at m, and the flow at m + b zeta.
    torch.testing.assert_close(integrate(field, a * zeta).one_step_error, b**2 * zeta.square().sum(dim=1))


def test_one_step_error_sees_the_start_alone():
    # v(t) = m (1 + sin 2 pi t): the first velocity is the mean one, so one step lands, though the path is not straight.
    m = torch.tensor([2.0, 1.0], dtype=torch.float64)
    g = integrate(lambda t, x: (1 + torch.sin(2 * math.pi * t)) * m.expand_as(x), normal(4, 2))
    assert g.one_step_error.max() < 1e-12
    torch.testing.assert_close(g.straightness, torch.full((4,), 2.5, dtype=torch.float64), rtol=1e-6, atol=0)


def test_fourth_order_in_the_time_step():
    z = normal(10, 2)
    exact = (2 - math.pi / 2) * z.square().sum(dim=1)
    zero = torch.zeros(2, dtype=torch.float64)
    errors = [
        float((integrate(independent_field(1.0, 1.0, zero), z, num).straightness - exact).abs().max())
        for num in (20, 40)
    ]
    assert 3.5 < math.log2(errors[0] / errors[1]) < 4.5


@settings(max_examples=20, deadline=None)
@given(
    steps=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=8),
    shape=st.sampled_from([(3,), (1, 2), (2, 2, 2)]),
    seed=st.integers(0, 999),
)
def test_identity_and_inequalities_hold_for_any_states_and_velocities(steps, shape, seed):
    states = normal(len(steps) + 1, 5, *shape, name=f"s{seed}")
    velocities = normal(len(steps) + 1, 5, *shape, name=f"v{seed}")
    times = torch.tensor([0.0, *steps], dtype=torch.float64).cumsum(0) - 0.3
    assert_invariants(path_geometry(states, velocities, times))
    assert_invariants(block_geometry(states))
    assert_invariants(block_geometry(states, times))


def test_the_interval_is_rescaled_and_may_run_backward():
    z, m = normal(6, 2), torch.ones(2, dtype=torch.float64)
    times = torch.linspace(0, 1, 41, dtype=torch.float64)
    states, velocities = rk4(independent_field(1.0, 0.5, m), z, times)
    expected = path_geometry(states, velocities, times)
    for other in (
        path_geometry(states, velocities / 10, 10 * times + 3),
        path_geometry(states.flip(0), velocities.flip(0), times.flip(0)),
    ):
        torch.testing.assert_close(other.straightness, expected.straightness)
        torch.testing.assert_close(other.length, expected.length)
        torch.testing.assert_close(other.defect, expected.defect)
        torch.testing.assert_close(other.curvature, expected.curvature)
    torch.testing.assert_close(
        path_geometry(states, velocities / 10, 10 * times + 3).one_step_error, expected.one_step_error
    )


def test_defect_finds_foreign_velocities():
    z, m = normal(6, 2), torch.ones(2, dtype=torch.float64)
    times = torch.linspace(0, 1, 101, dtype=torch.float64)
    states, velocities = rk4(independent_field(1.0, 0.5, m), z, times)
    assert path_geometry(states, velocities, times).defect.max() < 1e-3
    assert path_geometry(states, -velocities, times).defect.min() > 0.5


def test_blocks_match_hand_computed_segments():
    # Two blocks: (0,0) -> (3,4) -> (3,0): lengths 5 and 4, velocities 2 * segment, Z_1 - Z_0 = (3, 0).
    states = torch.tensor([[[0.0, 0.0]], [[3.0, 4.0]], [[3.0, 0.0]]])
    g = block_geometry(states)
    assert g.length.item() == pytest.approx(9.0)
    assert g.path_energy.item() == pytest.approx((100 + 64) / 2)
    assert g.straightness.item() == pytest.approx(82 - 9)
    assert g.displacement.item() == pytest.approx(9.0)
    assert g.path_length_ratio.item() == pytest.approx(3.0)
    assert g.defect.item() == 0
    straight = block_geometry(torch.linspace(0, 1, 5)[:, None, None].expand(5, 3, 2))
    assert straight.straightness.abs().max() < 1e-12


def test_blocks_agree_with_a_fine_sampling_of_the_same_line():
    states = normal(4, 6, 3)
    fine = torch.cat(
        [
            states[k] + torch.linspace(0, 1, 101, dtype=torch.float64)[:-1, None, None] * (states[k + 1] - states[k])
            for k in range(3)
        ]
    )
    fine = torch.cat([fine, states[-1:]])
    coarse, dense = block_geometry(states), block_geometry(fine)
    torch.testing.assert_close(coarse.straightness, dense.straightness)
    torch.testing.assert_close(coarse.length, dense.length)


def test_euler_samplers_are_blocks_with_times():
    times = torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=torch.float64)
    z, field = normal(7, 2), independent_field(1.0, 0.5, torch.ones(2, dtype=torch.float64))
    states, energy = [z], torch.zeros(7, dtype=torch.float64)
    for t, h in zip(times[:-1], times.diff(), strict=True):
        v = field(t, states[-1])
        energy += h * v.square().sum(dim=1)
        states.append(states[-1] + h * v)
    torch.testing.assert_close(block_geometry(torch.stack(states), times).path_energy, energy)


def test_mean_of_ragged_parts_is_the_mean_of_all():
    states = normal(4, 11, 3)
    whole = block_geometry(states)
    parts = PathGeometry.concatenate([block_geometry(part) for part in states.split([5, 4, 2], dim=1)])
    assert parts.mean() == pytest.approx(whole.mean(), rel=1e-12)
    expected = float(whole.length.mean() / whole.displacement.sqrt().mean())
    assert whole.mean()["path_length_ratio"] == pytest.approx(expected)


def test_what_blocks_do_not_have_is_absent():
    blocks = block_geometry(normal(4, 5, 3))
    assert blocks.curvature is None
    assert blocks.one_step_error is None
    assert set(blocks.mean()) == {
        "straightness", "path_energy", "displacement", "length", "defect", "path_length_ratio",
    }  # fmt: skip
    times = torch.linspace(0, 1, 4, dtype=torch.float64)
    paths = path_geometry(normal(4, 5, 3), normal(4, 5, 3, name="v"), times)
    assert set(paths.mean()) - set(blocks.mean()) == {"curvature", "one_step_error"}
    whole = PathGeometry.concatenate([paths, paths])
    assert whole.mean() == pytest.approx(paths.mean())
    with pytest.raises(ValueError, match="cannot concatenate paths of continuous flows and of blocks"):
        PathGeometry.concatenate([paths, blocks])


def test_paths_that_do_not_move_or_return():
    still = block_geometry(torch.ones(3, 2, 2))
    assert still.path_length_ratio.tolist() == [1.0, 1.0]
    assert still.mean()["path_length_ratio"] == 1.0
    returning = block_geometry(torch.tensor([[[0.0]], [[1.0]], [[0.0]]]))
    assert returning.path_length_ratio.tolist() == [math.inf]
    assert returning.mean()["path_length_ratio"] == math.inf


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 10), st.floats(0, 10), st.floats(0.1, 10))
def test_normalized_path_energy_splits(s, displacement, w2):
    split = PathEnergySplit.of(s, displacement, w2)
    assert split.total == pytest.approx(normalized_path_energy(s + displacement, w2), abs=1e-9)
    assert split.curvature == pytest.approx(s / w2, abs=1e-9)


def test_normalized_path_energy_is_signed_and_refuses_no_transport():
    assert normalized_path_energy(1.0, 2.0) == -0.5
    for w2 in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"w2_squared must be a number in \(0, .*, got"):
            normalized_path_energy(1.0, w2)


@pytest.mark.parametrize(
    ("states", "velocities", "times", "message"),
    [
        (torch.zeros(3, 2, 2), torch.zeros(2, 2, 2), torch.arange(3.0), "velocities have shape"),
        (torch.zeros(3, 2, 2), torch.zeros(3, 2, 2), torch.arange(4.0), r"times must have shape \(3,\)"),
        (torch.zeros(3, 2, 2), torch.zeros(3, 2, 2), torch.tensor([0.0, 1.0, 1.0]), "strictly monotone"),
        (
            torch.zeros(3, 2, 2),
            torch.zeros(3, 2, 2),
            torch.tensor([0.0, torch.nan, 1.0]),
            "strictly monotone",
        ),
        (torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), torch.arange(1.0), "T >= 2|strictly"),
        (torch.full((2, 2, 2), torch.nan), torch.zeros(2, 2, 2), torch.arange(2.0), "states hold NaN"),
    ],
)
def test_users_mistakes_cost_one_line(states, velocities, times, message):
    with pytest.raises(ValueError, match=message) as error:
        path_geometry(states, velocities, times)
    assert "\n" not in str(error.value)
