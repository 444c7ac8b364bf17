"""Weights against closed forms, plain flow matching and brute force."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from torch import distributed

from flowbench.core.seeds import generator
from flowbench.flows import GibbsWeight, UniformWeight, WeightResult, transport_decomposition
from tests.closeness import assert_near
from tests.ranks import run_ranks

seeds = st.integers(0, 999)
pytestmark = pytest.mark.filterwarnings("ignore:the Gibbs weight keeps")
kinds = pytest.mark.parametrize("cost", ["norm", "squared"])


def pairs(seed: int, num: int = 64, dim: int = 3, dtype=torch.float32):
    rng = generator(seed, "pairs")
    return torch.randn(num, dim, generator=rng, dtype=dtype), 1 + torch.randn(num, dim, generator=rng, dtype=dtype)


def read(result: WeightResult) -> dict[str, float]:
    assert callable(result.diagnostics)
    return {name: value.item() for name, value in result.diagnostics().items()}


@kinds
@given(seed=seeds, kappa=st.floats(0.3, 5))
@settings(max_examples=20, deadline=None)
def test_raw_weight_is_the_gibbs_factor(cost, seed: int, kappa: float):
    x0, x1 = pairs(seed)
    distance = torch.linalg.norm(x0 - x1, dim=1)
    c = distance if cost == "norm" else distance**2
    result = GibbsWeight(kappa, cost, "raw")(x0, x1)
    torch.testing.assert_close(result.weight, torch.exp(-c / (kappa * math.sqrt(3))), rtol=1e-4, atol=0)
    w = torch.exp(-(c - c.min()).double() / (kappa * math.sqrt(3)))
    found = read(result)
    assert found["ess"] == pytest.approx((w.sum() ** 2 / (64 * (w**2).sum())).item(), rel=1e-3)
    assert found["max_share"] == pytest.approx((w.max() / w.sum()).item(), rel=1e-3)
    weighted = ((w * c).sum() / w.sum()).item()
    assert found["weighted_cost"] == pytest.approx(weighted, rel=1e-3)
    assert weighted <= found["unweighted_cost"] + 1e-5
    tilt = transport_decomposition(GibbsWeight(kappa, cost), x0, x1)
    assert found["tilt_source"] == pytest.approx(tilt.tilt_source, rel=1e-3)
    assert found["tilt_target"] == pytest.approx(tilt.tilt_target, rel=1e-3)


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


@pytest.mark.parametrize("normalization", ["running", "batch"])
def test_normalised_weights_train_in_3072_dimensions_where_raw_ones_underflow(normalization):
    x0, x1 = pairs(0, dim=3072)
    assert (torch.exp(-(x0 - x1).norm(dim=1) / 0.5) == 0).all(), "what a hand-written loop would weigh by"
    with pytest.raises(ValueError, match=r"all raw weights .* underflow .*: use normalization: running"):
        GibbsWeight(epsilon=0.5, normalization="raw")(x0, x1)
    weight = GibbsWeight(epsilon=0.5, normalization=normalization)
    net = torch.nn.Linear(3072, 4, bias=False)
    torch.nn.init.normal_(net.weight, generator=generator(0, "net"))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    before = net.weight.detach().clone()
    for seed in range(4):
        x0, x1 = pairs(seed, dim=3072)
        result = weight(x0, x1)
        assert 0.05 < result.weight.mean() < 20
        assert 0 < read(result)["ess"] <= 1
        optimizer.zero_grad()
        (result.weight * net((x0 + x1) / 2).square().mean(1)).mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    assert net.weight.isfinite().all()
    assert not torch.equal(net.weight, before)


@pytest.mark.parametrize("jump", [-900.0, 0.0, 900.0])
def test_the_running_mean_is_the_bias_corrected_average_of_the_batches_however_far_they_lie_apart(jump):
    """A jump of the mean cost leaves no weight, or no finite one, beside the mean of the batches before."""
    weight, decay = GibbsWeight(epsilon=1.0, decay=0.9), 0.9
    distances = 1000 + torch.randn(4, 64, generator=generator(0, "distances"), dtype=torch.float64)
    distances[2] += jump
    log_means = []
    for distance in distances:
        weight(torch.zeros(64, 1, dtype=torch.float64), distance[:, None])
        log_means.append(logsumexp(-distance.numpy()) - math.log(64))
        powers = decay ** np.arange(len(log_means))[::-1]
        assert weight.running_log_mean.item() == pytest.approx((powers * log_means).sum() / powers.sum(), rel=1e-5)
    assert weight.state_dict()["num_updates"] == 4
    with pytest.raises(ValueError, match="not finite"):
        weight(torch.zeros(2, 1), torch.tensor([[math.nan], [1.0]]))


def test_the_papers_temperature_is_a_constant_factor_that_normalising_removes():
    """Norm cost, d = 3072, epsilon = 5: raw weights near exp(-sqrt(2 * 3072 + 1) / 5), of the order of 1e-7."""
    x0, x1 = pairs(0, num=256, dim=3072)
    raw = GibbsWeight(epsilon=5.0, normalization="raw")(x0, x1).weight
    assert -20 < raw.log().mean() < -10
    running = GibbsWeight(epsilon=5.0)
    torch.testing.assert_close(running(x0, x1).weight, raw / raw.mean(), rtol=1e-3, atol=0)
    assert GibbsWeight(kappa=5 / math.sqrt(3072)).epsilon(3072) == pytest.approx(5)


def network() -> torch.nn.Module:
    net = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.SiLU(), torch.nn.Linear(16, 3))
    rng = generator(0, "net")
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, generator=rng)
    return net


def gradient(net: torch.nn.Module, x0, x1, weight) -> torch.Tensor:
    """Of the weighted flow-matching loss at t = 1/2, summed over pairs."""
    loss = (weight * (net((x0 + x1) / 2) - (x1 - x0)).square().mean(1)).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


@pytest.mark.parametrize("normalization", ["running", "batch", "raw"])
@pytest.mark.parametrize("correction", ["none", "target", "source", "mixed", "tilt-only"])
def test_infinite_temperature_gives_the_gradient_of_flow_matching(normalization, correction):
    x0, x1 = pairs(1)
    net, weight = network(), GibbsWeight(1e6, "norm", normalization, correction=correction)
    weight.fit(*pairs(7), generator(0, "fit"), True)
    plain = gradient(net, x0, x1, UniformWeight()(x0, x1).weight)
    assert_near(gradient(net, x0, x1, weight(x0, x1).weight), plain, ulps=1024)


def test_splitting_a_batch_keeps_the_gradient_of_running_weights_but_not_of_batch_weights():
    x0, x1 = pairs(2)
    net, running = network(), GibbsWeight(0.3)
    running(*pairs(5))
    running.eval()

    def of_halves(weight):
        halves = (slice(0, 32), slice(32, 64))
        return sum(gradient(net, x0[h], x1[h], weight(x0[h], x1[h]).weight) for h in halves)

    assert_near(of_halves(running), gradient(net, x0, x1, running(x0, x1).weight), ulps=1024)
    batch = GibbsWeight(0.3, normalization="batch")
    assert not torch.allclose(of_halves(batch), gradient(net, x0, x1, batch(x0, x1).weight), rtol=1e-2)


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


def test_the_running_mean_stays_precise_in_a_module_of_half_precision():
    """A step of one per cent is below what bfloat16 resolves."""
    half, full = GibbsWeight(epsilon=0.1).bfloat16(), GibbsWeight(epsilon=0.1)
    for seed in range(300):
        x0, x1 = pairs(seed)
        shifted = x1 + min(seed, 30) / 10
        half(x0, shifted)
        full(x0, shifted)
    assert half.running_log_mean.item() == pytest.approx(full.running_log_mean.item(), rel=1e-6)
    assert half.double().running_log_mean.dtype == torch.float64


def test_the_count_of_updates_is_true_at_any_time():
    weight = GibbsWeight(epsilon=1.0)
    kept = weight.state_dict()
    for seed in range(5):
        weight(*pairs(seed))
    assert kept["num_updates"] == 5
    running = weight.running_log_mean.item()
    weight.load_state_dict({}, strict=False)
    weight(*pairs(9))
    assert weight.running_log_mean.item() == pytest.approx(running, rel=0.2), "did not start over"
    assert weight.num_updates == 6


def test_weights_carry_no_gradient_and_survive_half_precision():
    x0, x1 = pairs(3)
    weight = GibbsWeight(0.5, "squared", "batch")
    assert not weight(x0.requires_grad_(), x1).weight.requires_grad
    half = weight(x0.detach().bfloat16(), x1.bfloat16()).weight
    assert half.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(weight(x0, x1).weight, GibbsWeight(0.5, "squared", "batch")(x0, x1).weight)


def test_a_small_effective_sample_is_warned_of_once():
    x0, x1 = pairs(6)
    weight = GibbsWeight(epsilon=0.05)
    message = r"ESS/B = 0\.\d+ < 0.3 at epsilon = 0.05 .*: raise epsilon or kappa"
    with pytest.warns(UserWarning, match=message) as caught:
        _ = [read(weight(x0, x1)) for _ in range(3)]
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(GibbsWeight(epsilon=5.0)(x0, x1))
        GibbsWeight(epsilon=0.05)(x0, x1)  # nobody asks


def test_one_sample_and_equal_points_weigh_one():
    x = torch.ones(1, 3)
    for points in (x, x.expand(5, 3)):
        for normalization in ("running", "batch", "raw"):
            result = GibbsWeight(0.5, normalization=normalization)(points, points)
            torch.testing.assert_close(result.weight, torch.ones(len(points)), rtol=1e-6, atol=0)
            found = read(result)
            assert found["ess"] == pytest.approx(1, abs=1e-6)
            assert found["weighted_cost"] == 0
            assert max(found["tilt_source"], found["tilt_target"]) < 1e-6


@pytest.mark.parametrize("normalization", ["running", "batch", "raw"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_points_that_are_not_finite_are_refused_before_they_reach_the_average(normalization, value):
    weight = GibbsWeight(0.5, normalization=normalization)
    x0, x1 = pairs(0)
    weight(x0, x1)
    before = weight.running_log_mean.clone()
    bad = x1.clone()
    bad[3 if math.isnan(value) else slice(None), 0] = value
    with pytest.raises(ValueError, match="points that are not finite"):
        weight(x0, bad)
    assert torch.equal(weight.running_log_mean, before)


def test_states_of_plain_weights_are_two_numbers_as_ever():
    assert set(GibbsWeight(0.3).state_dict()) == {"running_log_mean", "num_updates"}
    assert not UniformWeight().state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kappa": 0}, "kappa must be a number in"),
        ({"kappa": math.nan}, "kappa must be a number in"),
        ({"epsilon": 0.0}, "epsilon must be a number in .*, got 0.0"),
        ({"epsilon": -1.0}, "epsilon must be a number in"),
        ({"epsilon": math.inf}, "epsilon must be a number in"),
        ({"epsilon": "knee"}, "epsilon must be a number, \"elbow\" or an EpsilonRule, got 'knee'"),
        ({"kappa": 0.5, "epsilon": 5.0}, r"one of kappa and epsilon .* got kappa=0.5 and epsilon=5.0"),
        ({"correction": "both"}, "correction must be one of none, target, source, mixed, tilt-only, got 'both'"),
        ({"num_reference": 0}, "num_reference must be a whole number in"),
        ({"cost": "l1"}, "cost must be"),
        ({"normalization": "none"}, "normalization must be"),
        ({"decay": 1.0}, "decay must be a number in"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GibbsWeight(**options)


def test_unpaired_batches_are_refused():
    with pytest.raises(ValueError, match="non-empty and of one shape"):
        GibbsWeight()(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="non-empty and of one shape"):
        GibbsWeight()(torch.zeros(0, 2), torch.zeros(0, 2))


def _worker(rank: int, address: str, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    x0, x1 = pairs(4)
    share = slice(0, 40) if rank == 0 else slice(40, 64)
    weights = [GibbsWeight(0.3, normalization=n)(x0[share], x1[share]).weight for n in ("batch", "running")]
    bad = x1[share] if rank == 0 else x1[share] * math.nan
    try:
        GibbsWeight(0.3)(x0[share], bad)
        refused = False
    except ValueError:  # on both: a process that stopped alone would leave the other waiting
        refused = True
    torch.save((weights, refused), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_normalise_as_one(tmp_path):
    run_ranks(_worker, f"file://{tmp_path}/rendezvous", str(tmp_path))
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    x0, x1 = pairs(4)
    for position, normalization in enumerate(("batch", "running")):
        together = torch.cat([results[0][0][position], results[1][0][position]])
        torch.testing.assert_close(together, GibbsWeight(0.3, normalization=normalization)(x0, x1).weight)
    assert results[0][1]
    assert results[1][1]
