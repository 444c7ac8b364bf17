"""Distances of samples from the flow's ODE, and of one jump from two, against the map of Gaussians."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowbench.data import FlowDataModule
from flowbench.evaluation.override import SamplerOverride
from flowbench.evaluation.prospect import Prospect
from flowbench.families import FlowMap, FlowMatching
from flowbench.flows import ConsistencyTraining, Euler, EulerMaruyama, JumpsToData, Renoise
from flowbench.tasks.generation import MapError
from flowbench.tasks.generation.map_error import JumpErrors

from ...contract.builders import IMAGES, build
from ...evaluation.known import known
from ...evaluation.setups import setup_of
from ...families.test_flow_map import OracleNetwork


@pytest.fixture(scope="module")
def data() -> FlowDataModule:
    found = FlowDataModule("eight_gaussians", batch_size=16)
    found.setup("test")
    return found


def ask(module, data, **override):
    setup = setup_of(module.eval(), data, num_samples=200, override=SamplerOverride(**override))
    return JumpErrors(100).ask(setup)


def test_the_true_map_has_no_error_and_euler_steps_have_theirs(data):
    """One Euler step of N(0, 1) to N(2, 0.5^2) ends at x + b(x, 0) = 2, where the map ends at 2 + 0.5 x."""
    mapped, plain = (family(data.spec, OracleNetwork) for family in (FlowMap, FlowMatching))
    plain.solver = Euler(1)
    for number in (1, 4):
        assert ask(mapped, data, network_evaluations=number).of_samples.max() < 1e-6
    found = ask(plain, data, network_evaluations=1)
    noise = plain.draw_noise(torch.arange(100), 0).double()
    torch.testing.assert_close(found.of_samples, (0.5 * noise).square().mean(1), atol=1e-3, rtol=1e-2)
    assert ask(plain, data, network_evaluations=32).of_samples.mean() < 1e-2 * found.of_samples.mean()
    assert found.of_jumps is None


def test_jumps_are_composed_outside_of_sweeps(data):
    class Wrong(OracleNetwork):
        """Longer jumps are off by half of their length."""

        def forward(self, x, t, label=None, condition=None, end=None):
            found = super().forward(x, t, label, condition, end)
            return found if end is None else found + 0.5 * (end - t).abs().view(-1, 1)

    module = FlowMap(data.spec, Wrong)
    found = ask(module, data)
    # X(x, 0, 1) is off by 0.5; each half by 0.125, the first of which the second carries on by S_1 / S_(1/2).
    carried = 0.125 + 0.125 * 0.5 / 0.3125**0.5
    torch.testing.assert_close(found.of_jumps, torch.full((100,), (0.5 - carried) ** 2).double(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.of_samples, torch.full((100,), 0.25).double(), atol=1e-3, rtol=1e-2)
    assert ask(module, data, network_evaluations=2).of_jumps is None
    answers = known(given={JumpErrors(100): found})
    rows = {row.metric: row for row in MapError(100).measure(answers)}
    assert rows["composition_error"].value == pytest.approx(0.5 - carried, rel=1e-5)
    assert rows["map_error"].value == pytest.approx(0.5, rel=1e-2)
    assert (rows["map_error"].n, rows["map_error"].protocol, rows["map_error"].unit) == (
        100,
        "data/midpoint-128/100",
        "data units",
    )
    assert rows["composition_error"].protocol == "data/two-jumps/100"


def test_who_has_no_such_error(data):
    noisy = FlowMatching(data.spec, OracleNetwork, solver=EulerMaruyama(4))
    renoised = FlowMap(data.spec, OracleNetwork, jumps=Renoise(2))
    for module in (noisy, renoised):
        assert ask(module, data) is None
        assert MapError().expected(Prospect(data.spec, module)) == ()
    stateful = FlowMatching(data.spec, OracleNetwork)
    facts = replace(stateful.describe(), likelihood="none")  # as of ARFlow, whose steps see those before
    stateful.describe = lambda: facts
    assert ask(stateful, data) is None
    assert MapError().expected(Prospect(data.spec, stateful)) == ()
    assert MapError(100).measure(known(given={JumpErrors(100): None})) == []
    assert MapError().expected(Prospect(IMAGES, build("tarflow", IMAGES))) == ()
    consistency = FlowMap(data.spec, OracleNetwork, map_objective=ConsistencyTraining())
    assert MapError().expected(Prospect(data.spec, consistency)) == ("map_error",)
    assert ask(consistency, data).of_jumps is None
    to_data = FlowMap(data.spec, OracleNetwork, jump_times=JumpsToData())
    assert MapError().expected(Prospect(data.spec, to_data)) == ("map_error",)
    assert ask(to_data, data).of_jumps is None
    mapped = FlowMap(data.spec, OracleNetwork)
    assert MapError().expected(Prospect(data.spec, mapped)) == ("map_error", "composition_error")
    assert MapError().expected(Prospect(data.spec, mapped, swept="network_evaluations")) == ("map_error",)
    assert MapError().expected(Prospect(data.spec, mapped, swept="guidance")) == ()


def test_latents_are_measured_where_the_flow_lives(data):
    images = FlowDataModule("digits", batch_size=16)
    images.setup("test")
    found = ask(build("map", images.spec), images)
    assert found.space == images.spec.unit_name
    assert found.of_samples.shape == found.of_jumps.shape == (100,)
