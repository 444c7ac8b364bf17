from __future__ import annotations

import contextlib
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from flowbench.config import ConfigError, compose, fingerprint, to_yaml
from flowbench.config.overrides import parse_override
from flowbench.config.text import plain

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=12),
    st.sampled_from(["1e-3", "null", "on", "0x10", "1:30", "~", "${a}", "x ${b.c}", "2020-01-01", "-", "1_000"]),
)
keys = st.text("abcdefgh_", min_size=1, max_size=6).filter(lambda k: k not in ("base", "requires"))
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=10,
)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("a.b=1e-3", "a.b", 0.001),
        ("--a=4e12", "a", 4e12),
        ("a=[1, 2]", "a", [1, 2]),
        ("a={x: 1, y: [true]}", "a", {"x": 1, "y": [True]}),
        ("a=null", "a", None),
        ("a=", "a", None),
        ("a='1'", "a", "1"),
        ("a=x=y", "a", "x=y"),
        ("a=-3", "a", -3),
        ("a=${b.c}", "a", "${b.c}"),
        ("a[0].b=text with spaces", "a[0].b", "text with spaces"),
        ("a=/tmp/x.npz", "a", "/tmp/x.npz"),
        ("a=inf", "a", "inf"),
        ("a=.inf", "a", math.inf),
    ],
)
def test_override_values_are_read_as_yaml(text, key, value):
    parsed_key, parsed = parse_override(text)
    assert (parsed_key, parsed) == (key, value)
    assert type(plain(parsed)) is type(value)


@settings(max_examples=60, deadline=None)
@given(trees)
def test_json_text_of_any_value_is_read_back(value):
    # JSON is a subset of YAML's flow style, and an encoder that knows nothing of OmegaConf.
    text = json.dumps(value)
    if "${" in text:  # OmegaConf's own: an interpolation, or refused as a malformed one
        with contextlib.suppress(ConfigError):
            assert parse_override(f"a.b={text}")[0] == "a.b"
        return
    assert parse_override(f"a.b={text}") == ("a.b", value)


@pytest.mark.parametrize("text", ["abc", "=3", "a..b=1", ".a=1", "a b=1", "a[x]=1", "a.=1", ""])
def test_malformed_overrides_are_refused(text):
    with pytest.raises(ConfigError, match="override"):
        parse_override(text)


def test_a_value_that_is_not_yaml_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"override 'a=\[1, 2': '\[1, 2' is not a YAML value") as caught:
        parse_override("a=[1, 2")
    assert "\n" not in str(caught.value)


def test_files_bases_and_overrides_win_in_order(write):
    write("base/one.yaml", "a: 1\nb: 1\nc: 1\nd: 1\ne: 1\nlist: [1, 2, 3]\nnest: {x: 1, y: 1}\n")
    write("base/two.yaml", "b: 2\nc: 2\nd: 2\ne: 2\n")
    write("first.yaml", "base: [base/one.yaml, base/two.yaml]\nc: 3\nd: 3\ne: 3\nlist: [4]\nnest: {y: 2}\n")
    write("second.yaml", "d: 4\ne: 4\n")
    resolved = compose(["first.yaml", "second.yaml"], ["e=5"]).resolved
    assert resolved == {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "list": [4], "nest": {"x": 1, "y": 2}}


def test_a_base_may_be_one_name_and_is_found_beside_its_file(write, tmp_path):
    write("deep/er/leaf.yaml", "base: ../mid.yaml\na: 1\n")
    write("deep/mid.yaml", "base: [../top.yaml]\nb: ${a}\n")
    write("top.yaml", "c: ${b}\n")
    assert compose([tmp_path / "deep/er/leaf.yaml"]).resolved == {"a": 1, "b": 1, "c": 1}


def test_two_files_may_share_a_base(write):
    write("root.yaml", "a: 1\n")
    write("left.yaml", "base: root.yaml\nb: 1\n")
    write("right.yaml", "base: root.yaml\nc: 1\n")
    write("leaf.yaml", "base: [left.yaml, right.yaml]\n")
    assert compose(["leaf.yaml"]).resolved == {"a": 1, "b": 1, "c": 1}


