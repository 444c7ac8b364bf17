"""Holm's correction over the claims of a file, and where both verdicts stand."""

from __future__ import annotations

import io
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from flowbench.bench import build_report
from flowbench.bench.claims import parse_claim
from flowbench.bench.correction import correct, holm, judge_file
from flowbench.bench.plan import make_plan
from flowbench.bench.report import print_summary
from flowbench.bench.results import Results
from flowbench.bench.verdicts import judge

from .synthetic import write_synthetic_bench

PROBLEMS = {"": ["a", "b", "c", "noise"]}


def closed(p_values, level):
    """The closed test of all subsets by Bonferroni: a hypothesis falls when every subset that holds it does."""
    indices = range(len(p_values))
    subsets = [s for size in range(1, len(p_values) + 1) for s in itertools.combinations(indices, size)]
    falls = {s: min(p_values[i] for i in s) * len(s) < level for s in subsets}
    return [all(falls[s] for s in subsets if i in s) for i in indices]


@settings(max_examples=60, deadline=None)
@given(p_values=st.lists(st.floats(0, 1), min_size=1, max_size=6), level=st.sampled_from([0.05, 0.2, 0.7]))
def test_holm_is_the_closed_test_of_all_subsets(p_values, level):
    assert [p < level for p in holm(p_values)] == closed(p_values, level)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def rows(make_row, **contenders):
    return Results(
        make_row(name, value=value, seed=seed, family="reference" if name == "noise" else "F")
        for name, values in contenders.items()
        for seed, value in enumerate(values)
    )


def test_a_claim_that_holds_alone_may_be_undecided_over_its_file(make_row):
    """p = 0.009 and 0.027 by SciPy's ttest_rel: beside a third claim the second is 0.053."""
    found = rows(make_row, a=[1.0, 2.0, 3.0], b=[1.5, 2.6, 3.7], c=[1.4, 2.7, 3.7], noise=[9.0])
    texts = ["a.nll < b.nll", "a.nll < c.nll"]
    claims = [parse_claim(text) for text in texts]
    two = judge_file(claims, found, PROBLEMS)
    assert [(v.alone.verdict, v.over_file) for v in two] == [("holds", "holds"), ("holds", "holds")]
    undecided = parse_claim("b.nll < c.nll")
    three = judge_file([*claims, undecided], found, PROBLEMS)
    assert [v.alone.verdict for v in three] == ["holds", "holds", "undecided"]
    assert [v.over_file for v in three] == ["holds", "undecided", "undecided"]


def test_missing_seeds_count_and_constants_do_not(make_row):
    """A claim does not become easier to decide because the seeds of another one are lost."""
    found = rows(make_row, a=[1.0, 2.0, 3.0], b=[1.5, 2.6, 3.7], noise=[9.0])
    claim, lost, exact = (parse_claim(t) for t in ("a.nll < b.nll", "a.nll < c.nll", "noise.nll < 10"))
    (alone,) = judge(claim, found, PROBLEMS)
    with_lost = judge_file([claim, lost], found, PROBLEMS)
    assert with_lost[0].p == pytest.approx(2 * alone.outcome.p)
    assert (with_lost[1].over_file, with_lost[1].p) == ("undecided", None)
    with_exact = judge_file([claim, exact], found, PROBLEMS)
    assert with_exact[0].p == alone.outcome.p
    assert (with_exact[1].over_file, with_exact[1].p) == ("holds", None)
    assert correct([]) == []


def test_a_claim_judged_in_two_problems_counts_twice(make_row):
    found = Results(
        make_row(name, value=value + 0.01 * seed * seed * value, seed=seed, problem=problem)
        for problem in "xy"
        for name, value in (("a", 1.0), ("b", 2.0))
        for seed in range(3)
    )
    both = judge_file([parse_claim("a.nll < b.nll")], found, {"x": ["a", "b"], "y": ["a", "b"]})
    assert [v.p for v in both] == pytest.approx([2 * v.alone.outcome.p for v in both])


def bench(workshop, claims, seeds=(0, 1, 2)):
    workshop.experiment("x")
    contenders = {name: "x.yaml" for name in ("starflow", "wcfm", "cfm")}
    sweep = {"network_evaluations": [1, 4]}
    return write_synthetic_bench(
        make_plan(workshop.bench(contenders=contenders, seeds=list(seeds), sweep=sweep, claims=claims))
    )


def printed(directory):
    console = Console(file=io.StringIO(), width=300)
    print_summary(directory, console)
    return console.file.getvalue()


def test_report_summary_and_json_show_both_verdicts(workshop):
    claims = ["wcfm.straightness < starflow.straightness", "wcfm.fd[digits-cnn] ~ cfm.fd[digits-cnn] within 50%"]
    directory = bench(workshop, [*claims, "wcfm.nll < cfm.nll"])
    text = build_report(directory).read_text()
    assert "| claim | alone | over all 3 | why |" in text
    assert f"| `{claims[0]}` | **holds** | **holds** |" in text
    assert "3 seeds can show a gap of 3.3 standard deviations" in text
    assert "by Holm's correction" in text
    assert "over all 3" in printed(directory)
    assert "by Holm's correction" in printed(directory)
    records = json.loads((directory / "claims.json").read_text())
    assert [r["claim"] for r in records] == [*claims, "wcfm.nll < cfm.nll"]
    for record in records:
        assert 0 <= record["p"] <= record["p_over_file"] <= 1
        assert (record["verdict"] == "undecided") == (record["p"] >= 0.05)
        assert (record["verdict_over_file"] == "undecided") == (record["p_over_file"] >= 0.05)
        assert record["seeds"] == 3
    assert len(records[1]["ratio"]) == 3


@pytest.mark.slow
def test_one_claim_has_one_verdict(workshop):
    directory = bench(workshop, ["wcfm.straightness < starflow.straightness"])
    text = build_report(directory).read_text()
    assert "| claim | verdict | why |" in text
    assert "Holm" not in text + printed(directory)


def test_one_seed_is_said_to_give_none(workshop):
    directory = bench(workshop, ["wcfm.straightness < starflow.straightness", "wcfm.nll < 3"], seeds=[0])
    text = build_report(directory).read_text()
    assert "One seed gives no verdict." in text
    assert text.count("| **undecided** | **undecided** |") == 2
    (first, _) = json.loads((directory / "claims.json").read_text())
    assert (first["verdict"], first["p"], first["half_width"]) == ("undecided", None, None)


@pytest.mark.slow
def test_a_bench_without_claims_has_no_section_and_no_file(workshop):
    directory = bench(workshop, [])
    assert "## Claims" not in build_report(directory).read_text()
    assert not (directory / "claims.json").exists()
