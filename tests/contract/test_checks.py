"""The contract as ``flowbench check`` runs it: on every family, and on families with one planted fault each."""

from __future__ import annotations

import pytest
import torch

from flowbench.cli import main
from flowbench.families import FlowSamples
from flowbench.families.family_contract import CHECKS, Case, Inapplicable, check_family
from flowbench.training import AdamW

from . import outside as dummies
from .builders import CASES, IDS, POINTS, WITHOUT_DENSITY, build, late
from .outside import outside

# With labels too: what they change.
OF_LABELS = ("gradients", "samples", "density")


def cases() -> list:
    found = []
    for (name, spec), own in zip(CASES, IDS, strict=True):
        for conditional in (False, True):
            for check in CHECKS:
                marks = [pytest.mark.slow] if conditional and check not in OF_LABELS else late(own)
                suffix = "-conditional" if conditional else ""
                found.append(pytest.param(name, spec, conditional, check, id=f"{own}{suffix}-{check}", marks=marks))
    return found


@pytest.mark.parametrize(("name", "spec", "conditional", "check"), cases())
def test_every_family_keeps_the_contract(name, spec, conditional, check):
    reason = ""
    try:
        CHECKS[check](Case(lambda: build(name, spec, conditional=conditional), spec, conditional))
    except Inapplicable as found:
        reason = str(found)
    if reason:
        assert name in WITHOUT_DENSITY or check not in {"density", "inverse", "precision"}, reason
        pytest.skip(reason)


def test_most_checks_apply_to_a_family_in_the_plane():
    outcomes = list(check_family(Case(lambda: build("tarflow", POINTS), POINTS)))
    assert [outcome.name for outcome in outcomes] == list(CHECKS)
    assert {outcome.status for outcome in outcomes} == {"ok"}


def random_density(self, x, *_):
    return self.source.log_prob(x - self.shift) + torch.rand(len(x))


def of_the_batch(self, noise, *_):
    return FlowSamples(noise + self.shift + noise.mean(0), 1.0)


def counting_loss(self, x, *_):
    if self.training:
        self.kept = self.kept + 0.5  # a plain tensor, in no state_dict
    return dummies.Loss((x + self.shift + self.kept).square().mean())


def of_autocast(self, x, condition=None, *, index=None, seed=0):
    return (x @ torch.eye(2)).float().square().sum(1) + self.shift.sum().detach()


FAULTS = {
    "training step": {"optimizer_config": property(lambda self: AdamW(lr=1e-30), lambda self, value: None)},
    "noise by index": {"draw_noise": lambda self, index, seed: torch.ones(len(index), 2)},
    "checkpoint": {
        "kept": torch.zeros(2),
        "loss": counting_loss,
        "flow_log_prob": lambda self, x, *_: self.source.log_prob(x - self.shift - self.kept),
    },
    "precision": {"log_prob": of_autocast},
    "copies": {"__deepcopy__": lambda self, memo: self},
    "gradients": {"loss": lambda self, x, *_: dummies.Loss(x.sum() + 0 * self.shift.sum())},
    "deterministic loss": {
        "loss": lambda self, x, *_: dummies.Loss((self.shift * torch.rand(2)).sum()),
    },
    "samples": {"flow_sample": lambda self, noise, *_: FlowSamples(noise + self.shift, 0.0)},
    "sample of a batch": {"flow_sample": of_the_batch},
    "density": {"flow_log_prob": random_density},
    "jacobian": {"flow_log_prob": lambda self, x, *_: self.source.log_prob(x - self.shift) + 0.5},
    "mass": {"flow_log_prob": lambda self, x, *_: self.source.log_prob(x - self.shift) - 0.3},
    "inverse": {"flow_encode": lambda self, z, _: z - 2 * self.shift},
    "path": {
        "trajectory": lambda self, noise, condition=None, num_points=33: dummies.Trajectory(
            torch.stack([noise, noise + 2 * self.shift]).detach(), torch.linspace(0.0, 1.0, 2)
        )
    },
}


def test_every_check_has_a_planted_fault():
    assert FAULTS.keys() == CHECKS.keys()


@pytest.mark.parametrize("check", FAULTS)
def test_a_planted_fault_is_found_and_explained_in_one_line(check):
    case = Case(lambda: outside(**FAULTS[check])(POINTS), POINTS)
    (found,) = [outcome for outcome in check_family(case) if outcome.name == check]
    assert found.status == "failed"
    assert found.reason
    assert "\n" not in found.reason


def test_the_command_names_every_check_and_fails_with_the_family(capsys, monkeypatch):
    monkeypatch.setattr(dummies, "Mine", outside(), raising=False)
    assert main(["check", "tests.contract.outside.Mine"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in CHECKS)
    assert text.strip().endswith("keeps the contract")
    monkeypatch.setattr(dummies, "Mine", outside(**FAULTS["mass"]), raising=False)
    assert main(["check", "tests.contract.outside.Mine", "training.ema.decay=0.5"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "the density integrates to 0.74" in text
    assert f"2 of {len(CHECKS)} checks failed" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tests.contract.outside.Nobody"], "has no class 'Nobody'"),
        (["flowbench.networks.MLP"], "model.class_path"),
        (["flowbench.families.TARFlow", "wdith=3"], "did you mean 'width'"),
    ],
)
def test_what_is_no_family_is_one_line(capsys, words, message):
    assert main(["check", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
