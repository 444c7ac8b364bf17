"""Files and saved runs of earlier versions."""

from __future__ import annotations

import importlib

import pytest
from lightning import LightningModule

from flowbench.config import ConfigError, Experiment, compose, fingerprint
from flowbench.config.earlier_names import MOVED, with_earliest_names, with_present_names
from flowbench.config.imports import import_class
from flowbench.config.overrides import parse_override

STREAM = {"class_path": "flowbench.families.StreamPairing", "init_args": {"oversample": 8}}


@pytest.mark.parametrize("old", MOVED)
def test_a_class_that_moved_is_found_under_its_old_name(old):
    module, _, name = MOVED[old].rpartition(".")
    assert import_class("model", old) is getattr(importlib.import_module(module), name)
    with pytest.raises((AttributeError, ModuleNotFoundError)):  # or the entry is not needed
        getattr(importlib.import_module(old.rpartition(".")[0]), name)


@pytest.mark.parametrize("old", MOVED)
def test_a_class_that_moved_keeps_its_fingerprint(old, tmp_path):
    for name in (old, MOVED[old]):
        (tmp_path / f"{name}.yaml").write_text(f"trainer: {{strategy: {{class_path: {name}}}}}\n")
    before, now = (compose([tmp_path / f"{name}.yaml"]).resolved for name in (old, MOVED[old]))
    assert before == now == {"trainer": {"strategy": {"class_path": MOVED[old]}}}
    assert with_earliest_names(now) == {"trainer": {"strategy": {"class_path": old}}}
    assert fingerprint(now) == fingerprint({"trainer": {"strategy": {"class_path": old}}})


def test_a_rule_that_makes_pairs_has_a_key_of_its_own():
    exact = {"class_path": "flowbench.flows.OptimalTransportCoupling"}
    tree = {"a": [{"coupling": STREAM}], "model.init_args.coupling": STREAM, "coupling": exact}
    assert with_present_names(tree) == {
        "a": [{"pairing": STREAM}],
        "model.init_args.pairing": STREAM,
        "coupling": exact,
    }


def test_a_rule_that_makes_pairs_keeps_its_fingerprint():
    model = {"class_path": "flowbench.families.OTCFM"}
    before, now = ({"model": {**model, "init_args": {key: STREAM}}} for key in ("coupling", "pairing"))
    assert with_present_names(before) == now
    assert with_earliest_names(now) == before
    assert fingerprint(now) == fingerprint(before)


def test_the_problem_of_a_run_was_once_called_its_task():
    assert with_present_names({"run": {"bench": "b", "task": "moons"}}) == {"run": {"bench": "b", "problem": "moons"}}


