"""What an experiment requires is trained on the data of that experiment."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowbench.config import Experiment, compose, fingerprint, to_yaml

IMAGES = Path(__file__).parents[2] / "experiments" / "images" / "tiny"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A flow that requires a teacher, which requires an autoencoder; each names its own data."""
    (tmp_path / "flow.yaml").write_text(
        "data: {dataset: digits, batch_size: 32, random_flip: true}\nrequires: {teacher: teacher.yaml}\n"
    )
    (tmp_path / "teacher.yaml").write_text(
        "data: {dataset: digits, batch_size: 64}\nname: '${data.dataset}'\nbudget: {steps: 5}\n"
        "requires: {autoencoder: autoencoder.yaml}\n"
    )
    (tmp_path / "autoencoder.yaml").write_text("data: {dataset: eight_gaussians, batch_size: 16, seed: 3}\n")
    return tmp_path


def data_of(resolved: dict) -> list[dict]:
    """The data of the flow, its teacher and the teacher's autoencoder."""
    teacher = resolved["requires"]["teacher"]
    return [resolved["data"], teacher["data"], teacher["requires"]["autoencoder"]["data"]]


def test_the_same_data_set_leaves_a_required_file_as_it_is(files):
    flow, teacher, autoencoder = data_of(compose([files / "flow.yaml"]).resolved)
    assert flow == {"dataset": "digits", "batch_size": 32, "random_flip": True}
    assert teacher == {"dataset": "digits", "batch_size": 64}
    assert autoencoder == {"dataset": "digits", "batch_size": 16, "seed": 3}  # the teacher's, not its own


def test_an_override_of_the_data_set_reaches_everything_that_is_required(files):
    resolved = compose([files / "flow.yaml"], ["data.dataset=moons", "data.label_noise=0.5"]).resolved
    assert data_of(resolved)[1:] == [
        {"dataset": "moons", "random_flip": True, "label_noise": 0.5, "batch_size": 64},
        {"dataset": "moons", "random_flip": True, "label_noise": 0.5, "batch_size": 16, "seed": 3},
    ]
    assert resolved["requires"]["teacher"]["name"] == "moons"  # what refers to the data refers to these


@pytest.mark.parametrize("order", [1, -1])
def test_an_override_inside_of_what_is_required_changes_nothing_else(files, order):
    overrides = ["data.dataset=moons", "requires.teacher.budget.steps=7"][::order]
    resolved = compose([files / "flow.yaml"], overrides).resolved
    assert [section["dataset"] for section in data_of(resolved)] == ["moons"] * 3
    assert resolved["requires"]["teacher"]["budget"] == {"steps": 7}


def test_other_data_can_be_named_for_what_is_required(files):
    resolved = compose([files / "flow.yaml"], ["requires.teacher.data.dataset=moons"]).resolved
    assert resolved["data"]["dataset"] == "digits"
    assert resolved["requires"]["teacher"]["data"] == {"dataset": "moons", "batch_size": 64}


def test_a_saved_configuration_keeps_what_it_holds(files):
    """A run of an earlier version may have had an autoencoder of other data; testing it must not train a new one."""
    resolved = compose([files / "flow.yaml"], ["requires.teacher.data.dataset=moons"]).resolved
    (files / "config.yaml").write_text(to_yaml(resolved))
    assert compose([files / "config.yaml"]).resolved == resolved


def test_a_file_without_data_is_trained_on_what_the_flow_is_trained_on(files):
    (files / "autoencoder.yaml").write_text("budget: {steps: 1}\n")
    (files / "bare.yaml").write_text("requires: {autoencoder: autoencoder.yaml}\ndata: {dataset: npz, path: a$b.npz}\n")
    assert compose([files / "bare.yaml"], identify=False).resolved["requires"]["autoencoder"]["data"] == {
        "dataset": "npz",
        "path": "a$b.npz",
    }
    (files / "bare.yaml").write_text("requires: {autoencoder: autoencoder.yaml}\n")
    assert "data" not in compose([files / "bare.yaml"]).resolved["requires"]["autoencoder"]


def test_no_data_set_is_the_default_one_for_both(files):
    (files / "bare.yaml").write_text("requires: {autoencoder: autoencoder.yaml}\ndata: {batch_size: 8}\n")
    needed = compose([files / "bare.yaml"]).resolved["requires"]["autoencoder"]
    assert needed["data"] == {"batch_size": 16, "seed": 3}


def test_contenders_of_one_data_set_share_one_autoencoder():
    overrides = ["data.dataset=mnist"]
    needed = {
        Experiment.from_files([IMAGES / f"{name}.yaml"], overrides).requirements["autoencoder"].fingerprint
        for name in ("starflow", "latent_cfm", "latent_cfm_conditional")
    }
    assert needed == {fingerprint(compose([IMAGES / "autoencoder.yaml"], overrides).resolved)}
