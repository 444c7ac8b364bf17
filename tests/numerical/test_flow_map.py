"""Flow maps against closed forms: the maps themselves, residuals of the objectives, derivatives and samplers."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowbench.families.average_velocity import AverageVelocityNetwork
from flowbench.families.conditioning.condition import Condition
from flowbench.families.family_contract import perturb
from flowbench.flows import (
    BothWays,
    Composition,
    ConsistencyTraining,
    DyadicPairs,
    GaussianSource,
    JumpBatch,
    JumpsToData,
    Lagrangian,
    LogitNormalPairs,
    LogitNormalTimes,
    MeanFlow,
    Progressive,
    Renoise,
    RungeKutta4,
    Shortcut,
    SolutionConsistency,
    UniformPairs,
    jumped,
)
from flowbench.flows.flow_map.derivative import forward_derivative, total_derivative
from flowbench.flows.flow_map.times import SHORTEST
from flowbench.networks import MLP, DiT, UNet

from .flow_map_oracles import GOLDEN, GOLDEN_MIXTURE, GaussianMap, MixtureMap

ORACLE = GaussianMap()
# What has no residual at the true map, up to rounding.
EXACT = [
    Progressive(),
    Progressive(split="uniform"),
    Lagrangian(derivative="jvp"),
    MeanFlow(),
    MeanFlow(tangent="self"),
]
EVERY = [
    *EXACT,
    Shortcut(),
    Lagrangian(),
    MeanFlow(derivative="difference"),
    SolutionConsistency(),
    ConsistencyTraining(),
]


def batch(objective, num=400, dtype=torch.float64, seed=0, progress=0.0, teacher=None) -> JumpBatch:
    """Points of the oracle's path with its velocities, where the objective jumps."""
    rng = torch.Generator().manual_seed(seed)
    start, end = (t.to(dtype) for t in objective.default_times.sample(num, rng))
    start = torch.minimum(start, end - 0.01).clamp(min=0) if isinstance(objective, Progressive) else start
    end = torch.maximum(end, start + 0.01) if isinstance(objective, Progressive) else end
    x = ORACLE.deviation(start)[:, None] * torch.randn(num, 2, generator=rng, dtype=dtype) + 2 * start[:, None]
    return JumpBatch(x, start, end, ORACLE.velocity(x, start), teacher, progress, rng)


def residual(objective, found: JumpBatch):
    predicted = tuple(ORACLE(found.x, found.start, end) for end in objective.ends(found))
    return objective.residual(ORACLE, found, predicted)


# ---- the maps ------------------------------------------------------------------------------


