"""What is drawn from a flow carries its labels, and paths carry what applies to them."""

from __future__ import annotations

import math

import pytest
import torch

from flowbench.data import FlowDataModule
from flowbench.evaluation.drawing import Drawing, Imposed, draw_paths, draw_samples, labels_of
from flowbench.families import FlowModule, Trajectory
from flowbench.metrics import block_geometry, path_geometry
from flowbench.metrics.features import NormFeatures

from ..contract.builders import build


def drawing(name: str, *, conditional: bool = False, num: int = 10) -> Drawing:
    data = FlowDataModule("moons", batch_size=16)
    return Drawing(build(name, data.spec, conditional=conditional).eval(), data, 3, num, 4, "val")


def drawn(name: str, conditional: bool, imposed: Imposed | None = None):
    given = drawing(name, conditional=conditional)
    with torch.no_grad():
        return given, draw_samples(given, {"norm": NormFeatures()}, {"norm": 10}, 5, imposed)[0]


def test_samples_of_a_conditional_flow_know_their_labels_in_a_sweep_too():
    for imposed in (None, Imposed(network_evaluations=2), Imposed(guidance=2.0)):
        given, samples = drawn("cfm", True, imposed)
        assert torch.equal(samples.label, labels_of(given))
        assert samples.label.shape == (10,)


def test_samples_of_an_unconditional_flow_have_none():
    assert drawn("cfm", False)[1].label is None


def test_norms_are_kept_of_every_sample():
    given, samples = drawn("cfm", False)
    with torch.no_grad():
        x = torch.cat([given.sample(part, None).x for part in torch.arange(10).split(4)])
    expected = (x.double().square().sum(1) / 2).sqrt().float()
    torch.testing.assert_close(samples.features(NormFeatures())[:, 0], expected)


@pytest.mark.parametrize("name", ["cfm", "tarflow"])
def test_paths_are_measured_as_what_they_are(name):
    given = drawing(name)
    paths = draw_paths(given, 9, 7, 2)
    whole = given.flow.trajectory(given.flow.draw_noise(torch.arange(9), 3), None, 7)
    if name == "cfm":
        expected = path_geometry(whole.states, whole.velocities, whole.times)
    else:
        expected = block_geometry(whole.states, whole.times)
    assert paths.geometry.tensors.keys() == expected.tensors.keys()
    assert ("curvature" in paths.geometry.tensors) == (name == "cfm")
    for key, value in expected.tensors.items():
        torch.testing.assert_close(paths.geometry.tensors[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("continuous", [True, False])
def test_paths_that_diverged_have_the_same_rows_without_a_number(monkeypatch, continuous):
    given = drawing("cfm")
    states = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    states[1, 2, 0] = math.inf

    def broken(self: FlowModule, *args, **kwargs) -> Trajectory:
        return Trajectory(states, torch.linspace(0, 1, 3), torch.ones_like(states) if continuous else None)

    monkeypatch.setattr(type(given.flow), "trajectory", broken)
    summary = draw_paths(given, 4, 3, 1).geometry.mean()
    assert all(math.isnan(summary[name]) for name in ("straightness", "path_energy", "displacement", "length"))
    assert ("one_step_error" in summary) == continuous
