"""A seed that is missing, for whatever reason, decides nothing, and is told of wherever numbers stand."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from flowbench.bench import build_report, compare
from flowbench.bench.claims import parse_claim
from flowbench.bench.plan import make_plan
from flowbench.bench.report import print_summary
from flowbench.bench.results import Results, collect, load_rows
from flowbench.bench.status import read_status, write_status
from flowbench.bench.tables import difference_table, metric_table, seed_table
from flowbench.bench.verdicts import judge
from flowbench.core.rows import read_rows, write_rows

from .synthetic import write_synthetic_bench

SEEDS = [0, 1, 2]
PLAN = {"contenders": ["a", "b", "c"], "problems": {"": ["a", "b", "c"]}, "seeds": SEEDS, "reasons": {}}
CLAIM = parse_claim("b.nll < a.nll")


def complete(make_row):
    """Of b, seed 2 is far worse than the others: without it, b is better than a and c by any test."""
    values = {"a": [2.0, 2.1, 1.9], "b": [1.0, 1.11, 99.0], "c": [3.0, 3.1, 2.9]}
    for name, by_seed in values.items():
        for seed, value in enumerate(by_seed):
            yield make_row(name, value=value, seed=seed)
            yield make_row(name, "fd", value=value, seed=seed, axis="network_evaluations", at=4.0)


def diverged(rows):
    return [replace(r, value=math.nan) if (r.contender, r.seed) == ("b", 2) else r for r in rows]


def unfinished(rows):
    return [r for r in rows if (r.contender, r.seed) != ("b", 2)]


def failed(rows):
    (row, *_) = [r for r in rows if (r.contender, r.seed) == ("b", 2)]
    provenance = {"message": "loss is nan at step 7", "log": "log.txt", "attempts": 1}
    gone = replace(row, metric="cell", value=None, status="failed", family="", dataset="", protocol="")
    return [*unfinished(rows), replace(gone, provenance=provenance)]


def skipped(rows):
    """A metric that could not be computed, and says why."""
    why = {"message": "mostly one value"}
    return [
        replace(r, value=None, status="skipped", provenance=why) if (r.contender, r.seed) == ("b", 2) else r
        for r in rows
    ]


def not_measured(rows):
    """Another metric of the seed is there."""
    (row, *_) = [r for r in rows if (r.contender, r.seed) == ("b", 2)]
    return [*unfinished(rows), replace(row, metric="other")]


def otherwise(rows):
    return [replace(r, weights="raw") if (r.contender, r.seed) == ("b", 2) else r for r in rows]


WAYS = {
    diverged: "not finite",
    unfinished: "not finished",
    failed: "failed (loss is nan at step 7)",
    skipped: "mostly one value",
    not_measured: "not measured",
    otherwise: "measured with other weights",
}


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def case(request, make_row):
    way = request.param
    return Results.of_bench(PLAN, way(list(complete(make_row)))), WAYS[way]


@pytest.mark.parametrize("text", ["b.nll < a.nll", "a.nll > b.nll", "b.nll < 50", "b.fd@4 < a.fd@4", "b.nll > 50"])
def test_a_claim_that_lacks_a_seed_is_undecided_and_names_it(case, text):
    results, why = case
    (got,) = judge(parse_claim(text), results, PLAN["problems"])
    assert got.verdict == "undecided"
    assert f"{'b.fd@4' if '@' in text else 'b.nll'} has no number of seed 2: {why}" in got.reason
    assert "otherwise difference" in got.reason
    assert got.difference.n == 2


def test_claims_about_others_are_decided(case):
    assert judge(parse_claim("a.nll < c.nll"), case[0], PLAN["problems"])[0].verdict == "holds"


def test_a_contender_does_not_win_by_the_seed_that_it_lost(case):
    results, why = case
    table = metric_table(PLAN, results, "", "quality")
    by_name = {row[0].text.removesuffix(" †"): row for row in table.rows}
    assert "†" in by_name["b"][0].text + by_name["b"][1].text
    assert "(n=2)" in by_name["b"][1].text
    assert [name for name, row in by_name.items() if row[1].bold] == ["a"]
    (note,) = table.notes
    assert note.startswith("†: over fewer seeds than planned")
    assert f"b seed 2 {why}" in note or f"b seed 2 nll {why}" in note


def test_no_difference_to_it_is_called_one(case):
    results, why = case
    table = difference_table(PLAN, results, "")
    ((_, to_b, to_c),) = table.rows
    assert (to_b.bold, to_c.bold) == (False, True)
    assert to_b.text.endswith("(n=2) †")
    assert "†" not in to_c.text
    assert why in "".join(table.notes)
    swapped = {**PLAN, "contenders": ["b", "a"], "problems": {"": ["b", "a"]}}
    ((_, to_a),) = difference_table(swapped, results, "").rows
    assert (to_a.bold, to_a.text[-1]) == (False, "†")


def test_the_values_of_every_seed_say_what_became_of_it(case):
    results, why = case
    table = seed_table(PLAN, results, "")
    (row,) = [row for row in table.rows if (row[0].text, row[1].text) == ("b", "2")]
    assert row[2].text == why.partition(" (")[0] or why.startswith("measured with")


def test_with_all_seeds_it_is_decided(make_row):
    results = Results.of_bench(PLAN, complete(make_row))
    assert "no number" not in judge(CLAIM, results, PLAN["problems"])[0].reason
    for table in (metric_table(PLAN, results, "", "quality"), difference_table(PLAN, results, "")):
        assert table.notes == []
        assert not any("†" in entry.text for row in table.rows for entry in row)


def test_reference_rows_have_no_seeds_to_lack(make_row):
    rows = [*complete(make_row), make_row("noise", value=500.0, family="reference", weights="none")]
    results = Results.of_bench(PLAN, rows)
    assert results.gaps("", "noise", "nll") == {}
    assert judge(parse_claim("a.nll < noise.nll"), results, {"": ["a", "b", "noise"]})[0].verdict == "holds"


@pytest.fixture
def bench(workshop, monkeypatch):
    monkeypatch.setattr("flowbench.bench.report._pictures", lambda *_: [])  # nothing here is about them
    workshop.experiment("x")
    path = workshop.bench(
        contenders={"wcfm": "x.yaml", "cfm": "x.yaml"},
        seeds=SEEDS,
        sweep={"network_evaluations": [1, 2]},
        claims=["wcfm.fd[digits-cnn] < noise.fd[digits-cnn]"],
    )
    return write_synthetic_bench(make_plan(path))


def summary(directory) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_summary(directory, console)
    return console.file.getvalue()


def test_report_summary_and_comparison_say_it_alike(bench):
    assert all("†: over" not in text for text in (build_report(bench).read_text(), summary(bench), compare([bench])))
    cell = bench / "cells/wcfm/seed-1"
    write_rows(
        cell / "rows.jsonl",
        [replace(r, value=math.nan) if r.metric == "fd[digits-cnn]" else r for r in read_rows(cell / "rows.jsonl")],
    )
    collect(bench)
    for text in (build_report(bench).read_text(), summary(bench), compare([bench])):
        flat = " ".join(text.split())
        assert "seed 1 fd[digits-cnn] not finite" in flat
    report = (bench / "report.md").read_text()
    assert "| **undecided** | wcfm.fd[digits-cnn] has no number of seed 1: not finite;" in report


def test_a_failed_cell_is_named_in_all_three(bench):
    cell = bench / "cells/wcfm/seed-1"
    write_status(cell, replace(read_status(cell), state="FAILED", message="ended by SIGKILL"))
    collect(bench)
    for text in (build_report(bench).read_text(), summary(bench), compare([bench])):
        assert "seed 1 failed (ended by SIGKILL)" in " ".join(text.split())


def test_a_comparison_knows_from_the_plan_what_is_not_finished(bench):
    (bench / "cells/wcfm/seed-1/status.json").unlink()
    collect(bench)
    assert json.loads((bench / "plan.json").read_text())["seeds"] == SEEDS
    assert {r.seed for r in load_rows(bench) if r.contender == "wcfm"} == {0, 2}
    assert "seed 1 not finished" in " ".join(compare([bench]).split())