@pytest.mark.parametrize(("oracle", "golden"), [(ORACLE, GOLDEN), (MixtureMap(), GOLDEN_MIXTURE)])
def test_golden_values(oracle, golden):
    s, t, x = torch.tensor(list(golden), dtype=torch.float64).unbind(1)
    x, expected = x[:, None], torch.tensor(list(golden.values()), dtype=torch.float64)
    end, velocity = jumped(oracle, x, s, t), oracle.velocity(x, s)
    found = [end, velocity] if oracle is not ORACLE else [end, oracle(x, s, t), velocity, oracle.velocity(end, t)]
    assert (torch.cat(found, 1) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("oracle", [ORACLE, MixtureMap()])
def test_the_maps_are_those_of_their_velocities(oracle):
    x = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[:, None]
    for s, t in ((0.0, 1.0), (0.2, 0.7), (0.9, 0.1)):
        times = torch.tensor([s, t], dtype=torch.float64)
        solved = RungeKutta4(400).solve(lambda at, y: oracle.velocity(y, at.expand(len(y))), x, times).states[-1]
        first, last = (torch.full((len(x),), value, dtype=torch.float64) for value in (s, t))
        assert (jumped(oracle, x, first, last) - solved).abs().max() < 1e-7
        there = jumped(oracle, jumped(oracle, x, first, last), last, first)
        assert (there - x).abs().max() < 1e-9


def test_the_map_to_the_same_time_is_the_identity_to_the_bit():
    for network in (MLP((2,), None, width=16, second_time=True), MLP((2,), None, width=16, second_time=True).double()):
        perturb(network, std=0.5)
        u = AverageVelocityNetwork(network, Condition(), training=False)
        rng = torch.Generator().manual_seed(0)
        x, t = torch.randn(9, 2, generator=rng), torch.rand(9, generator=rng)
        x, t = x.to(network.input.weight), t.to(network.input.weight)
        assert torch.equal(jumped(u, x, t, t), x)


# ---- residuals ------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", EXACT, ids=repr)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_residuals_vanish_at_the_map(objective, dtype, tolerance):
    assert residual(objective, batch(objective, dtype=dtype)).abs().max() < tolerance


def test_shortcuts_vanish_at_the_map_but_for_the_euler_steps_of_the_shortest():
    objective = Shortcut(levels=4)
    found = batch(objective)
    off = residual(objective, found).abs().amax(1)
    shortest = found.length < 1.5 / 16
    assert off[~shortest].max() < 1e-12
    assert 1e-5 < off[shortest].max() < 0.2


@pytest.mark.parametrize(
    ("objective", "order"), [(SolutionConsistency, 1.0), (ConsistencyTraining, 1.5)], ids=["soflow", "consistency"]
)
def test_differences_along_the_path_vanish_with_their_length(objective, order):
    """SoFlow's quotient is of first order; two jumps differ by the second, over the root of the length."""
    sizes = []
    for share in (1e-2, 1e-3):
        made = objective(first=share, last=share)
        sizes.append(residual(made, batch(made)).square().mean().sqrt().item())
    assert math.log10(sizes[0] / sizes[1]) == pytest.approx(order, abs=0.1)


def test_the_share_falls_with_the_training():
    """A run that has come half way looks half way (geometrically) ahead."""
    objective = SolutionConsistency(first=1e-1, last=1e-3)
    sizes = [residual(objective, batch(objective, progress=p)).square().mean().sqrt().item() for p in (0.0, 0.5, 1.0)]
    assert [math.log10(a / b) for a, b in pairwise(sizes)] == pytest.approx([1, 1], abs=0.15)


@pytest.mark.parametrize("make", [lambda d: Lagrangian(derivative=d), lambda d: MeanFlow(derivative=d)])
def test_differences_are_near_derivatives(make):
    """The map of Gaussians is smooth: a step of 0.001 in time leaves errors of its square, at the ends of its size."""
    exact, difference = make("jvp"), make("difference")
    found = batch(exact)
    assert residual(difference, found).abs().max() < 1e-2
    inside = (found.start > 0.01) & (found.end < 0.99) & (found.length > 0.01)
    assert residual(difference, found)[inside].abs().max() < 1e-4


@pytest.mark.parametrize("objective", EVERY, ids=repr)
def test_targets_carry_no_gradient(objective):
    """Of constant predictions nothing is left to differentiate, but for a derivative that is taken by the objective."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    found = batch(objective, num=20)

    def u(x, s, t):
        return scale * ORACLE(x, s, t)

    predicted = tuple(u(found.x, found.start, end).detach() for end in objective.ends(found))
    by_itself = isinstance(objective, Lagrangian) and objective.derivative == "jvp"
    assert objective.residual(u, found, predicted).requires_grad == by_itself


def test_the_gradient_of_the_lagrangian_is_that_of_the_end_alone():
    """X and the velocity there are held: the gradient is that of d_t X for them as constants."""
    found, scale = batch(Lagrangian(), num=50), torch.tensor(1.1, dtype=torch.float64, requires_grad=True)

    def u(x, s, t):
        return scale * ORACLE(x, s, t)

    loss = Lagrangian(derivative="jvp").residual(u, found, ()).square().sum()
    (gradient,) = torch.autograd.grad(loss, scale)
    # d_t X = scale (u + (t - s) d_t u) and u is linear in the scale, so that d_t X' = d_t X / scale.
    with torch.no_grad():
        step = 1e-6
        ends = (found.end - step, found.end + step)
        low, high = (jumped(u, found.x, found.start, end) for end in ends)
        moving = (high - low) / (2 * step)
        arrived = jumped(u, found.x, found.start, found.end)
        expected = (2 * (moving - u(arrived, found.end, found.end)) * moving / 1.1).sum()
    assert gradient.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("objective", "bias"), [(MeanFlow(), 0.0), (MeanFlow(tangent="self"), 0.0), (SolutionConsistency(0.01, 0.01), 0.01)]
)
def test_targets_of_single_pairs_are_unbiased(objective, bias):
    """E[target | x_s] is the average velocity, within four standard errors; of SoFlow up to the order of its share."""
    num, rng = 200_000, torch.Generator().manual_seed(0)
    for s, t, at in ((0.2, 0.9, -0.3), (0.6, 1.0, 1.5)):
        start, end = (torch.full((num,), time, dtype=torch.float64) for time in (s, t))
        x = torch.full((num, 1), at, dtype=torch.float64)
        drawn = JumpBatch(x, start, end, ORACLE.draw_velocity(x, start, rng), None, 0.0, rng)
        predicted = (ORACLE(x, start, end),)
        off = objective.residual(ORACLE, drawn, predicted)
        assert abs(off.mean()) < 4 * off.std() / math.sqrt(num) + bias
    assert off.std() > 0.1  # the velocities of pairs do vary


def test_the_improved_tangent_has_another_spread_and_the_same_mean():
    """Its target deviates by v - b, the velocity of the pair from the mean; the original's by d_x X times as much."""
    num, rng = 50_000, torch.Generator().manual_seed(1)
    for s, t in ((0.2, 0.9), (0.1, 0.7)):
        start, end = (torch.full((num,), time, dtype=torch.float64) for time in (s, t))
        x = torch.full((num, 1), -0.3, dtype=torch.float64)
        drawn = JumpBatch(x, start, end, ORACLE.draw_velocity(x, start, rng), None, 0.0, rng)
        predicted = (ORACLE(x, start, end),)
        own, data = (MeanFlow(tangent=name).residual(ORACLE, drawn, predicted) for name in ("self", "data"))
        assert abs(own.mean() - data.mean()) < 4 * (own - data).std() / math.sqrt(num)
        ratio = (ORACLE.deviation(end[:1]) / ORACLE.deviation(start[:1])).item()
        assert abs(ratio - 1) > 0.1
        assert (data.std() / own.std()).item() == pytest.approx(ratio, rel=1e-6)
        expected = (drawn.velocity - ORACLE.velocity(x, start)).std()
        assert own.std().item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_teacher_moves_the_end_of_the_lagrangian():
    found = batch(Lagrangian(), num=20, teacher=lambda t, x: ORACLE.velocity(x, t) + 1)
    for derivative in ("jvp", "difference"):
        objective = Lagrangian(derivative=derivative)
        assert (residual(objective, found) + 1).abs().max() < 1e-2


def test_equal_times_make_mean_flow_the_error_of_the_velocity_to_the_bit():
    found = batch(MeanFlow())
    same = JumpBatch(found.x, found.start, found.start, found.velocity + 0.1, None, 0.0, found.generator)
    predicted = (ORACLE(same.x, same.start, same.start),)
    assert torch.equal(MeanFlow().residual(ORACLE, same, predicted), predicted[0] - same.velocity)


def test_weights_divide_by_a_power_of_the_error_without_gradient():
    off = torch.tensor([[1.0, 3.0], [0.1, 0.1]], requires_grad=True)
    error = MeanFlow(weight_power=1.0).error(off)
    torch.testing.assert_close(error, torch.tensor([5 / 5.001, 0.01 / 0.011]))
    (gradient,) = torch.autograd.grad(error.sum(), off)
    torch.testing.assert_close(gradient, off.detach() / torch.tensor([[5.001], [0.011]]))
    assert torch.equal(MeanFlow().error(off), off.square().mean(1))


# ---- derivatives ------------------------------------------------------------------------------

NETWORKS = {
    "mlp": lambda: MLP((2,), 3, width=16, depth=2, second_time=True),
    "dit": lambda: DiT((1, 4, 4), 3, width=16, depth=2, num_heads=2, second_time=True),
    "unet": lambda: UNet((1, 8, 8), 3, channels=8, num_res_blocks=1, num_heads=2, second_time=True),
}


def network_case(name, dtype=torch.float64):
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    perturb(network, std=0.1)
    network.to(dtype)
    x, w = torch.randn(2, 3, *network.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    start, end = torch.tensor([0.1, 0.3, 0.5], dtype=dtype), torch.tensor([0.9, 0.6, 1.0], dtype=dtype)
    return AverageVelocityNetwork(network, Condition(torch.tensor([0, 3, 1])), training=False), x, start, end, w


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_derivatives_are_limits_of_differences(name):
    u, x, start, end, w = network_case(name)
    step = 1e-6
    with torch.no_grad():
        high, low = (u(x + sign * step * w, start + sign * step, end) for sign in (1, -1))
        later, earlier = (u(x, start, end + sign * step) for sign in (1, -1))
    for found, expected in (
        (total_derivative(u, x, start, end, w, "jvp"), (high - low) / (2 * step)),
        (
            forward_derivative(lambda t: u(x, start, t), (end,), (torch.ones_like(end),))[1],
            (later - earlier) / (2 * step),
        ),
    ):
        assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
        assert expected.abs().max() > 0.1


@pytest.mark.parametrize("name", NETWORKS)
def test_differences_and_float32_are_near_the_derivative(name):
    u, x, start, end, w = network_case(name)
    exact = total_derivative(u, x, start, end, w, "jvp")
    by_difference = total_derivative(u, x, start, end, w, "difference")
    assert (by_difference - exact).abs().max() < 1e-2 * exact.abs().max()
    u, *single = network_case(name, torch.float32)
    found = total_derivative(u, *single, "jvp")
    assert (found.double() - exact).abs().max() < 1e-4 * exact.abs().max()


def test_differences_stay_between_time_zero_and_the_end():
    """Where the network is not trained nothing is asked of it."""
    seen = []

    def u(x, s, t):
        seen.append((s, t))
        return s[:, None] ** 2 * x

    x, start = torch.ones(3, 1, dtype=torch.float64), torch.tensor([0.0, 0.4, 0.9995], dtype=torch.float64)
    end = torch.tensor([1.0, 0.401, 1.0], dtype=torch.float64)
    found = total_derivative(u, x, start, end, torch.zeros_like(x), "difference")
    assert all(bool((s >= 0).all() and (s <= t).all()) for s, t in seen)
    torch.testing.assert_close(found[:, 0], 2 * start, atol=2e-3, rtol=0)


def test_the_context_is_needed_and_a_network_without_derivative_is_refused_in_one_line():
    u, x, start, end, w = network_case("dit", torch.float32)
    with pytest.raises(NotImplementedError), sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.no_grad():
        torch.func.jvp(lambda x: u(x, start, end), (x,), (w,))

    class Fused(nn.Module):
        def forward(self, x):
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return nn.functional.scaled_dot_product_attention(x, x, x)

    fused, rows = Fused(), torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="set derivative: difference") as error:
        forward_derivative(fused, (rows,), (rows,))
    assert "\n" not in str(error.value)


def test_autocast_is_off_in_derivatives():
    u, *case = network_case("mlp", torch.float32)
    for method in ("jvp", "difference"):
        exact = total_derivative(u, *case, method)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(total_derivative(u, *case, method), exact), method


def test_gradients_pass_through_a_forward_derivative():
    u, x, start, end, _ = network_case("mlp")
    _, change = forward_derivative(lambda t: u(x, start, t), (end,), (torch.ones_like(end),))
    change.square().sum().backward()
    found = u.network.embedding.length[0].weight.grad.clone()
    step = 1e-5
    u.network.zero_grad()
    ((u(x, start, end + step) - u(x, start, end - step)) / (2 * step)).square().sum().backward()
    expected = u.network.embedding.length[0].weight.grad
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


# ---- dropout ------------------------------------------------------------------------------


def test_evaluations_of_a_step_share_their_dropout_masks():
    network = UNet((1, 8, 8), None, channels=8, num_res_blocks=1, num_heads=2, dropout=0.5, second_time=True).train()
    perturb(network, std=0.1)
    x, start = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((3,), 0.3)
    u = AverageVelocityNetwork(network, Condition(), training=True)
    assert torch.equal(u(x, start, start), u(x, start, start))
    assert torch.equal(u(x, start, start), u.rows(slice(3))(x, start, start))
    another = AverageVelocityNetwork(network, Condition(), training=True)  # of the next step
    assert not torch.equal(u(x, start, start), another(x, start, start))


# ---- times ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "times",
    [UniformPairs(), LogitNormalPairs(), LogitNormalPairs(LogitNormalTimes(8.0), LogitNormalTimes(9.0)), JumpsToData()],
    ids=repr,
)
def test_jumps_go_forward_within_the_interval(times):
    start, end = times.sample(20_000, torch.Generator().manual_seed(0))
    assert start.min() >= 0
    assert end.max() <= 1
    assert (end - start).min() > 0.99 * SHORTEST
    assert start.dtype == end.dtype == torch.float32