def test_an_override_of_an_earlier_version_is_read(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model: {class_path: flowbench.families.OTCFM}\n")
    found = compose([file], ["model.init_args.coupling={class_path: flowbench.families.StreamPairing}"]).resolved
    assert found["model"]["init_args"] == {"pairing": {"class_path": "flowbench.families.StreamPairing"}}


# ---- the arguments that every module had, now `training` ------------------------------------------------

TARFLOW = "flowbench.families.TARFlow"
ARGUMENTS = "model.init_args"
FORMER = {"width": 16, "optimizer": {"lr": 0.01}, "ema_decay": 0.5, "compile": True}
NOW = {"width": 16, "training": {"optimizer": {"lr": 0.01}, "ema": {"decay": 0.5}, "compile": True}}


def experiment(arguments: dict, class_path: str = TARFLOW) -> dict:
    return {"data": {"dataset": "digits"}, "model": {"class_path": class_path, "init_args": arguments}}


def test_the_training_of_a_module_has_an_argument_of_its_own():
    bench = {f"{ARGUMENTS}.optimizer": {"lr": 0.1}, f"{ARGUMENTS}.ema_decay": 0.9, "model": {"init_args": FORMER}}
    assert with_present_names({"a": [experiment(FORMER)], "requires": {"b": experiment(FORMER)}, "c": bench}) == {
        "a": [experiment(NOW)],
        "requires": {"b": experiment(NOW)},
        "c": {
            f"{ARGUMENTS}.training.optimizer": {"lr": 0.1},
            f"{ARGUMENTS}.training.ema.decay": 0.9,
            "model": {"init_args": NOW},
        },
    }


def test_networks_and_other_objects_keep_arguments_of_these_names():
    tree = {"callbacks": {"a": {"init_args": FORMER}}, "model": {"init_args": {"network": {"init_args": FORMER}}}}
    assert with_present_names(tree) == tree
    assert with_earliest_names(tree) == tree


def test_the_training_of_a_module_keeps_its_fingerprint():
    """As the version computed it that knew no other form."""
    budget = {"budget": {"steps": 3}}
    assert fingerprint({**experiment(FORMER), **budget}) == "9eab99567a5d"
    assert fingerprint({**experiment(NOW), **budget}) == "9eab99567a5d"
    assert fingerprint(experiment({"training": {"ema": {}}})) == fingerprint(experiment({}))
    assert fingerprint({"requires": {"a": experiment(NOW)}}) == fingerprint({"requires": {"a": experiment(FORMER)}})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{ARGUMENTS}.optimizer.lr=0.1", (f"{ARGUMENTS}.training.optimizer.lr", 0.1)),
        (f"{ARGUMENTS}.ema_decay=0.5", (f"{ARGUMENTS}.training.ema.decay", 0.5)),
        (f"requires.a.{ARGUMENTS}.compile=true", (f"requires.a.{ARGUMENTS}.training.compile", True)),
        (f"contenders.a.overrides.{ARGUMENTS}.optimizer.betas[0]=0.5",
         (f"contenders.a.overrides.{ARGUMENTS}.training.optimizer.betas[0]", 0.5)),
        (f"{ARGUMENTS}={{ema_decay: 0.5}}", (ARGUMENTS, {"training": {"ema": {"decay": 0.5}}})),
        (f"{ARGUMENTS}.width=${{{ARGUMENTS}.optimizer.lr}}",
         (f"{ARGUMENTS}.width", f"${{{ARGUMENTS}.training.optimizer.lr}}")),
        (f"{ARGUMENTS}.optimizer_of_mine=1", (f"{ARGUMENTS}.optimizer_of_mine", 1)),
    ],
)  # fmt: skip
def test_an_override_of_the_training_is_read_by_its_earlier_key(text, expected):
    assert parse_override(text) == expected


def test_a_file_of_an_earlier_version_changes_one_of_this_and_the_other_way_round(tmp_path):
    (tmp_path / "now.yaml").write_text(
        f"model: {{class_path: {TARFLOW}, init_args: {{training: {{compile: true}}}}}}\n"
    )
    (tmp_path / "old.yaml").write_text("base: [now.yaml]\nmodel: {init_args: {optimizer: {lr: 1.0}, ema_decay: 0.5}}\n")
    (tmp_path / "new.yaml").write_text("base: [old.yaml]\nmodel: {init_args: {training: {optimizer: {lr: 2.0}}}}\n")
    found = compose([tmp_path / "new.yaml"], [f"{ARGUMENTS}.optimizer.eps=0.1"]).resolved["model"]["init_args"]
    assert found == {"training": {"optimizer": {"lr": 2.0, "eps": 0.1}, "ema": {"decay": 0.5}, "compile": True}}


def test_a_setting_by_both_names_costs_one_line():
    for tree in (
        experiment({"optimizer": {}, "training": {"optimizer": {}}}),
        experiment({"ema_decay": 0.5, "training": {"ema": 0.5}}),
        {f"{ARGUMENTS}.compile": True, f"{ARGUMENTS}.training.compile": True},
    ):
        with pytest.raises(ConfigError, match=r"is the earlier name of .*, and both are given; leave out ") as caught:
            with_present_names(tree)
        assert "\n" not in str(caught.value)


class WithItsOwn(LightningModule):
    """A family of another package, written before there was `training`."""

    def __init__(self, spec, ema_decay: float = 0.9, *, optimizer: str = "lion") -> None:
        super().__init__()
        self.given = (ema_decay, optimizer)


def test_a_class_that_has_these_arguments_itself_is_given_them(tmp_path):
    arguments = {"ema_decay": 0.5, "optimizer": "adam"}
    file = tmp_path / "a.yaml"
    file.write_text(
        f"data: {{dataset: digits}}\nmodel: {{class_path: {__name__}.WithItsOwn, init_args: {{ema_decay: 0.5}}}}"
    )
    read = Experiment.from_files([file], [f"{ARGUMENTS}.optimizer=adam"])
    assert read.resolved["model"]["init_args"] == arguments
    assert read.build_model(None).given == (0.5, "adam")
    assert read.fingerprint == fingerprint(experiment(arguments, f"{__name__}.WithItsOwn"))
