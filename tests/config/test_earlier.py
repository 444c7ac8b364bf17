"""Files and saved runs of earlier versions."""

from __future__ import annotations

import importlib

import pytest

from flowbench.config import compose, fingerprint
from flowbench.config.earlier_names import MOVED, with_earliest_names, with_present_names
from flowbench.config.imports import import_class

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