def test_pairs_have_their_distributions():
    rng = torch.Generator().manual_seed(0)
    start, end = UniformPairs().sample(100_000, rng)
    # The smaller and the larger of two uniform numbers: means 1/3 and 2/3.
    assert start.mean().item() == pytest.approx(1 / 3, abs=0.005)
    assert end.mean().item() == pytest.approx(2 / 3, abs=0.005)
    start, end = DyadicPairs(levels=3).sample(100_000, rng)
    lengths = (end - start).unique(return_counts=True)
    assert lengths[0].tolist() == [1 / 8, 1 / 4, 1 / 2, 1]
    assert (lengths[1] / 100_000 - 1 / 4).abs().max() < 0.01
    assert torch.equal(start / (end - start), (start / (end - start)).round())
    assert start[end - start == 1 / 8].unique().tolist() == [number / 8 for number in range(8)]


@pytest.mark.parametrize(
    "times",
    [
        UniformPairs(),
        LogitNormalPairs(LogitNormalTimes(-2.0), LogitNormalTimes(2.0)),
        DyadicPairs(levels=3),
        JumpsToData(),
        BothWays(),
        BothWays(JumpsToData()),
    ],
    ids=repr,
)
def test_the_jumps_that_are_drawn_are_covered_and_others_are_far_from_them(times):
    drawn = torch.stack(times.sample(20_000, torch.Generator().manual_seed(0)), 1).double()
    for jump in (
        (0.0, 1.0),
        (0.25, 0.5),
        (0.25, 1.0),
        (0.0, 1 / 3),
        (0.3, 0.7),
        (0.3, 1.0),
        (0.25, 0.75),
        (0.5, 0.5625),
        (1.0, 0.0),
        (0.7, 0.3),
        (1.0, 0.3),
    ):
        nearest = (drawn - torch.tensor(jump, dtype=torch.float64)).abs().amax(1).min()
        assert times.covers(*jump) == bool(nearest < 0.03), jump


