"""Pairs inside a batch: what flow matching has always done, and what it says about them."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from flowbench.families.pairing.base import cost_ratio
from flowbench.families.pairing.batch_pairing import BatchPairing
from flowbench.flows import Coupling, IndependentCoupling, OptimalTransportCoupling, SinkhornCoupling

from ..contract.builders import IMAGES, POINTS, batch_of, build


def rng(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def paired(coupling: Coupling, spec=POINTS, size: int = 12):
    flow, batch = build("cfm", spec), batch_of(spec, size)
    return BatchPairing(coupling).pairs(flow.pairing_context, batch.x, None, batch, rng()), batch


@pytest.mark.parametrize("spec", [POINTS, IMAGES], ids=lambda spec: spec.name)
def test_noise_comes_first_from_the_steps_generator_and_is_then_permuted(spec):
    pairs, batch = paired(OptimalTransportCoupling(), spec)
    noise = torch.randn(12, *spec.shape, generator=rng())
    cost = torch.cdist(batch.x.flatten(1).double(), noise.flatten(1).double()).square()
    assert torch.equal(pairs.x0, noise[linear_sum_assignment(cost.numpy())[1]])
    assert torch.equal(pairs.x1, batch.x)


def test_a_coupling_draws_after_the_noise():
    pairs, batch = paired(SinkhornCoupling(epsilon=0.1))
    steps = rng()
    noise = torch.randn(12, 2, generator=steps)
    assert torch.equal(pairs.x0, noise[SinkhornCoupling(epsilon=0.1)(noise, batch.x, steps)])


@pytest.mark.parametrize("spec", [POINTS, IMAGES], ids=lambda spec: spec.name)
def test_the_loss_is_the_one_written_out_bit_for_bit(spec):
    """Noise, coupling, times: the order in which a step draws has not moved."""
    flow, batch = build("ot_cfm", spec, conditional=True, label_dropout=0.5), batch_of(spec, 12)
    found = flow.training_loss(batch, rng()).total
    steps = rng()
    label = batch.label.masked_fill(torch.rand(12, generator=steps) < 0.5, spec.num_classes)
    noise = torch.randn(12, *spec.shape, generator=steps)
    x0 = noise[OptimalTransportCoupling()(noise, batch.x, steps)]
    t = torch.rand(12, generator=steps)
    at = t.view(-1, *[1] * len(spec.shape))
    v = flow.network((1 - at) * x0 + at * batch.x, t, label)
    torch.testing.assert_close(found, (v - (batch.x - x0)).square().flatten(1).mean(1).mean(), rtol=1e-5, atol=0)


def test_one_sample_or_no_coupler_is_independent_flow_matching_bit_for_bit():
    """Invariant 10."""
    for size, coupling in ((1, OptimalTransportCoupling()), (12, None)):
        batch = batch_of(POINTS, size)
        plain, other = (build("cfm", POINTS, coupling=c) for c in (IndependentCoupling(), coupling))
        losses = [flow.training_loss(batch, rng()).total for flow in (plain, other)]
        assert torch.equal(*losses)
        gradients = [
            torch.autograd.grad(loss, list(flow.parameters()))
            for loss, flow in zip(losses, (plain, other), strict=True)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        assert any(bool(g.any()) for g in gradients[0])


def test_a_coupling_is_given_the_labels_that_no_dropping_changed():
    class Watching(IndependentCoupling):
        def __call__(self, x0, x1, generator, condition=None):
            seen.append(condition)
            return super().__call__(x0, x1, generator, condition)

    seen: list = []
    batch = batch_of(POINTS, 12)
    flow = build("cfm", POINTS, conditional=True, label_dropout=0.9, coupling=Watching())
    flow.training_loss(batch, rng())
    build("cfm", POINTS, coupling=Watching()).training_loss(batch, rng())
    assert torch.equal(seen[0], batch.label)
    assert seen[1] is None


def test_what_is_logged():
    pairs, batch = paired(OptimalTransportCoupling())
    noise = torch.randn(12, 2, generator=rng())
    found = pairs.diagnostics()
    expected = (pairs.x0 - batch.x).square().sum() / (noise - batch.x).square().sum()
    torch.testing.assert_close(found["cost_ratio"], expected)
    assert found["cost_ratio"] < 1
    assert found["effective_batch"] == 12
    assert 0 < found["coupling_ms"] < 1e4
    assert not pairs.metrics, "a plain step writes nothing down"
    independent, _ = paired(IndependentCoupling())
    assert independent.diagnostics()["cost_ratio"] == 1


def test_the_cost_ratio_of_no_permutation_is_one():
    x0, x1 = torch.randn(2, 5, 3, generator=rng())
    assert cost_ratio(x0, x0, x1) == 1
