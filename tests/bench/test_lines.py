"""Who stands in a table: contenders, what other code made, references, each once, in every table that there is."""

from __future__ import annotations

import itertools
import re

import pytest

from flowbench.bench import compare
from flowbench.bench.results import Results
from flowbench.bench.tables import metric_table, seed_table
from flowbench.core.rows import write_rows

REFERENCES = ("noise", "floor")
FAMILIES = {"cfm": "FlowMatching", "stranger": "external", "noise": "reference", "floor": "reference"}


def rows_of(make_row, names, **fields):
    return [
        make_row(name, "fd[digits-cnn]", 1.0 + number, family=FAMILIES.get(name, "external"), **fields)
        for number, name in enumerate(names)
    ]


def first_column(text: str) -> list[str]:
    return [line.strip("│").split("│")[0].strip() for line in text.splitlines() if line.startswith("│")]


@pytest.mark.parametrize("names", [c for n in (1, 2, 3, 4) for c in itertools.combinations(FAMILIES, n)], ids=str)
def test_everybody_stands_once_and_in_order_in_every_table(make_row, tmp_path, names):
    contenders = [name for name in names if name == "cfm"]
    ordered = [*contenders, *(n for n in names if n == "stranger"), *(n for n in REFERENCES if n in names)]
    rows = rows_of(make_row, sorted(names, key=lambda name: name in REFERENCES, reverse=True))
    plan = {"contenders": contenders, "problems": {"": contenders}, "seeds": [0], "reasons": {}}
    for table in (metric_table(plan, Results(rows), "", "quality"), seed_table(plan, Results(rows), "")):
        assert [row[0].text for row in table.rows] == ordered
    write_rows(tmp_path / "run" / "rows.jsonl", rows)
    several = len({*names} - {*REFERENCES}) > 1
    assert first_column(compare([tmp_path / "run"])) == [
        name if name in REFERENCES else f"run: {name}" if several or name != "run" else name for name in ordered
    ]


def test_strangers_of_several_folders_stand_once_beside_each_other(make_row, tmp_path):
    """As `flowbench evaluate` leaves them, each with its floor."""
    for name in ("first", "second"):
        write_rows(tmp_path / name / "rows.jsonl", rows_of(make_row, [name, "floor"]))
    text = compare([tmp_path / "first", tmp_path / "second"])
    assert first_column(text) == ["first", "second", "floor"]
    assert len(re.findall("│ first", text)) == 1


def test_a_reference_is_taken_by_metric_from_the_first_run_that_has_it(make_row, tmp_path):
    write_rows(tmp_path / "a" / "rows.jsonl", rows_of(make_row, ["cfm", "floor"]))
    others = rows_of(make_row, ["cfm", "floor"])
    write_rows(tmp_path / "b" / "rows.jsonl", [*others, make_row("floor", "w2", 7.5, family="reference")])
    text = compare([tmp_path / "a", tmp_path / "b"])
    (floor,) = [line for line in text.splitlines() if line.startswith("│ floor")]
    assert "7.5" in floor


def test_two_data_sets_of_one_name_stand_apart(make_row, tmp_path):
    """A user's own file that was replaced between two runs."""
    for name, version in (("first", "sha256:aa"), ("second", "sha256:bb")):
        provenance = {"dataset_version": version}
        rows = rows_of(make_row, [name, "floor"], dataset="npz:mine", provenance=provenance)
        write_rows(tmp_path / name / "rows.jsonl", rows)
    one, two = compare([tmp_path / "first", tmp_path / "second"]).split("npz:mine sha256:bb")
    assert "npz:mine sha256:aa" in one
    assert (first_column(one), first_column(two)) == (["first", "floor"], ["second", "floor"])
    alone = compare([tmp_path / "first"])
    assert "sha256" not in alone


def test_what_other_code_made_wins_nothing_in_a_bench_but_is_compared_with_its_like(make_row, tmp_path):
    rows = rows_of(make_row, ["stranger", "cfm", "other"])
    plan = {"contenders": ["cfm"], "problems": {"": ["cfm"]}, "seeds": [0], "reasons": {}}
    table = metric_table(plan, Results(rows), "", "quality")
    assert [(row[0].text, row[0].italic, row[1].bold) for row in table.rows] == [
        ("cfm", False, False),
        ("stranger", True, False),
        ("other", True, False),
    ]