# ---- samplers ------------------------------------------------------------------------------


def oracle_jump(x, start, end):
    return jumped(ORACLE, x, *(torch.full((len(x),), time, dtype=x.dtype) for time in (start, end)))


def test_any_number_of_jumps_of_the_map_ends_at_the_same_point():
    noise = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = [Composition(number).sample(oracle_jump, noise, GaussianSource()) for number in (1, 2, 8)]
    for end in ends:
        assert (end - (2 + 0.5 * noise)).abs().max() < 1e-10


def test_renoised_samples_of_the_map_have_the_law_of_the_data():
    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    found = Renoise(num_jumps=3).sample(oracle_jump, noise, GaussianSource())
    assert found.mean().item() == pytest.approx(2, abs=4 * 0.5 / math.sqrt(20_000))
    assert found.std().item() == pytest.approx(0.5, abs=0.02)
    assert not torch.allclose(found, 2 + 0.5 * noise, atol=0.1)


def test_renoising_does_not_depend_on_the_batch_and_follows_the_seed():
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    whole = Renoise(num_jumps=4).sample(oracle_jump, noise, GaussianSource())
    parts = [Renoise(num_jumps=4).sample(oracle_jump, part, GaussianSource()) for part in noise.split(4)]
    torch.testing.assert_close(whole, torch.cat(parts), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(whole, Renoise(num_jumps=4, seed=1).sample(oracle_jump, noise, GaussianSource()))
    assert not torch.allclose(whole, Renoise(num_jumps=4).sample(oracle_jump, noise, GaussianSource(std=2.0)))


def test_shortcuts_know_their_grid():
    times = Shortcut(levels=5).default_times
    trained = [n for n in range(1, 70) if all(times.covers(*jump) for jump in Composition(n).intervals)]
    assert trained == [1, 2, 4, 8, 16, 32]
    assert [n for n in range(1, 9) if all(times.covers(*jump) for jump in Renoise(n).intervals)] == [1, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeanFlow(tangent="other"), "tangent must be one of data, self"),
        (lambda: MeanFlow(derivative="vjp"), "derivative must be one of jvp, difference"),
        (lambda: Progressive(split="thirds"), "split must be one of midpoint, uniform"),
        (lambda: SolutionConsistency(first=0.1, last=0.2), "last=0.2 is above first=0.1"),
        (lambda: Shortcut(levels=4).check_times(DyadicPairs(levels=3)), r"Shortcut\(levels=4\) is trained on"),
        (lambda: ConsistencyTraining().check_times(UniformPairs()), "take JumpsToData"),
        *(
            (partial(objective.check_times, times), rf"compares jumps from anywhere to .*, but {type(times).__name__}")
            for objective, times in (
                (Progressive(), JumpsToData()),
                (Progressive(), DyadicPairs()),
                (Lagrangian(), JumpsToData()),
                (Lagrangian(), DyadicPairs()),
                (MeanFlow(), DyadicPairs()),
                (SolutionConsistency(), DyadicPairs()),
            )
        ),
    ],
)
def test_choices_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