def test_interpolation_sees_other_files_and_overrides(write):
    write("base.yaml", "width: 8\nhead: {dim: '${width}'}\n")
    write("leaf.yaml", "base: base.yaml\nname: w${width}-${head.dim}\n")
    assert compose(["leaf.yaml"], ["width=32"]).resolved["name"] == "w32-32"
    assert compose(["leaf.yaml"], ["head.dim=${name2}", "name2=x"]).resolved["name"] == "w8-x"


def test_environment_is_interpolated(write, monkeypatch):
    monkeypatch.setenv("FLOWBENCH_TEST", "here")
    write("a.yaml", "a: ${oc.env:FLOWBENCH_TEST}/x\nb: '${oc.env:FLOWBENCH_NONE,fallback}'\n")
    assert compose(["a.yaml"]).resolved == {"a": "here/x", "b": "fallback"}


def test_overrides_reach_list_items_and_make_missing_mappings(write):
    write("a.yaml", "items: [{w: 1}, {w: 2}]\n")
    resolved = compose(["a.yaml"], ["items[0].w=5", "items.1.w=6", "new.inner.key=7"]).resolved
    assert resolved == {"items": [{"w": 5}, {"w": 6}], "new": {"inner": {"key": 7}}}


def test_an_override_replaces_a_mapping_and_the_last_one_wins(write):
    write("a.yaml", "m: {x: 1, y: 2}\n")
    assert compose(["a.yaml"], ["m={z: 3}"]).resolved == {"m": {"z": 3}}
    assert compose(["a.yaml"], ["m.x=3", "--m.x=4"]).resolved["m"] == {"x": 4, "y": 2}


def test_replace_cuts_what_was_inherited(write):
    write("base.yaml", "net: {class_path: a.UNet, init_args: {channels: 4}}\nk: 1\n")
    write("leaf.yaml", "base: base.yaml\nnet: {_replace_: true, class_path: a.DiT, init_args: {depth: 2}}\n")
    resolved = compose(["leaf.yaml"]).resolved
    assert resolved == {"k": 1, "net": {"class_path": "a.DiT", "init_args": {"depth": 2}}}


def test_null_removes_a_named_entry(write):
    write("base.yaml", "callbacks: {a: {x: 1}, b: {x: 2}}\nevaluator: {metrics: {fd: {x: 1}, kd: {x: 1}}}\n")
    write("leaf.yaml", "base: base.yaml\ncallbacks: {a: null}\n")
    resolved = compose(["leaf.yaml"], ["evaluator.metrics.kd=null"]).resolved
    assert resolved == {"callbacks": {"b": {"x": 2}}, "evaluator": {"metrics": {"fd": {"x": 1}}}}


@pytest.mark.parametrize(
    ("own", "overrides", "expected"),
    [
        ("", [], {"budget": {"steps": 10}}),
        ("budget: {train_flops: 4e12}", [], {"budget": {"train_flops": 4e12}}),
        ("trainer: {max_steps: 7}", [], {"trainer": {"max_steps": 7}}),
        ("trainer: {max_steps: 7}", ["budget.epochs=2"], {"budget": {"epochs": 2}, "trainer": {}}),
        ("", ["trainer.max_steps=500"], {"trainer": {"max_steps": 500}}),
        ("", ["trainer.max_steps=-1"], {"budget": {"steps": 10}, "trainer": {"max_steps": -1}}),
        ("", ["budget.steps=500"], {"budget": {"steps": 500}}),
    ],
)
def test_the_last_layer_that_names_a_budget_replaces_earlier_ones(write, own, overrides, expected):
    write("base.yaml", "budget: {steps: 10}\n")
    write("leaf.yaml", f"base: base.yaml\nx: 1\n{own}\n")
    assert compose(["leaf.yaml"], overrides).resolved == {"x": 1, **expected}


