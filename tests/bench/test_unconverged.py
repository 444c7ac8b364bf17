"""A number that has not converged is shown in grey, and compared with nothing."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from flowbench.bench import build_report, compare
from flowbench.bench.claims import parse_claim
from flowbench.bench.notes import reading_notes
from flowbench.bench.plan import make_plan
from flowbench.bench.plots import plot_evaluations, swept_metric
from flowbench.bench.results import Results, load_rows
from flowbench.bench.tables import difference_table, metric_table, seed_table
from flowbench.bench.verdicts import judge
from flowbench.cli.unmeasured import report_unmeasured
from flowbench.core.rows import Row, read_rows, unconverged_text, write_rows

from .synthetic import write_synthetic_bench

PLAN = {"contenders": ["a", "b", "c"], "problems": {"": ["a", "b", "c"]}, "seeds": [0, 1, 2], "reasons": {}}
WHY = "not converged (error 0.31 bits/dim, tolerance 0.01)"


def rows(make_row, lost=(0, 1, 2), **fields):
    """Of b, the seeds `lost` have not converged; its values are far below those of the others."""
    fields = {"protocol": "ode/test/360/Euler(num_steps=8)", **fields}
    for name, level in (("a", 2.0), ("b", -9.0), ("c", 3.0)):
        for seed in (0, 1, 2):
            grey = name == "b" and seed in lost
            status = {"status": "unconverged", "provenance": {"message": WHY}} if grey else {}
            yield make_row(name, value=level + 0.1 * seed, seed=seed, **fields, **status)


@pytest.fixture
def results(make_row) -> Results:
    return Results.of_bench(PLAN, rows(make_row))


@pytest.mark.parametrize("text", ["b.nll < a.nll", "a.nll > b.nll", "b.nll < 2.6", "b.nll > 0"])
def test_a_claim_with_such_a_side_has_no_verdict_and_says_why_in_one_line(results, text):
    (got,) = judge(parse_claim(text), results, PLAN["problems"])
    assert (got.verdict, got.difference) == ("undecided", None)
    assert got.reason == f"b.nll takes part in no claim: {WHY}"


def test_at_a_point_of_a_sweep_too(make_row):
    at = {"axis": "network_evaluations", "at": 8.0}
    found = Results.of_bench(PLAN, [*rows(make_row, **at), *rows(make_row, lost=(), axis=at["axis"], at=64.0)])
    (few,) = judge(parse_claim("b.nll@8 < a.nll@8"), found, PLAN["problems"])
    (many,) = judge(parse_claim("b.nll@64 < a.nll@64"), found, PLAN["problems"])
    assert (few.verdict, few.reason) == ("undecided", f"b.nll@8 takes part in no claim: {WHY}")
    assert many.verdict == "holds"
    assert list(found.sweep("", "b", "nll")) == [64.0]
    assert found.swept_points("", "b", "nll") == [8.0, 64.0]


def test_one_seed_that_has_not_converged_decides_nothing_either(make_row):
    found = Results.of_bench(PLAN, rows(make_row, lost=(1,)))
    (got,) = judge(parse_claim("b.nll < a.nll"), found, PLAN["problems"])
    assert got.verdict == "undecided"
    assert got.reason.startswith(f"b.nll has no number of seed 1: {WHY}; otherwise difference")
    (note,) = metric_table(PLAN, found, "", "quality").notes
    assert f"b seed 1 nll {WHY}" in note


def test_claims_about_others_are_decided(results):
    assert judge(parse_claim("a.nll < c.nll"), results, PLAN["problems"])[0].verdict == "holds"


def test_the_likelihood_of_a_head_is_compared_with_no_other_metric(make_row):
    """Also where rows were made before anybody looked at the claims."""
    heads = [
        make_row(name, metric=metric, value=level + 0.1 * seed, seed=seed, protocol=protocol)
        for name, level in (("a", 2.0), ("b", 1.0), ("c", 3.0))
        for metric, protocol in (
            ("nll_head", "head/test/360/Composition(num_jumps=1)"),
            ("nll", "ode/test/360/RungeKutta4(num_steps=32)"),
        )
        for seed in (0, 1, 2)
    ]
    found = Results.of_bench(PLAN, heads)
    (across,) = judge(parse_claim("b.nll_head < a.nll"), found, PLAN["problems"])
    assert (across.verdict, across.difference) == ("undecided", None)
    assert across.reason == "not comparable: b.nll_head is of its own kind"
    assert judge(parse_claim("b.nll_head < a.nll_head"), found, PLAN["problems"])[0].verdict == "holds"
    assert judge(parse_claim("b.nll < a.nll"), found, PLAN["problems"])[0].verdict == "holds"


def test_tables_show_it_in_grey_and_explain_it(results):
    table = metric_table(PLAN, results, "", "quality")
    by_name = {row[0].text: row[1] for row in table.rows}
    assert [name for name, cell in by_name.items() if cell.grey] == ["b"]
    assert [name for name, cell in by_name.items() if cell.bold] == ["a"]
    assert by_name["b"].text.startswith("-8.9")
    assert str(by_name["b"].rich.style) == "bright_black"
    markdown = table.to_markdown()
    assert f'<span style="color:grey">{by_name["b"].text}</span>' in markdown
    (note,) = table.notes
    assert note == f"‡, in grey: in no claim, and never marked as best or as different: b nll {WHY}."


def test_no_difference_to_it_is_shown(results):
    ((_, to_b, to_c),) = difference_table(PLAN, results, "").rows
    assert to_b.text == "–"
    assert to_c.bold


def test_the_values_of_every_seed_stand_in_grey(results):
    cells = {(row[0].text, row[1].text): row[2] for row in seed_table(PLAN, results, "").rows}
    assert cells["b", "1"].grey
    assert cells["b", "1"].text == "-8.9 ‡"
    assert not cells["a", "1"].grey


def test_a_picture_of_a_sweep_has_its_points(make_row, tmp_path):
    def swept(at, lost):
        return rows(make_row, lost=lost, axis="network_evaluations", at=at)

    exact = [r for r in rows(make_row, lost=(), protocol="exact/test/360") if r.contender == "c"]
    main = [r for r in rows(make_row, lost=()) if r.contender != "c"] + exact
    points = [r for at, lost in ((8.0, (0, 1, 2)), (64.0, ()), (128.0, ())) for r in swept(at, lost)]
    found = Results.of_bench(PLAN, [*main, *(r for r in points if r.contender != "c")])
    assert swept_metric(PLAN, found, "", "network_evaluations") == "nll"
    drawn = _drawn(found, tmp_path)
    assert {"b ‡ not converged", "a", "b", "c (exact)"} <= drawn.keys()
    assert list(drawn["b ‡ not converged"].get_xdata()) == [8.0]
    assert list(drawn["b"].get_xdata()) == [64.0, 128.0]
    assert list(drawn["c (exact)"].get_ydata()) == pytest.approx([3.1, 3.1])
    nothing = Results.of_bench(PLAN, [r for r in points if r.at == 8.0 and r.contender == "b"])
    assert swept_metric(PLAN, nothing, "", "network_evaluations") == "nll"


def _drawn(results, tmp_path):
    """Lines of the picture by their labels."""
    from flowbench.bench import plots

    kept = []
    save, plots.save_figure = plots.save_figure, lambda figure, path: kept.append(figure) or path
    try:
        plot_evaluations(PLAN, results, tmp_path / "picture.png")
    finally:
        plots.save_figure = save
    (figure,) = kept
    return {str(line.get_label()): line for line in figure.axes[0].get_lines()}


def test_the_standard_error_over_the_probes_is_told(make_row):
    by_seed = [
        make_row("a", seed=seed, unit="bits/dim", provenance={"probe_standard_error": error})
        for seed, error in enumerate((0.002, 0.004))
    ]
    (note,) = reading_notes(Results([*by_seed, make_row("b")]), "")
    assert note == (
        "nll: standard error over the probes of Hutchinson's estimate, of the seed with most: a 0.004 bits/dim."
    )


def test_a_report_and_a_comparison_of_a_bench_show_it(workshop):
    workshop.experiment("x")
    contenders = {"wcfm": "x.yaml", "tarflow": "x.yaml"}
    plan = make_plan(workshop.bench(contenders=contenders, seeds=[0, 1], sweep={"network_evaluations": [1, 4]}))
    directory = write_synthetic_bench(plan)
    found = [
        Row(**{**vars(r), "status": "unconverged", "provenance": {**r.provenance, "message": WHY}})
        if (r.metric, r.contender) == ("nll", plan.cells[0].contender)
        else r
        for r in load_rows(directory)
    ]
    write_rows(directory / "results.jsonl", found)
    text = build_report(directory).read_text(encoding="utf-8")
    assert 'style="color:grey"' in text
    assert "‡, in grey" in text
    assert "‡" in compare([directory])


def test_commands_name_it_and_end_well(make_row, tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", rows(make_row))
    assert report_unmeasured(tmp_path) == 0
    assert capsys.readouterr().err == f"flowbench: to be left out of comparisons: nll ({WHY})\n"
    assert unconverged_text(r for r in rows(make_row, lost=())) == ""


def test_rows_from_before_are_read_as_they_were(make_row, tmp_path):
    old = [json.loads(row.to_json()) for row in rows(make_row, lost=())]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in old))
    assert {row.status for row in read_rows(tmp_path / "rows.jsonl")} == {"ok"}
    console = Console(file=io.StringIO(), width=120)
    metric_table(PLAN, Results.of_bench(PLAN, read_rows(tmp_path / "rows.jsonl")), "", "quality").print(console)
    assert "‡" not in console.file.getvalue()
