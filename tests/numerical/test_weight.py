"""Weights against closed forms, plain flow matching and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, multiprocessing

from flowbench.flows import GibbsWeight, UniformWeight, marginal_tilt
from flowbench.seeds import generator

seeds = st.integers(0, 999)
kinds = pytest.mark.parametrize("cost", ["norm", "squared"])


def pairs(seed: int, num: int = 64, dim: int = 3, dtype=torch.float32):
    rng = generator(seed, "pairs")
    return torch.randn(num, dim, generator=rng, dtype=dtype), 1 + torch.randn(num, dim, generator=rng, dtype=dtype)


@kinds
@given(seed=seeds, kappa=st.floats(0.1, 5))
@settings(max_examples=20, deadline=None)
def test_raw_weight_is_the_gibbs_factor(cost, seed: int, kappa: float):
    x0, x1 = pairs(seed)
    distance = torch.linalg.norm(x0 - x1, dim=1)
    c = distance if cost == "norm" else distance**2
    result = GibbsWeight(kappa, cost, "raw")(x0, x1)
    torch.testing.assert_close(result.weight, torch.exp(-c / (kappa * math.sqrt(3))), rtol=1e-4, atol=0)
    w = torch.exp(-(c - c.min()).double() / (kappa * math.sqrt(3)))
    assert result.diagnostics["ess"].item() == pytest.approx((w.sum() ** 2 / (64 * (w**2).sum())).item(), rel=1e-3)
    assert result.diagnostics["max_share"].item() == pytest.approx((w.max() / w.sum()).item(), rel=1e-3)
    weighted = ((w * c).sum() / w.sum()).item()
    assert result.diagnostics["weighted_cost"].item() == pytest.approx(weighted, rel=1e-3)
    assert weighted <= result.diagnostics["unweighted_cost"].item() + 1e-5


@pytest.mark.parametrize("normalization", ["running", "batch"])
@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_normalised_weights_have_mean_one_and_ignore_a_constant_cost(normalization, seed: int):
    weight = GibbsWeight(0.2, "squared", normalization)
    x0, x1 = pairs(seed)
    first = weight(x0, x1).weight
    assert first.mean().item() == pytest.approx(1, abs=1e-5)
    # An extra coordinate with the same difference in every pair adds a constant to the squared cost.
    extra = torch.full((64, 1), 5.0)
    scale = GibbsWeight(0.2 * math.sqrt(3 / 4), "squared", normalization)
    shifted = scale(torch.cat([x0, 0 * extra], 1), torch.cat([x1, extra], 1)).weight
    torch.testing.assert_close(shifted, first, rtol=1e-3, atol=1e-5)


def test_far_points_do_not_underflow():
    x0, x1 = pairs(0, dim=3072)
    raw = GibbsWeight(5 / math.sqrt(3072), "squared", "raw")
    assert (raw(x0, x1).weight == 0).all()
    for normalization in ("running", "batch"):
        result = GibbsWeight(5 / math.sqrt(3072), "squared", normalization)(x0, x1)
        assert result.weight.mean().item() == pytest.approx(1, abs=1e-3)
        assert 0 < result.diagnostics["ess"] <= 1


@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_constant_weights_and_only_they_have_full_sample_size(seed: int):
    x0, x1 = pairs(seed)
    ess = GibbsWeight(0.5)(x0, x1).diagnostics["ess"]
    assert 0 < ess < 1
    constant = GibbsWeight(0.5)(x0, x0 + 2)
    assert constant.diagnostics["ess"].item() == pytest.approx(1, abs=1e-6)
    assert constant.diagnostics["max_share"].item() == pytest.approx(1 / 64, abs=1e-6)


@pytest.mark.parametrize("normalization", ["running", "batch", "raw"])
def test_infinite_temperature_gives_the_gradient_of_flow_matching(normalization):
    x0, x1 = pairs(1)
    net = torch.nn.Linear(3, 3)
    torch.nn.init.normal_(net.weight, generator=generator(0, "net"))

    def gradient(weight):
        net.zero_grad()
        (weight * (net((x0 + x1) / 2) - (x1 - x0)).square().mean(1)).mean().backward()
        return net.weight.grad.clone()

    weighted = gradient(GibbsWeight(1e6, "norm", normalization)(x0, x1).weight)
    torch.testing.assert_close(weighted, gradient(UniformWeight()(x0, x1).weight), rtol=1e-4, atol=1e-6)


def test_splitting_a_batch_keeps_running_weights_but_not_batch_weights():
    x0, x1 = pairs(2)
    running = GibbsWeight(0.3)
    running(*pairs(5))
    running.eval()
    halves = torch.cat([running(x0[:32], x1[:32]).weight, running(x0[32:], x1[32:]).weight])
    torch.testing.assert_close(halves, running(x0, x1).weight)
    batch = GibbsWeight(0.3, normalization="batch")
    halves = torch.cat([batch(x0[:32], x1[:32]).weight, batch(x0[32:], x1[32:]).weight])
    assert not torch.allclose(halves, batch(x0, x1).weight, rtol=1e-2)


def test_running_mean_is_the_bias_corrected_average_of_earlier_batches():
    weight, log_means = GibbsWeight(0.4, decay=0.9), []
    for seed in range(6):
        x0, x1 = pairs(seed, dtype=torch.float64)
        cost = torch.linalg.norm(x0 - x1, dim=1)
        log_weight = -cost / (0.4 * math.sqrt(3))
        if log_means:
            powers = [0.9 ** (len(log_means) - 1 - i) for i in range(len(log_means))]
            average = sum(p * m for p, m in zip(powers, log_means, strict=True)) / sum(powers)
            torch.testing.assert_close(weight(x0, x1).weight, (log_weight - average).exp(), rtol=1e-5, atol=1e-7)
        else:
            weight(x0, x1)
        log_means.append(log_weight.exp().mean().log().item())


def test_running_mean_is_saved_and_frozen_in_eval_mode():
    weight, other = GibbsWeight(0.3), GibbsWeight(0.3)
    for seed in range(3):
        weight(*pairs(seed))
    other.load_state_dict(weight.state_dict())
    assert torch.equal(other(*pairs(9)).weight, weight(*pairs(9)).weight)
    weight.eval()
    before = {name: value.clone() for name, value in weight.state_dict().items()}
    weight(*pairs(10))
    assert all(torch.equal(value, before[name]) for name, value in weight.state_dict().items())


def test_weights_carry_no_gradient_and_survive_half_precision():
    x0, x1 = pairs(3)
    weight = GibbsWeight(0.5, "squared", "batch")
    assert not weight(x0.requires_grad_(), x1).weight.requires_grad
    half = weight(x0.detach().bfloat16(), x1.bfloat16()).weight
    assert half.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(weight(x0, x1).weight, GibbsWeight(0.5, "squared", "batch")(x0, x1).weight)


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


@kinds
@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_marginal_tilt_is_the_variation_of_the_mean_weight(cost, seed: int):
    x0, x1 = (x.double() for x in pairs(seed, 20))
    x1 = x1[:15]
    kernel = torch.stack([torch.stack([torch.linalg.norm(a - b) for b in x1]) for a in x0])
    kernel = torch.exp(-(kernel if cost == "norm" else kernel**2) / 2.0)
    for tilt, mean in zip(marginal_tilt(x0, x1, 2.0, cost), (kernel.mean(1), kernel.mean(0)), strict=True):
        assert tilt.item() == pytest.approx((mean.var(correction=0) / mean.mean() ** 2).item(), rel=1e-9)


def test_a_centred_ring_is_not_tilted_and_a_shifted_one_is():
    rng = generator(0, "ring")
    x0 = torch.randn(4000, 2, generator=rng)
    angle = 2 * math.pi * torch.rand(500, generator=rng)
    ring = 5 * torch.stack([angle.cos(), angle.sin()], 1)
    assert marginal_tilt(x0, ring, 2.0)[1] < 0.02
    assert marginal_tilt(x0, ring + 2.5, 2.0)[1] > 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kappa": 0}, "kappa must be positive"),
        ({"cost": "l1"}, "cost must be"),
        ({"normalization": "none"}, "normalization must be"),
        ({"decay": 1.0}, "decay must lie"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GibbsWeight(**options)


def test_unpaired_batches_are_refused():
    with pytest.raises(ValueError, match="pairs must have one shape"):
        GibbsWeight()(torch.zeros(3, 2), torch.zeros(4, 2))


def _worker(rank: int, address: str, queue) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    x0, x1 = pairs(4)
    share = slice(0, 40) if rank == 0 else slice(40, 64)
    weights = [GibbsWeight(0.3, normalization=n)(x0[share], x1[share]).weight for n in ("batch", "running")]
    queue.put((rank, [w.tolist() for w in weights]))
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_normalise_as_one(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    address = f"file://{tmp_path}/rendezvous"
    workers = [context.Process(target=_worker, args=(rank, address, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    results = dict(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    x0, x1 = pairs(4)
    for position, normalization in enumerate(("batch", "running")):
        together = torch.tensor(results[0][position] + results[1][position])
        torch.testing.assert_close(together, GibbsWeight(0.3, normalization=normalization)(x0, x1).weight)
