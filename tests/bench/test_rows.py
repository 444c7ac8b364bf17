from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.core.rows import SCHEMA, Row, read_rows, write_rows
from flowbench.core.storage import write_text

FIELDS = {
    "schema": 3,
    "bench": "b",
    "problem": "",
    "contender": "cfm",
    "family": "FlowMatching",
    "dataset": "digits",
    "seed": 0,
    "metric": "nll",
    "value": 2.5,
    "n": 360,
    "protocol": "exact/test/360",
    "unit": "bits/dim",
    "goal": "down",
    "group": "quality",
    "axis": "",
    "at": None,
    "network_evaluations": None,
    "guidance": 2.0,
    "sampler": "midpoint",
    "weights": "ema",
    "status": "ok",
    "provenance": {"git_sha": "abc"},
}


def test_schema_is_frozen():
    """Changing a field changes every reader: raise SCHEMA, and say in the changelog how to read old files."""
    assert SCHEMA == 3
    assert [f.name for f in dataclasses.fields(Row)] == list(FIELDS)
    assert json.loads(Row(**FIELDS).to_json()) == FIELDS
    assert Row.__dataclass_params__.frozen


@settings(max_examples=20, deadline=None)
@given(
    value=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    text=st.text(max_size=20),
    seed=st.integers(0, 2**63),
)
def test_round_trip(value, text, seed):
    row = Row(
        **{
            **FIELDS,
            "value": value,
            "protocol": text,
            "seed": seed,
            "provenance": {"k": [text, {"a": value}]},
        }
    )
    line = row.to_json()
    assert "\n" not in line
    assert Row.from_json(line) == row


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_value_becomes_a_status(value):
    row = Row(**{**FIELDS, "value": value})
    assert row.value is None
    assert row.status == "nonfinite"
    assert Row.from_json(row.to_json()) == row


def test_provenance_takes_numpy_and_nan():
    row = Row(**{**FIELDS, "provenance": {"a": np.float32(1.5), "b": math.nan, "c": (1, 2)}})
    assert json.loads(row.to_json())["provenance"] == {"a": 1.5, "b": None, "c": [1, 2]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "0"}, "'seed'"),
        ({"seed": True}, "'seed'"),
        ({"value": "2.5"}, "'value'"),
        ({"weights": "averaged"}, "weights"),
        ({"status": "fine"}, "status"),
        ({"schema": 4}, "schema 4"),
        ({"goal": "lower"}, "goal"),
        ({"axis": "guidance"}, "axis"),
        ({"at": 2.0}, "axis"),
        ({"network_evaluations": math.inf}, "finite"),
    ],
)
def test_wrong_fields_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Row(**{**FIELDS, **change})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"schema": 1', "not JSON"),
        ("[1]", "JSON object"),
        (json.dumps({**FIELDS, "schema": 7}), "schema 7"),
        (json.dumps({k: v for k, v in FIELDS.items() if k != "seed"}), "without seed"),
        (json.dumps({**FIELDS, "colour": 1}), "unknown field colour"),
    ],
)
def test_reading_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(FIELDS) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(path)
    assert f"{path}, line 2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_write_replaces_atomically(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [Row(**FIELDS)])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "half")
    assert read_rows(path) == [Row(**FIELDS)]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="does not exist; run"):
        read_rows(tmp_path / "rows.jsonl")


NEW = ("goal", "group", "axis", "at")


def of_schema_2(**change) -> dict:
    kept = {name: value for name, value in FIELDS.items() if name not in (*NEW, "problem")}
    return {**kept, "schema": 2, "task": "moons", **change}


def read(tmp_path, record: dict) -> Row:
    write_text(tmp_path / "rows.jsonl", json.dumps(record) + "\n")
    (row,) = read_rows(tmp_path / "rows.jsonl")
    return row


def test_a_file_of_schema_1_is_read(tmp_path):
    old = {name: value for name, value in of_schema_2().items() if name not in ("guidance", "sampler")}
    row = read(tmp_path, {**old, "schema": 1})
    assert (row.schema, row.guidance, row.sampler, row.value, row.problem) == (SCHEMA, None, "", 2.5, "moons")


def test_a_row_of_a_sweep_without_its_point_is_not_taken_for_another(tmp_path):
    with pytest.raises(ValueError, match="row of a sweep without its network_evaluations"):
        read(tmp_path, of_schema_2(protocol="x/sweep"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ("down", "quality", "", None, "exact/test/360")),
        ({"metric": "fd_low[digits-cnn]"}, ("none", "quality", "", None, "exact/test/360")),
        ({"metric": "npe"}, ("zero", "transport", "", None, "exact/test/360")),
        ({"metric": "samples_per_second"}, ("up", "cost", "", None, "exact/test/360")),
        ({"metric": "somebody's own"}, ("none", "quality", "", None, "exact/test/360")),
        (
            {"metric": "fd[x]", "protocol": "x/test/sweep", "network_evaluations": 4.0},
            ("down", "quality", "network_evaluations", 4.0, "x/test"),
        ),
        (
            {"metric": "failure_rate", "protocol": "x/sweep-guidance/radius-1", "guidance": 3.0},
            ("down", "quality", "guidance", 3.0, "x/radius-1"),
        ),
        ({"protocol": "sweep", "network_evaluations": 2.0}, ("down", "quality", "network_evaluations", 2.0, "")),
    ],
)
def test_a_file_of_schema_2_is_read_with_goal_group_and_place_in_a_sweep(tmp_path, change, expected):
    row = read(tmp_path, of_schema_2(**change))
    assert (row.goal, row.group, row.axis, row.at, row.protocol) == expected
    assert (row.schema, row.problem) == (SCHEMA, "moons")
    assert Row.from_json(row.to_json()) == row
