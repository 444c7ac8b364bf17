"""Ratio-aware guidance against its limits, closed forms and a plain computation of the schedule."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.core.seeds import generator
from flowbench.flows.guidance.classifier_free import ClassifierFreeGuidance
from flowbench.flows.guidance.ratio_aware import RatioAwareGuidance, RatioProfile, ratio_profile
from flowbench.flows.solver.fixed_step import Euler, Heun


def velocities(seed: int = 0, num: int = 6, dtype: torch.dtype = torch.float64):
    return torch.randn(2, num, 3, 2, generator=generator(seed), dtype=dtype)


class GaussianNetwork:
    """The exact velocity of N(m, b^2 I) from a standard normal along straight lines, m by class."""

    def __init__(self):
        self.means = torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=torch.float64)
        self.calls = 0

    def __call__(self, x, t, label):
        self.calls += 1
        mean = self.means.mean(0).expand(len(x), 2) if label is None else self.means[label]
        t = t[:, None].to(x)
        rate = (0.25 * t - (1 - t)) / (0.25 * t**2 + (1 - t) ** 2)
        return mean + rate * (x - t * mean)


@given(seed=st.integers(0, 99), max_scale=st.floats(1, 20), decay=st.floats(0, 20), squared=st.booleans())
@settings(max_examples=50, deadline=None)
def test_the_schedule_as_published(seed: int, max_scale: float, decay: float, squared: bool):
    conditional, unconditional = velocities(seed)
    guidance = RatioAwareGuidance(max_scale, decay, squared)
    guided = guidance(conditional, unconditional)
    for c, u, ratio, v in zip(
        conditional, unconditional, guidance.ratio(conditional, unconditional), guided, strict=True
    ):
        rho = math.sqrt((c - u).square().sum()) / math.sqrt(u.square().sum())
        assert ratio.item() == pytest.approx(rho)
        w = 1 + (max_scale - 1) * math.exp(-decay * (rho**2 if squared else rho))
        assert guidance.scale_of(ratio).item() == pytest.approx(w)
        assert 1 <= w <= max_scale
        torch.testing.assert_close(v, u + w * (c - u))


def test_limits():
    conditional, unconditional = velocities()
    for guidance, expected in [
        (RatioAwareGuidance(4.0, 0.0), ClassifierFreeGuidance(4.0)(conditional, unconditional)),
        (RatioAwareGuidance(4.0, 1e6), conditional),
        (RatioAwareGuidance(1.0, 3.0), conditional),
    ]:
        torch.testing.assert_close(guidance(conditional, unconditional), expected)
    same = RatioAwareGuidance(18.0, 12.0)
    assert torch.equal(same(conditional, conditional), conditional)
    assert (same.scale_of(same.ratio(conditional, conditional)) == 18).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_unconditional_velocity_leaves_the_conditional_one(dtype):
    conditional = velocities(dtype=torch.float32)[0].to(dtype)
    for reduce in ("sample", "batch"):
        for squared in (False, True):
            guidance = RatioAwareGuidance(4.0, 3.0, squared, reduce)
            assert torch.equal(guidance(conditional, torch.zeros_like(conditional)), conditional)
            zero = torch.zeros_like(conditional)
            assert torch.equal(guidance(zero, zero), zero)


def test_a_sample_depends_on_its_batch_only_if_asked_to():
    conditional, unconditional = velocities()
    each, whole = RatioAwareGuidance(4.0, 3.0), RatioAwareGuidance(4.0, 3.0, reduce="batch")
    alone = torch.cat([each(conditional[i : i + 1], unconditional[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(each(conditional, unconditional), alone)
    ratio = whole.ratio(conditional, unconditional)
    expected = (conditional - unconditional).norm() / unconditional.norm()
    torch.testing.assert_close(ratio, expected.expand(6))
    assert not torch.allclose(whole(conditional, unconditional)[:1], whole(conditional[:1], unconditional[:1]))


def test_the_ratio_does_not_depend_on_the_basis_nor_on_the_unit():
    conditional, unconditional = velocities()
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator(1), dtype=torch.float64)).Q
    ratio = RatioAwareGuidance().ratio(conditional, unconditional)
    turned = (2.5 * x.flatten(1) @ basis for x in (conditional, unconditional))
    torch.testing.assert_close(RatioAwareGuidance().ratio(*turned), ratio)


def test_half_precision_norms_are_taken_in_single_precision():
    # 2e6 equal elements of 1e-3: bfloat16 sums would stop growing, float16 squares would underflow.
    unconditional = torch.full((1, 2_000_000), 1e-3, dtype=torch.bfloat16)
    ratio = RatioAwareGuidance().ratio(2 * unconditional, unconditional)
    assert ratio.dtype == torch.float32
    assert ratio.item() == pytest.approx(1, rel=1e-4)
    guided = RatioAwareGuidance()(2 * unconditional, unconditional)
    assert guided.dtype == torch.bfloat16


def test_ratio_at_pure_noise_has_a_closed_form():
    network = GaussianNetwork()
    x = torch.randn(5, 2, generator=generator(0), dtype=torch.float64)
    label, t = torch.tensor([0, 1, 0, 1, 0]), torch.zeros(5)
    ratio = RatioAwareGuidance().ratio(network(x, t, label), network(x, t, None))
    mean = network.means.mean(0)
    expected = (network.means[label] - mean).norm(dim=1) / (x - mean).norm(dim=1)
    torch.testing.assert_close(ratio, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("max_scale", "calls"), [(3.0, 20), (1.0, 10)])
def test_it_costs_what_a_constant_scale_costs(max_scale: float, calls: int):
    network, guidance, label = GaussianNetwork(), RatioAwareGuidance(max_scale, 2.0), torch.tensor([0, 1])

    def field(t, x):
        return guidance.velocity(network, x, t.expand(len(x)), label)

    solution = Heun(5).solve(field, torch.zeros(2, 2, dtype=torch.float64), torch.tensor([0.0, 1.0]))
    assert network.calls == calls == guidance.evaluations_at(0.5) * solution.stats.network_evaluations
    assert guidance.evaluations_at(0.5) == ClassifierFreeGuidance(max_scale).evaluations_at(0.5)
    network.calls = 0
    x = torch.ones(2, 2, dtype=torch.float64)
    torch.testing.assert_close(guidance.velocity(network, x, torch.zeros(2), None), network(x, torch.zeros(2), None))
    assert network.calls == 2


def test_a_sweep_varies_the_largest_scale():
    guidance = RatioAwareGuidance(4.0, 3.0, squared=True, reduce="batch")
    assert guidance.scale == 4
    other = guidance.with_scale(2.5)
    assert (other.scale, other.decay, other.squared, other.reduce) == (2.5, 3.0, True, "batch")
    assert repr(other) == "RatioAwareGuidance(max_scale=2.5, decay=3, squared=True, reduce='batch')"
    assert repr(RatioAwareGuidance()) == "RatioAwareGuidance(max_scale=18, decay=12)"


def test_the_profile_is_what_the_run_saw():
    network, guidance = GaussianNetwork(), RatioAwareGuidance(4.0, 3.0)
    x, label = torch.randn(7, 2, generator=generator(2), dtype=torch.float64), torch.tensor([0, 1, 0, 1, 0, 1, 1])
    profile = ratio_profile(guidance, network, x, label, Euler(4))
    assert profile.times.tolist() == [0, 0.25, 0.5, 0.75]
    for time, ratio, scale in zip(profile.times, profile.ratio, profile.scale, strict=True):
        t = time.expand(7)
        conditional, unconditional = network(x, t, label), network(x, t, None)
        rho = guidance.ratio(conditional, unconditional)
        assert ratio.item() == pytest.approx(rho.mean().item())
        assert scale.item() == pytest.approx(guidance.scale_of(rho).mean().item())
        x = x + guidance.velocity(network, x, t, label) / 4
    backward = ratio_profile(guidance.with_scale(1), network, x, label, Euler(2), torch.tensor([1.0, 0.5]))
    assert backward.times.tolist() == [1, 0.75]
    assert (backward.scale == 1).all()


@pytest.mark.parametrize("squared", [False, True])
def test_the_decay_follows_the_ratios_of_a_model(squared: bool):
    ratio = torch.tensor([0.1, 0.2, 0.9])
    profile = RatioProfile(torch.arange(3.0), ratio, torch.ones(3))
    guidance = RatioAwareGuidance(4.0, squared=squared).with_decay_from(profile, strength=0.6)
    assert guidance.max_scale == 4
    assert guidance.scale_of(torch.tensor(0.2)).item() == pytest.approx(1 + 3 * math.exp(-0.6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RatioAwareGuidance(max_scale=0.5), "max_scale must be a number in .*, got 0.5"),
        (lambda: RatioAwareGuidance(decay=-1), "decay must be a number in .*, got -1"),
        (lambda: RatioAwareGuidance(reduce="mean"), "reduce must be one of sample, batch, got 'mean'"),
        (lambda: RatioAwareGuidance().with_scale(0.0), "max_scale must be a number in"),
        (
            lambda: RatioAwareGuidance().with_decay_from(RatioProfile(*torch.ones(3, 2)), 0),
            "strength must be a number in",
        ),
        (
            lambda: RatioAwareGuidance().with_decay_from(RatioProfile(*torch.zeros(3, 2))),
            "the median ratio is 0: this model does not tell its labels apart",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
