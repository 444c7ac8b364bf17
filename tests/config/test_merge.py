"""The one merge: a clash of kinds is one line with the key, both kinds, both texts and the remedy."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from flowbench.bench.plan import make_plan
from flowbench.cli import main
from flowbench.config import ConfigError, compose
from flowbench.config.merge import Layer, merge, set_key, without_marks
from flowbench.config.text import read_yaml

ROOT = Path(__file__).parents[2] / "experiments"
keys = st.sampled_from("abcd")
scalars = st.none() | st.booleans() | st.integers(0, 3) | st.sampled_from(["x", "y"])
trees = st.dictionaries(
    keys,
    st.recursive(scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=3)),
    max_size=4,
)


def clash(low, high) -> bool:
    """Whether a list meets a mapping somewhere, in either order."""
    if isinstance(low, dict) and isinstance(high, dict):
        return any(clash(low[key], high[key]) for key in low.keys() & high.keys())
    return {type(low), type(high)} == {dict, list}


@settings(max_examples=100, deadline=None)
@given(trees, trees)
def test_merging_is_what_omegaconf_merges_or_one_line(low, high):
    before = copy.deepcopy((low, high))
    if clash(low, high):
        with pytest.raises(ConfigError, match="cannot be merged into") as caught:
            merge(low, high)
        assert "\n" not in str(caught.value)
    else:
        wanted = OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(low), OmegaConf.create(high)))
        assert merge(low, high).tree == wanted
    assert (low, high) == before, "nothing is changed in place"


@settings(max_examples=100, deadline=None)
@given(trees, trees)
def test_a_marked_mapping_replaces_whatever_it_meets(low, high):
    marked = {"a": {**high, "_replace_": True}}
    assert without_marks(merge({"a": low, "b": 1}, marked).tree) == {"a": high, "b": 1}
    assert without_marks(merge({"a": [low]}, marked).tree) == {"a": high}
    assert without_marks(merge(low, {**high, "_replace_": True}).tree) == high


def test_a_mark_is_true_or_false():
    for word, replaces in (("yes", True), ("true", True), ("off", False), ("false", False)):
        high = read_yaml(f"a: {{_replace_: {word}, y: 2}}", "x")
        assert without_marks(merge({"a": {"x": 1}}, high).tree) == {"a": {"y": 2} if replaces else {"x": 1, "y": 2}}
    with pytest.raises(ConfigError, match=r"a\._replace_ is the value 'maybe' of mine; write true or false"):
        merge({"a": {}}, Layer.of({"a": {"_replace_": "maybe"}}, "mine"))


def test_a_mapping_changes_what_an_interpolation_names_in_its_own_place_alone():
    low = {"net": {"w": 1, "d": 2}, "a": "${net}", "b": "${net}"}
    assert merge(low, {"a": {"d": 3}}).tree == {"net": {"w": 1, "d": 2}, "a": {"w": 1, "d": 3}, "b": "${net}"}
    assert merge({"a": "${nowhere}"}, {"a": {"d": 3}}).tree == {"a": {"d": 3}}


def test_a_missing_value_leaves_what_is_there():
    assert merge({"a": 1}, {"a": "???", "b": "???"}).tree == {"a": 1, "b": "???"}


@pytest.mark.parametrize(
    ("low", "high", "line"),
    [
        (
            "trainer: {devices: 1}",
            "trainer: [1]",
            "trainer: a list of high.yaml cannot be merged into a mapping of low.yaml; write 'name: value' lines, "
            "or null to take it out",
        ),
        (
            "model: {init_args: {network: {class_path: x}}}",
            "model: [{class_path: y}]",
            "model: a list of high.yaml cannot be merged into a mapping of low.yaml; write",
        ),
        (
            "model: {init_args: {network: {class_path: x}}}",
            "model: {init_args: {network: [1, 2]}}",
            "model.init_args.network: a list of high.yaml cannot be merged into a mapping of low.yaml",
        ),
        (
            "evaluator: {curve: [fd]}",
            "evaluator: {curve: {fd: true}}",
            "evaluator.curve: a mapping of high.yaml cannot be merged into a list of low.yaml; write a list, or "
            "_replace_: true in the mapping to replace the list",
        ),
    ],
)
def test_files_that_clash_are_one_line_with_both_names(tmp_path, monkeypatch, low, high, line):
    monkeypatch.chdir(tmp_path)
    Path("low.yaml").write_text(low)
    Path("middle.yaml").write_text("seed: 1\n")
    Path("high.yaml").write_text(high)
    Path("leaf.yaml").write_text("base: [low.yaml, middle.yaml]\n" + high)
    for files, name in ((["low.yaml", "middle.yaml", "high.yaml"], "high.yaml"), (["leaf.yaml"], "leaf.yaml")):
        with pytest.raises(ConfigError) as caught:
            compose(files)
        wanted = line.replace("high.yaml", name).replace("of ", f"of {tmp_path}/")
        assert str(caught.value).startswith(wanted)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be merged into"):
        compose(["leaf.yaml"])


@pytest.mark.parametrize("bench", ["toy_2d", "wcfm_epsilon"])
@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("problems=[]", "problems is []; write {name: {overrides:"),
        ("contenders=[a]", "contenders is ['a']; name at least one"),
        ("seeds={a: 1}", "seeds: unknown key 'a'; known: all, axes"),
        ("seeds=[0,1", "override 'seeds=[0,1': '[0,1' is not a YAML value: expected ',' or ']'"),
        ("budget=[1]", "budget is [1]; give exactly one of"),
        ("claims={a: 1}", "claims is {'a': 1}; write a list of lines"),
        ("contenders.cfm={experiment: toy/cfm.yaml, overrides: 3}", "overrides is 3; write a mapping"),
        ("contenders.cfm={experiment: toy/cfm.yaml, overrides: {model: [1]}}", "model: a list of"),
        ("contenders.cfm={experiment: toy/cfm.yaml, overrides: {trainer: [1]}}", "trainer: a list of"),
        ("seeds", "override 'seeds' has no value; write key=value"),
        ("a..b=1", "'a..b' is not a key"),
        ("seeds=&a [*a]", "a value contains itself"),
    ],
)
def test_bench_text_that_clashes_is_one_line(capsys, bench, override, line):
    assert main(["bench", "-c", str(ROOT / f"{bench}.yaml"), override, "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert line in captured.err
    assert captured.out == ""


def test_a_list_of_a_bench_over_a_mapping_of_its_experiment_names_both():
    text = "contenders.cfm={experiment: toy/cfm.yaml, overrides: {model.init_args.network: [1, 2]}}"
    with pytest.raises(ValueError, match=r"contender 'cfm': model\.init_args\.network: a list of ") as caught:
        make_plan(ROOT / "toy_2d.yaml", [text])
    assert re.search(r"toy_2d\.yaml cannot be merged into a mapping of \S+toy/mlp\.yaml", str(caught.value))


def test_a_mapping_given_to_a_bench_merges_into_its_file():
    plan = make_plan(
        ROOT / "toy_2d.yaml", ["sweep={network_evaluations: [1, 2]}", "problems.gaussian-moons.reason=null"]
    )
    assert plan.bench.sweep == {"network_evaluations": [1, 2]}
    assert len(plan.bench.problems) == 3
    plan = make_plan(ROOT / "toy_2d.yaml", ["contenders={again: toy/cfm.yaml}", "problems=null", "claims=null"])
    assert [c.name for c in plan.bench.contenders] == ["cfm", "ot_cfm", "wcfm", "tarflow", "again"]


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(trees, st.lists(keys, min_size=1, max_size=4), scalars)
def test_setting_a_key_is_what_omegaconf_updates(tree, parts, value):
    key = ".".join(parts)
    wanted = OmegaConf.create(copy.deepcopy(tree))
    try:
        OmegaConf.update(wanted, key, value, merge=False, force_add=True)
        expected = OmegaConf.to_container(wanted)
    except Exception:  # a name used on a list
        with pytest.raises(ConfigError, match="cannot be set"):
            set_key(tree, key, value)
        return
    set_key(tree, key, value)
    assert tree == expected
