"""The one reader and writer of YAML: what OmegaConf would read, and one line for what it would not."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from flowbench.config.errors import ConfigError
from flowbench.config.text import MAX_DEPTH, kind, plain, read_yaml, text_of, write_yaml

# OmegaConf reads a whole file, and so do we: the same plain values, but for the kinds of keys.
SCALARS = [
    "1e-3", "1e3", "4.0e+12", "007", "010", "0x10", "0b101", "1_000", "1:30", "+5", "-0", "1.50", ".5", "-.5", "1.",
    "1e", "e3", ".inf", "-.INF", ".nan", "inf", "nan", "yes", "No", "on", "OFF", "true", "False", "TRUE", "y", "n",
    "null", "Null", "~", "2024-01-01", "2001-12-14t21:59:43.10-05:00", "12:30", "text", "'1e3'", '"007"', "'yes'",
    "a b", "'b'",
]  # fmt: skip


@pytest.mark.parametrize("text", SCALARS)
def test_a_scalar_means_what_it_means_to_omegaconf(text):
    wanted = OmegaConf.to_container(OmegaConf.create(f"v: {text}"), resolve=False)["v"]
    found = plain(read_yaml(f"v: {text}", "x")["v"])
    assert type(found) is type(wanted)
    assert found == wanted or math.isnan(found)


@pytest.mark.parametrize(
    "text", [*SCALARS, "12e4567", "-12e4567", "0x_", "0b_", "._", "9" * 400, "9" * 5000, "1" + "_0" * 400]
)
def test_a_scalar_keeps_the_text_that_it_was_written_with(text):
    value = read_yaml(f"v: {text}", "x")["v"]
    if value is not None:
        assert text_of(value) == text.strip("'\"")
    again = read_yaml(write_yaml({"v": value}), "x")["v"]
    assert text_of(again) == text_of(value)
    assert type(plain(again)) is type(plain(value))


@pytest.mark.parametrize("text", ["12e4567", "0x_", "0b_", "9" * 400])
def test_what_no_float_can_hold_is_text(text):
    """Python reads the first as infinity: a run of that name lay in runs/inf."""
    assert plain(read_yaml(f"v: {text}", "x")["v"]) == text


@pytest.mark.parametrize(
    "key", ["1", "007", "1e3", "yes", "null", "~", "2024-01-01", "1.5", "=", "'<<'", "a b", "true"]
)
def test_keys_are_text(key):
    assert list(read_yaml(f"{key}: 1", "x")) == [key.strip("'")]
    assert list(read_yaml(f"{{{key}: {{{key}: 1}}}}", "x").values()) == [{key.strip("'"): 1}]


def test_merge_keys_and_aliases_are_read():
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: [{x: 5}, *a], z: 1}\nd: [*a, *a]\n"
    assert read_yaml(text, "x") == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": {"x": 5, "y": 2, "z": 1},
        "d": [{"x": 1, "y": 2}] * 2,
    }
    tree = read_yaml(text, "x")
    tree["d"][0]["x"] = 9
    assert tree["a"]["x"] == tree["d"][1]["x"] == 1, "an alias is a copy"


def test_a_byte_order_mark_and_an_empty_document():
    assert read_yaml("\ufeffa: 1", "x") == {"a": 1}
    assert read_yaml("# nothing\n", "x") is None


LAUGHS = "a: &a [x]\n" + "\n".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: [1,\nc: 2\n", "x, line 4: not valid YAML"),
        ("a:\n\tb: 1\n", "line 2: not valid YAML: found character"),
        ("a: 1\nb: 2\na: 3\n", "line 3: not valid YAML: found duplicate key a"),
        ("yes: 1\n'yes': 2\n", "line 2: not valid YAML: found duplicate key yes"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("? [1]\n: 2\n", "a key must be plain text"),
        ("{{a: 1}: 2}", "a key must be plain text"),
        ("a: !!binary aGk=", "the tag !!binary is not read here"),
        ("a: !!timestamp 2001-01-01", "the tag !!timestamp is not read here"),
        ("a: !!set {b, c}", "the tag !!set is not read here"),
        ("a: !!python/object/apply:os.system [ls]", "is not read here; write plain values"),
        ("a: !mine 3", "the tag !mine is not read here"),
        ("a: !!bool maybe", "'maybe' is not a truth value"),
        ("<<: 3", "what '<<' names must be a mapping"),
        ("<<: [3]", "what '<<' names must be a mapping"),
        ("a: *b", "found undefined alias"),
        ("a: &a [*a]", "a value contains itself"),
        ("a: &a {b: {<<: *a}}", "a value contains itself"),
        (LAUGHS, "aliases expand it to more than 100,000 values"),
        ("a: " + "[" * 5000, f"nested more than {MAX_DEPTH} levels deep"),
        ("a: " + "{b: " * 5000, f"nested more than {MAX_DEPTH} levels deep"),
        ("a: &a " + "[" * 40 + "]" * 40 + "\nb: " + "[" * 40 + "*a" + "]" * 40, f"more than {MAX_DEPTH} levels deep"),
        ('a: "\\ud800"', "half of a surrogate pair"),
        ("a: \udcff", "bytes that are not UTF-8"),
        ("a: \x07", "special characters are not allowed"),
        ("%YAML 9.1\n---\na: 1", "not valid YAML"),
    ],
)
def test_what_is_not_read_is_refused_in_one_line_with_its_place(text, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)) as caught:
        read_yaml(text, "x")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(SCALARS)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)


def same(left, right) -> bool:
    """Equal, with NaN equal to itself and no number equal to a truth value."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(), trees, min_size=1, max_size=3))
def test_what_is_written_is_read_back(tree):
    assert same(plain(read_yaml(write_yaml(tree), "x")), tree)


@settings(max_examples=150, deadline=None)
@given(st.text() | st.binary().map(lambda data: data.decode("utf-8", "surrogateescape")))
def test_any_text_is_read_or_refused_in_one_line(text):
    refused = None
    try:
        tree = read_yaml(text, "x")
    except ConfigError as error:
        refused = str(error)
    if refused is not None:
        assert "\n" not in refused
        return
    assert same(plain(read_yaml(write_yaml({"v": tree}), "x")["v"]), plain(tree))


def test_kinds_have_names():
    values = [{}, [], None, read_yaml("007", "x"), read_yaml("yes", "x"), True, "a\nb"]
    assert [kind(v) for v in values] == [
        "a mapping", "a list", "null", "the value '007'", "the value 'yes'", "the value 'true'", "the value 'a\\nb'",
    ]  # fmt: skip
