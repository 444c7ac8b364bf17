"""What is drawn from a flow carries its labels, and paths carry what applies to them."""

from __future__ import annotations

import math

import pytest
import torch

from flowbench.data import FlowDataModule
from flowbench.evaluation import Samples, Setup
from flowbench.evaluation.override import SamplerOverride
from flowbench.families import FlowModule, Trajectory
from flowbench.metrics import block_geometry, path_geometry
from flowbench.metrics.features import NormFeatures
from flowbench.tasks.generation.paths import Paths

from ...contract.builders import build
from ...evaluation.setups import setup_of


def asked(name: str, *, conditional: bool = False, **options) -> Setup:
    data = FlowDataModule("moons", batch_size=16)
    module = build(name, data.spec, conditional=conditional).eval()
    settings = {"seed": 3, "num_samples": 10, "batch_size": 4, "extractors": {"norm": NormFeatures()}}
    return setup_of(module, data, reference="val", **{**settings, **options})


def drawn(name: str, conditional: bool, override: SamplerOverride | None = None):
    setup = asked(name, conditional=conditional, override=override or SamplerOverride())
    with torch.no_grad():
        return setup, Samples.with_features("norm", None).ask(setup).samples


def test_samples_of_a_conditional_flow_know_their_labels_in_a_sweep_too():
    for override in (None, SamplerOverride(network_evaluations=2), SamplerOverride(guidance=2.0)):
        setup, samples = drawn("cfm", True, override)
        assert torch.equal(samples.label, setup.module.labels_of_samples(setup))
        assert samples.label.shape == (10,)


def test_samples_of_an_unconditional_flow_have_none():
    assert drawn("cfm", False)[1].label is None


def test_norms_are_kept_of_every_sample():
    setup, samples = drawn("cfm", False)
    with torch.no_grad():
        x = torch.cat([setup.module.sample_at(part, setup).x for part in torch.arange(10).split(4)])
    expected = (x.double().square().sum(1) / 2).sqrt().float()
    torch.testing.assert_close(samples.features(NormFeatures())[:, 0], expected)


@pytest.mark.parametrize("name", ["cfm", "tarflow"])
def test_paths_are_measured_as_what_they_are(name):
    setup = asked(name, num_paths=9, path_points=7, num_pictures=2)
    paths, flow = Paths().ask(setup), setup.module
    whole = flow.trajectory(flow.draw_noise(torch.arange(9), 3), None, 7)
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
    setup = asked("cfm", num_paths=4, path_points=3, num_pictures=1)
    states = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    states[1, 2, 0] = math.inf

    def broken(self: FlowModule, *args, **kwargs) -> Trajectory:
        return Trajectory(states, torch.linspace(0, 1, 3), torch.ones_like(states) if continuous else None)

    monkeypatch.setattr(type(setup.module), "trajectory", broken)
    summary = Paths().ask(setup).geometry.mean()
    assert all(math.isnan(summary[name]) for name in ("straightness", "path_energy", "displacement", "length"))
    assert ("one_step_error" in summary) == continuous