def test_two_budgets_in_one_layer_stay_for_the_validation_to_refuse(write):
    write("a.yaml", "budget: {steps: 1}\ntrainer: {max_steps: 2}\n")
    assert compose(["a.yaml"]).resolved == {"budget": {"steps": 1}, "trainer": {"max_steps": 2}}


def test_requires_is_found_beside_its_file_and_inlined(write, tmp_path):
    write("parts/common.yaml", "requires: {autoencoder: ae.yaml}\n")
    write("parts/ae.yaml", "base: ../shared.yaml\nwidth: ${k}\n")
    write("shared.yaml", "k: 4\n")
    write("leaf.yaml", "base: parts/common.yaml\nk: 9\n")
    composed = compose(["leaf.yaml"])
    assert composed.source["requires"]["autoencoder"] == str(tmp_path / "parts" / "ae.yaml")
    assert composed.resolved == {"k": 9, "requires": {"autoencoder": {"k": 4, "width": 4}}}


def test_requires_takes_a_mapping_an_override_and_null(write):
    write("ae.yaml", "k: 4\ndepth: {x: 1}\n")
    write("a.yaml", "k: 9\nrequires: {one: {base: ae.yaml, k: 5}, two: ae.yaml}\n")
    resolved = compose(["a.yaml"], ["requires.two.depth.x=2"]).resolved
    assert resolved["requires"] == {"one": {"k": 5, "depth": {"x": 1}}, "two": {"k": 4, "depth": {"x": 2}}}
    assert compose(["a.yaml"], ["requires.one=null"]).resolved["requires"].keys() == {"two"}
    assert compose(["a.yaml"], ["requires.two=ae.yaml"]).resolved["requires"]["two"]["k"] == 4


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(keys, trees, min_size=1, max_size=4))
def test_printed_configuration_composes_to_itself(tmp_path, tree):
    tree = {k: v for k, v in tree.items() if k not in ("callbacks", "loggers")}
    (tmp_path / "printed.yaml").write_text(to_yaml({"z": 1, **tree}))
    assert compose([tmp_path / "printed.yaml"]).resolved == {"z": 1, **tree}


def test_source_keeps_interpolations_and_composes_to_the_same(write):
    write("ae.yaml", "k: 1\n")
    write("sub/a.yaml", "base: b.yaml\nx: ${y}\nrequires: {autoencoder: ../ae.yaml}\n")
    write("sub/b.yaml", "y: 3\n")
    composed = compose(["sub/a.yaml"], ["y=4"])
    assert "x: ${y}" in composed.source_yaml
    write("other/copy.yaml", composed.source_yaml)
    assert compose(["other/copy.yaml"]).resolved == composed.resolved


