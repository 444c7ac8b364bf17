"""The Dormand-Prince method with a step size per sample: closed forms, counted rows, independence of the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import RK45

from flowbench.core.seeds import generator
from flowbench.flows.solver import per_sample as solver_per_sample
from flowbench.flows.solver.adaptive import DormandPrince
from flowbench.flows.solver.base import ConditionedField

UNIT = torch.tensor([0.0, 1.0], dtype=torch.float64)
RATES = torch.tensor([-0.5, -3.0, 0.1, -40.0, 2.0], dtype=torch.float64)


def each(rtol=1e-6, atol=1e-6, **options):
    return DormandPrince(rtol, atol, per_sample=True, **options)


class Rated:
    """dx/dt = rate cos(t) x with a rate of its own for every sample; counts rows and remembers times."""

    def __init__(self):
        self.rows, self.times = 0, []

    def velocity(self, t, x, rate):
        assert t.shape == x.shape[:1] == rate.shape
        self.rows += len(x)
        self.times += t.tolist()
        return (rate * t.cos())[:, None] * x

    def field(self, rates=RATES):
        return ConditionedField(self.velocity, rates)

    @staticmethod
    def solution(x, times, rates=RATES):
        exponent = rates * (times.sin() - times[0].sin())[:, None]
        return exponent.exp()[..., None] * x


def points(num: int = 5, dim: int = 2):
    return torch.randn(num, dim, generator=generator(0, "points"), dtype=torch.float64)


def test_tableau_is_scipys():
    np.testing.assert_allclose(
        [a for row in solver_per_sample.A[:-1] for a in row], [a for i in range(1, 6) for a in RK45.A[i, :i]]
    )
    np.testing.assert_allclose(solver_per_sample.A[-1], RK45.B)
    np.testing.assert_allclose(solver_per_sample.C[:-1], RK45.C[1:])
    np.testing.assert_allclose(np.abs(solver_per_sample.ERROR), np.abs(RK45.E))
    np.testing.assert_allclose(np.sign(solver_per_sample.ERROR), -np.sign(RK45.E))


@pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, 0.0), (0.1, 0.3, 0.4, 0.9), (0.9, 0.4, 0.3, 0.1)])
def test_states_of_closed_form(times):
    times, x, rated = torch.tensor(times).double(), points(), Rated()
    found = each(1e-9, 1e-9).solve(rated.field(), x, times)
    torch.testing.assert_close(found.states, Rated.solution(x, times), rtol=1e-6, atol=1e-8)
    assert torch.equal(found.states[0], x)
    assert min(times) <= min(rated.times) <= max(rated.times) <= max(times)


@given(rtol=st.floats(1e-9, 1e-3), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_errors_follow_the_tolerance(rtol: float, seed: int):
    x = 1 + torch.rand(5, 3, generator=generator(seed), dtype=torch.float64)
    rates = 4 * torch.randn(5, generator=generator(seed, "rates"), dtype=torch.float64)
    found = each(rtol, rtol).solve(Rated().field(rates), x, UNIT).states[-1]
    truth = Rated.solution(x, UNIT, rates)[-1]
    assert ((found - truth).abs() / (1 + truth.abs())).max() < 300 * rtol


def test_a_sample_does_not_depend_on_its_batch():
    x = points()
    whole = each().solve(Rated().field(), x, UNIT)
    for i in range(5):
        alone = each().solve(Rated().field(RATES[i : i + 1]), x[i : i + 1], UNIT)
        torch.testing.assert_close(alone.states[:, 0], whole.states[:, i], rtol=1e-12, atol=1e-12)
        assert alone.stats.sample_evaluations.item() == whole.stats.sample_evaluations[i].item()
    # One norm over the batch does couple them: the stiff sample steers the others.
    joint = torchdiffeq.odeint(lambda t, x: Rated().velocity(t.expand(5), x, RATES), x, UNIT, method="dopri5")[-1]
    pair = torchdiffeq.odeint(
        lambda t, x: Rated().velocity(t.expand(2), x, RATES[:2]), x[:2], UNIT, method="dopri5", rtol=1e-3
    )[-1]
    assert not torch.allclose(joint[:2], pair, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("times", [(0.0, 1.0), (0.0, 0.25, 1.0)])
def test_samples_that_have_arrived_cost_nothing(times):
    rated = Rated()
    stats = each().solve(rated.field(), points(), torch.tensor(times).double()).stats
    assert rated.rows == stats.sample_evaluations.sum().item()
    assert stats.network_evaluations == pytest.approx(stats.sample_evaluations.double().mean().item())
    assert stats.network_evaluations == pytest.approx(6 * (stats.accepted_steps + stats.rejected_steps) + 2)
    assert (stats.sample_evaluations % 6 == 2).all()
    # The stiff sample needs many more than the tame ones.
    assert stats.sample_evaluations[3] > 3 * stats.sample_evaluations[2]


def test_fields_that_cannot_be_taken_apart_keep_their_batch():
    """A closure over all labels: same results and counts, called with the whole batch until the last one arrives."""
    x, sizes = points(), set()

    def closure(t, x):
        sizes.add(len(x))
        return Rated().velocity(t, x, RATES)

    whole, apart = each().solve(closure, x, UNIT), each().solve(Rated().field(), x, UNIT)
    assert sizes == {5}
    torch.testing.assert_close(whole.states, apart.states, rtol=1e-12, atol=1e-12)
    assert torch.equal(whole.stats.sample_evaluations, apart.stats.sample_evaluations)


def test_rejected_steps_are_counted():
    rated = Rated()
    field = ConditionedField(lambda t, x: torch.where(t < 0.5, 0.0, 50.0)[:, None] * torch.cos(40 * x + t[:, None]))
    stats = each(1e-7, 1e-7).solve(field, points(), UNIT).stats
    assert stats.rejected_steps > 0
    assert stats.network_evaluations == pytest.approx(6 * (stats.accepted_steps + stats.rejected_steps) + 2)
    assert rated.rows == 0


def test_costs_about_what_the_joint_method_costs_for_one_sample():
    x = points(1, 3)
    field = lambda t, x: torch.sin(5 * x) + t.reshape(-1, 1)  # noqa: E731
    ours = each(1e-8, 1e-8).solve(field, x, UNIT)
    joint = DormandPrince(1e-8, 1e-8).solve(field, x, UNIT)
    torch.testing.assert_close(ours.states, joint.states, rtol=1e-6, atol=1e-6)
    assert ours.stats.network_evaluations == pytest.approx(joint.stats.network_evaluations, rel=0.3)


def test_shapes_types_gradients_and_empty_batches():
    x = points(2, 9).float().view(2, 1, 3, 3).requires_grad_()
    rate = torch.tensor(-1.0, requires_grad=True)
    states = each().solve(lambda t, x: rate * x.double(), x, UNIT).states
    assert (states.dtype, states.shape) == (torch.float32, (2, 2, 1, 3, 3))
    states[-1].sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, math.exp(-1)), rtol=1e-4, atol=0)
    torch.testing.assert_close(rate.grad, x.sum().detach() * math.exp(-1), rtol=1e-3, atol=1e-5)
    empty = each().solve(lambda t, x: x, torch.zeros(0, 3), UNIT)
    assert empty.states.shape == (2, 0, 3)
    with torch.inference_mode():
        torch.testing.assert_close(each().solve(lambda t, x: -x, x + 0, UNIT).states[-1], states[-1].detach())


def test_fields_end_with_the_interval():
    """int_0^1 sqrt(1 - t) dt = 2 / 3; the field does not exist beyond 1."""
    field = lambda t, x: (1 - t).sqrt()[:, None] + 0 * x  # noqa: E731
    states = each(1e-5, 1e-5).solve(field, points(), UNIT).states
    torch.testing.assert_close(states[1] - states[0], torch.full((5, 2), 2 / 3).double(), rtol=1e-3, atol=1e-3)
    tiny = []
    each().solve(lambda t, x: tiny.extend(t.tolist()) or 1e-6 * x, 10 + points(), UNIT)
    assert max(tiny) <= 1


def test_points_at_rest_arrive():
    stats = each().solve(lambda t, x: 0 * x, torch.zeros(3, 2), UNIT).stats
    assert stats.network_evaluations < 80


def test_failures_name_sample_and_reason():
    x = points()

    def broken(t, x):
        return torch.where((x == x[2:3]) & (t > 0.3)[:, None], float("nan"), torch.zeros_like(x))

    with pytest.raises(RuntimeError, match=r"failed \(the field is not finite at time 0\): loosen the tolerances"):
        each().solve(lambda t, x: x * float("nan"), x, UNIT)
    with pytest.raises(RuntimeError, match=r"sample 2 at time 0\.\d+: its step size underflows"):
        each().solve(broken, x, UNIT)
    with pytest.raises(RuntimeError, match=r"sample 3 at time 0\.\d+: max_steps=20 is reached"):
        each(max_steps=20).solve(Rated().field(), x, UNIT)
    with pytest.raises(ValueError, match="must return the shape of its states"):
        each().solve(lambda t, x: x[:, :1], x, UNIT)
    with pytest.raises(ValueError, match="strictly increasing or decreasing"):
        each().solve(lambda t, x: x, x, torch.tensor([0.0, 0.0]))


def test_names():
    assert repr(DormandPrince(per_sample=True)) == "DormandPrince(rtol=1e-05, atol=1e-05, per_sample=True)"
    assert repr(DormandPrince(separate_divergence=True)).endswith("atol=1e-05, separate_divergence=True)")
