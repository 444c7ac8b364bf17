"""Classifier-free guidance against its limits and against the literature's other convention."""

from __future__ import annotations

import pytest
import torch

from flowbench.core.seeds import generator
from flowbench.flows.guidance.classifier_free import ClassifierFreeGuidance
from flowbench.flows.solver.fixed_step import Euler, Heun


class CountingNetwork:
    """Velocity label - x; the null label is worth 10."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, t, label):
        self.calls += 1
        target = torch.full((len(x),), 10.0) if label is None else label
        return target[:, None].to(x.dtype) - x


@pytest.mark.parametrize(("scale", "calls"), [(0.0, 1), (1.0, 1), (0.5, 2), (3.0, 2)])
def test_scale_runs_from_unconditional_to_conditional_and_beyond(scale: float, calls: int):
    network, guidance = CountingNetwork(), ClassifierFreeGuidance(scale)
    x, t, label = torch.randn(4, 2, generator=generator(0)), torch.zeros(4), torch.tensor([0, 1, 2, 3])
    velocity = guidance.velocity(network, x, t, label)
    assert network.calls == guidance.evaluations_at(0.0) == calls
    # The other convention: (1 + w) conditional - w unconditional, w = scale - 1.
    w = scale - 1
    expected = (1 + w) * (label[:, None] - x) - w * (10 - x)
    torch.testing.assert_close(velocity, expected)
    torch.testing.assert_close(guidance(label[:, None] - x, 10 - x), expected)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.5)])
def test_without_guidance_the_velocities_are_those_of_the_network_bit_for_bit(interval):
    x, t, label = torch.randn(4, 2, generator=generator(0)), torch.zeros(4), torch.tensor([0, 1, 2, 3])
    for scale, expected in ((1.0, label[:, None] - x), (0.0, 10 - x)):
        assert torch.equal(ClassifierFreeGuidance(scale, interval).velocity(CountingNetwork(), x, t, label), expected)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.5)])
def test_without_labels_one_unconditional_evaluation_is_enough(interval):
    network = CountingNetwork()
    x = torch.zeros(3, 2)
    velocity = ClassifierFreeGuidance(4.0, interval).velocity(network, x, torch.zeros(3), None)
    assert network.calls == 1
    assert (velocity == 10).all()


def test_a_guided_solve_costs_two_network_evaluations_per_call():
    network, guidance = CountingNetwork(), ClassifierFreeGuidance(2.0)
    label = torch.tensor([1, 2])

    def field(t, x):
        return guidance.velocity(network, x, t.expand(len(x)), label)

    solution = Heun(5).solve(field, torch.zeros(2, 2), torch.tensor([0.0, 1.0]))
    assert network.calls == solution.stats.network_evaluations * guidance.evaluations_at(0.5) == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outside_its_interval_the_conditional_velocity_costs_one_evaluation(dtype):
    guidance, network, label = ClassifierFreeGuidance(3.0, (0.3, 0.7)), CountingNetwork(), torch.tensor([1, 2])
    seen = []

    def field(t, x):
        before = network.calls
        velocity = guidance.velocity(network, x, t.expand(len(x)), label)
        seen.append((t.item(), network.calls - before, velocity, x))
        return velocity

    # Ten Euler steps: both ends of the interval are times of the solver, the same up to rounding.
    Euler(10).solve(field, torch.zeros(2, 2, dtype=dtype), torch.tensor([0.0, 1.0]))
    assert [calls for _, calls, _, _ in seen] == [1, 1, 1, 2, 2, 2, 2, 2, 1, 1]
    for time, calls, velocity, x in seen:
        assert guidance.evaluations_at(time) == calls
        scale = 3 if calls == 2 else 1
        torch.testing.assert_close(velocity, (10 + scale * (label[:, None] - 10) - x).to(dtype))


def test_times_that_differ_within_a_batch_are_guided_one_by_one():
    guidance, network = ClassifierFreeGuidance(3.0, (0.3, 0.7)), CountingNetwork()
    x, label = torch.randn(3, 2, generator=generator(1)), torch.tensor([1, 2, 3])
    together = guidance.velocity(network, x, torch.tensor([0.2, 0.5, 0.9]), label)
    for i, time in enumerate((0.2, 0.5, 0.9)):
        alone = guidance.velocity(network, x[i : i + 1], torch.tensor([time]), label[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


def test_another_scale_keeps_the_interval():
    guidance = ClassifierFreeGuidance(3.0, (0.3, 0.7)).with_scale(2)
    assert (guidance.scale, guidance.interval) == (2, (0.3, 0.7))
    assert repr(guidance) == "ClassifierFreeGuidance(scale=2, interval=(0.3, 0.7))"
    assert repr(ClassifierFreeGuidance(1.5)) == "ClassifierFreeGuidance(scale=1.5)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1}, "scale must be a number in .*, got -1"),
        ({"scale": float("inf")}, "scale must be a number in .*, got inf"),
        (
            {"interval": (0.5, 0.5)},
            r"interval must be two numbers in .*, got \(0.5, 0.5\): times with 0 <= from < to",
        ),
        ({"interval": (0.5, 1.5)}, r"interval\[1\] must be a number in .*, got 1.5"),
        ({"interval": (0.5,)}, "interval must be a list of 2 numbers"),
    ],
)
def test_bad_input_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        ClassifierFreeGuidance(**options)
    assert "\n" not in str(error.value)