def _fails(files: list[str], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(files, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_file_and_an_empty_name():
    assert "add -c FILE" in _fails([])
    assert "-c got an empty file name" in _fails([""])


def test_a_missing_file_is_named_with_its_nearest_neighbour(write):
    write("wcfm.yaml", "a: 1\n")
    assert re.search(r"file wcmf.yaml does not exist; did you mean 'wcfm.yaml'\?", _fails(["wcmf.yaml"]))
    leaf = write("leaf.yaml", "base: [wcf.yaml]\n")
    assert f"(named in {leaf})" in _fails(["leaf.yaml"])
    write("req.yaml", "requires: {autoencoder: none.yaml}\n")
    assert "none.yaml does not exist" in _fails(["req.yaml"])
    Path("folder.yaml").mkdir()
    assert "is a directory" in _fails(["folder.yaml"])


def test_a_cycle_names_its_chain(write, tmp_path):
    write("a.yaml", "base: b.yaml\n")
    write("b.yaml", "base: c.yaml\n")
    write("c.yaml", "base: b.yaml\n")
    message = _fails(["a.yaml"])
    assert message.endswith(f"cycle: {tmp_path}/b.yaml -> {tmp_path}/c.yaml -> {tmp_path}/b.yaml")


def test_a_cycle_through_requires(write, tmp_path):
    write("a.yaml", "x: 1\nrequires: {autoencoder: b.yaml}\n")
    write("b.yaml", "x: 1\nrequires: {autoencoder: a.yaml}\n")
    assert f"{tmp_path}/a.yaml -> {tmp_path}/b.yaml -> {tmp_path}/a.yaml" in _fails(["a.yaml"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: [1,\nc: 2\n", r"a.yaml, line \d: not valid YAML"),
        ("a:\n\tb: 1\n", "line 2: not valid YAML: found character"),
        ("a: 1\na: 2\n", "line 2: not valid YAML: found duplicate key a"),
        ("", "a.yaml is empty"),
        ("- 1\n", "must hold 'key: value' lines"),
        ("base: 3\na: 1\n", "base must be a list of files, got 3"),
        ("a: ${b\n", "key 'a'"),
        (
            "a: 1\nx: {y: '${nowhere}'}\n",
            "key 'x.y' cannot be resolved: Interpolation key 'nowhere' not found",
        ),
        ("a: ${oc.env:FLOWBENCH_NOT_SET}\n", "key 'a' cannot be resolved.*FLOWBENCH_NOT_SET"),
        ("a: ${a}\n", "key 'a' cannot be resolved: Recursive"),
        ("a: ???\n", "key 'a' cannot be resolved: Missing mandatory value"),
        ("requires: [x.yaml]\n", "requires must be"),
        ("requires: {ae: 3}\n", "requires.ae must be an experiment file or a mapping, got 3"),
    ],
)
def test_files_that_cannot_be_composed(write, text, expected):
    write("a.yaml", text)
    assert re.search(expected, _fails(["a.yaml"]))


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00a")
    assert "cannot be read" in _fails(["a.yaml"])


def test_overrides_that_do_not_fit_a_list(write):
    write("a.yaml", "items: [1]\n")
    assert "override 'items[5]' cannot be set: list index out of range" in _fails(["a.yaml"], "items[5]=1")
    assert "override 'items.x' cannot be set" in _fails(["a.yaml"], "items.x=1")


def test_an_override_never_writes_through_an_interpolation(write):
    write("a.yaml", "b: {x: 0}\na: ${b}\n")
    message = _fails(["a.yaml"], "a.x=1")
    assert message == "override 'a.x': a is an interpolation; override what it names, or a"
    assert compose(["a.yaml"], ["a={x: 1}"]).resolved == {"b": {"x": 0}, "a": {"x": 1}}
    assert compose(["a.yaml"], ["b.x=1"]).resolved["a"] == {"x": 1}


def test_fingerprint_ignores_what_does_not_change_the_result(write):
    write("a.yaml", "seed: 1\ndata: {dataset: digits}\ntrainer: {devices: 1}\nrequires: {ae: ae.yaml}\n")
    write("ae.yaml", "seed: 2\nrun: {name: ae}\n")
    name = fingerprint(compose(["a.yaml"]).resolved)
    assert re.fullmatch("[0-9a-f]{12}", name)
    for same in ("run.dir=x", "loggers.tb.class_path=x", "data.num_workers=2", "requires.ae.run.name=b"):
        assert fingerprint(compose(["a.yaml"], [same]).resolved) == name
    assert fingerprint(compose(["a.yaml"], ["trainer.enable_progress_bar=false"]).resolved) == name
    for other in ("seed=2", "data.dataset=x", "trainer.devices=2", "requires.ae.seed=3"):
        assert fingerprint(compose(["a.yaml"], [other]).resolved) != name


def test_fingerprint_does_not_depend_on_the_order_of_keys():
    assert fingerprint({"a": 1, "b": {"c": 1, "d": 2}}) == fingerprint({"b": {"d": 2, "c": 1}, "a": 1})


def test_printed_yaml_is_quoted_for_omegaconf():
    text = to_yaml({"a": "1e-3", "b": "${c}"})
    assert OmegaConf.to_container(OmegaConf.create(text), resolve=True) == {"a": "1e-3", "b": "${c}"}
