"""A run against its baseline: what moved beyond noise, for the worse or not, and the status that a gate needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats

from flowbench.bench.plan import make_plan
from flowbench.bench.regressions import NEGLIGIBLE, TOLERANCES, compare_with_baseline
from flowbench.bench.statistics import unpaired_difference
from flowbench.cli.main import main
from flowbench.core.rows import Row, read_rows, write_rows

from .goals import declared
from .synthetic import write_synthetic_bench


def row(metric: str, value: float | None, seed: int = 0, **fields) -> Row:
    return Row(
        **{
            "bench": "",
            "problem": "",
            "contender": "cfm",
            "family": "FlowMatching",
            "dataset": "digits",
            "seed": seed,
            "metric": metric,
            **declared(metric),
            "value": value,
            "n": 360,
            "protocol": "p",
            "unit": "",
            "network_evaluations": 32.0,
            "weights": "ema",
            **fields,
        }
    )


def folder(tmp_path: Path, name: str, rows: list[Row]) -> Path:
    path = tmp_path / name
    path.mkdir()
    write_rows(path / "rows.jsonl", rows)
    return path


def gate(tmp_path: Path, before: list[Row], now: list[Row]):
    return compare_with_baseline(folder(tmp_path, "before", before), folder(tmp_path, "now", now))


def seeds(metric: str, values: list[float], **fields) -> list[Row]:
    return [row(metric, value, seed, **fields) for seed, value in enumerate(values)]


# ---- verdicts


@pytest.mark.parametrize(
    ("metric", "before", "now", "verdict"),
    [
        ("fd", 10.0, 12.0, "worse"),  # 2 of 12: above the tolerance of 15 %
        ("fd", 10.0, 11.0, "same"),
        ("fd", 12.0, 10.0, "better"),
        ("precision", 0.8, 0.5, "worse"),
        ("precision", 0.5, 0.8, "better"),
        ("straightness", 1.0, 1.12, "worse"),  # of the sampling paths: 10 %
        ("npe", 0.2, -0.5, "worse"),  # nearer to 0 is better
        ("npe", -0.5, 0.2, "better"),
        ("mean_norm_ratio", 1.0, 2.0, "moved"),  # no better direction
        ("train_seconds", 10.0, 20.0, "worse"),
        ("train_seconds", 10.0, 12.0, "same"),
    ],
)
def test_one_seed_is_judged_by_the_tolerance_of_its_group(tmp_path, metric, before, now, verdict):
    (change,) = gate(tmp_path, [row(metric, before)], [row(metric, now)]).changes
    assert change.verdict == verdict
    assert change.how == "one seed, tolerance"


def test_several_seeds_are_judged_by_the_interval_of_their_paired_differences(tmp_path):
    spread, shift = [10.0, 20.0, 30.0], [0.5, 0.6, 0.55]
    now = [value + extra for value, extra in zip(spread, shift, strict=True)]
    (change,) = gate(tmp_path, seeds("fd", spread), seeds("fd", now)).changes
    low, high = scipy.stats.t.interval(0.95, 2, scipy.stats.tmean(shift), scipy.stats.sem(shift))
    assert change.verdict == "worse"
    assert change.how == "3 seeds, paired"
    assert change.difference.mean - change.difference.half == pytest.approx(low)
    assert change.difference.mean + change.difference.half == pytest.approx(high)


def test_a_difference_whose_interval_holds_zero_is_noise(tmp_path):
    (change,) = gate(tmp_path, seeds("fd", [10.0, 11.0, 12.0]), seeds("fd", [14.0, 9.0, 13.0])).changes
    assert change.verdict == "same"


def test_other_seeds_are_judged_by_welchs_interval(tmp_path):
    old, new = [10.0, 10.4, 10.1], [12.0, 12.9, 12.2, 12.4]
    now = [row("fd", value, seed + 10) for seed, value in enumerate(new)]
    (change,) = gate(tmp_path, seeds("fd", old), now).changes
    interval = scipy.stats.ttest_ind(new, old, equal_var=False).confidence_interval(0.95)
    assert change.verdict == "worse"
    assert change.how == "3 and 4 other seeds"
    assert change.difference.mean - change.difference.half == pytest.approx(interval.low)
    assert change.difference.mean + change.difference.half == pytest.approx(interval.high)


def test_welchs_interval_needs_two_values_on_each_side():
    assert unpaired_difference([1.0, 1.0], [3.0, 3.0]).half == 0
    with pytest.raises(ValueError, match="two values on each side, got 1 and 2"):
        unpaired_difference([1.0], [1.0, 2.0])


def test_what_rounding_changes_on_all_seeds_alike_is_no_change(tmp_path):
    before = seeds("fd", [10.0, 20.0, 30.0])
    now = [replace(one, value=one.value * (1 + NEGLIGIBLE / 2)) for one in before]
    assert gate(tmp_path, before, now).changes[0].verdict == "same"


def test_equal_rows_are_the_same(tmp_path):
    rows = [*seeds("fd", [1.0, 2.0]), *seeds("npe", [0.0, 0.0]), *seeds("train_seconds", [4.0, 5.0])]
    found = gate(tmp_path, rows, rows)
    assert {change.verdict for change in found.changes} == {"same"}
    assert found.text().splitlines()[-1] == "no regression"


# ---- what is lost, and what is not compared


def test_a_number_that_is_no_longer_there_is_a_regression(tmp_path):
    before = [*seeds("fd", [1.0, 2.0]), *seeds("nll", [3.0, 3.1])]
    found = gate(tmp_path, before, [*seeds("fd", [1.0, 2.0]), row("nll", 3.0), row("nll", float("nan"), 1)])
    (lost,) = found.regressions
    assert (lost.metric, lost.verdict, lost.how) == ("nll", "lost", "seed 1: not finite")


def test_a_metric_that_is_not_measured_any_more_is_a_regression(tmp_path):
    found = gate(tmp_path, [row("fd", 1.0), row("nll", 3.0)], [row("fd", 1.0)])
    assert [(c.metric, c.verdict) for c in found.regressions] == [("nll", "lost")]


@pytest.mark.parametrize(
    ("fields", "how"),
    [
        ({"protocol": "q"}, "protocol p before, q now"),
        ({"unit": "nats"}, "unit none before, nats now"),
        ({"dataset": "mnist"}, "data digits before, mnist now"),
        ({"provenance": {"dataset_version": "2"}}, "version of the data none before, 2 now"),
    ],
)
def test_what_measures_something_else_is_not_compared(tmp_path, fields, how):
    found = gate(tmp_path, [row("fd", 1.0)], [row("fd", 9.0, **fields)])
    assert [(c.verdict, c.how) for c in found.changes] == [("not compared", how)]
    assert found.regressions == []
    assert how in found.text()


def test_runs_of_one_contender_meet_whatever_their_names(tmp_path):
    found = gate(tmp_path, [row("fd", 1.0)], [row("fd", 2.0, contender="again")])
    assert [(c.contender, c.verdict) for c in found.changes] == [("cfm", "worse")]


def test_a_contender_of_the_baseline_alone_is_named(tmp_path):
    before = [row("fd", 1.0), row("fd", 1.0, contender="tarflow")]
    found = gate(tmp_path, before, [row("fd", 1.0), row("fd", 1.0, contender="wcfm")])
    assert [c.contender for c in found.changes] == ["cfm"]
    assert found.notes == (f"not in {tmp_path / 'now'}: tarflow",)


def test_nothing_in_common_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no number in common"):
        gate(tmp_path, [row("fd", 1.0)], [row("kid", 1.0)])


def test_a_point_of_a_sweep_is_a_number_of_its_own(tmp_path):
    swept = {"axis": "guidance", "at": 3.0}
    before = [row("fd", 1.0), row("fd", 1.0, **swept)]
    found = gate(tmp_path, before, [row("fd", 1.0), row("fd", 2.0, **swept)])
    assert [(c.metric, c.verdict) for c in found.changes] == [("fd", "same"), ("fd@guidance=3", "worse")]


@pytest.mark.parametrize("axis", ["network_evaluations", "train_size", "evaluation_seed"])
def test_points_of_every_axis_are_compared(tmp_path, axis):
    before, now = ([row("fd", 1.0), row("fd", value, axis=axis, at=50.0)] for value in (1.0, 2.0))
    found = gate(tmp_path, before, now)
    assert [change.verdict for change in found.changes] == ["same", "worse"]
    assert found.changes[1].metric.endswith("50")


def test_the_best_points_of_all_seeds_are_one_number(tmp_path):
    before, now = (
        [row("fd", value + 0.01 * seed, seed, axis="best_guidance", at=float(at)) for seed, at in enumerate(chosen)]
        for value, chosen in ((1.0, (1, 3, 3)), (2.0, (3, 1, 2)))
    )
    (change,) = gate(tmp_path, before, now).changes
    assert (change.metric, change.verdict, change.baseline.n) == ("fd@guidance=best", "worse", 3)


def test_a_number_that_has_not_converged_is_no_baseline_and_is_lost_where_it_was_one(tmp_path):
    doubtful = {"status": "unconverged", "provenance": {"message": "not converged (error 1)"}}
    good, bad = [row("nll", 2.0), row("fd", 1.0)], [row("nll", 1.0, **doubtful), row("fd", 1.0)]
    (lost, same) = gate(tmp_path, good, bad).changes
    assert (lost.verdict, lost.how, same.verdict) == ("lost", "seed 0: not converged (error 1)", "same")
    (tmp_path / "turned").mkdir()
    assert [change.metric for change in gate(tmp_path / "turned", bad, good).changes] == ["fd"]


# ---- costs, table, file, status


def test_costs_are_told_apart_and_decide_nothing(tmp_path):
    found = gate(tmp_path, [row("fd", 1.0), row("train_seconds", 1.0)], [row("fd", 1.0), row("train_seconds", 9.0)])
    assert found.regressions == []
    text = found.text()
    assert "Costs that changed (they decide nothing)" in text
    assert "Changed\n" not in text
    assert f"quality {TOLERANCES['quality']:.0%}, transport {TOLERANCES['transport']:.0%}" in text


def test_the_command_ends_with_status_one_on_a_regression_and_writes_the_changes(tmp_path, capsys):
    before = folder(tmp_path, "before", [*seeds("fd", [1.0, 2.0, 3.0]), *seeds("train_seconds", [1.0, 1.0, 1.0])])
    now = folder(tmp_path, "now", [*seeds("fd", [1.5, 2.5, 3.6]), *seeds("train_seconds", [1.0, 1.0, 1.0])])
    file = tmp_path / "changes.json"
    assert main(["compare", "--baseline", str(before), str(now), "--json", str(file)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 regression"
    record = json.loads(file.read_text())
    assert record["is_regression"] is True
    assert [(c["metric"], c["verdict"], c["is_regression"]) for c in record["changes"]] == [
        ("fd", "worse", True),
        ("train_seconds", "same", False),
    ]
    assert record["changes"][0]["difference"]["seeds"] == 3
    assert main(["compare", "--baseline", str(now), str(before)]) == 0
    assert main(["compare", "--baseline", str(before), str(before)]) == 0


def test_benches_are_compared_with_all_their_contenders(workshop, tmp_path):
    workshop.experiment("x")
    contenders = {"cfm": "x.yaml", "tarflow": "x.yaml"}
    bench = workshop.bench(contenders=contenders, seeds=[0, 1, 2], sweep={"network_evaluations": [4]})
    directory = write_synthetic_bench(make_plan(bench))
    assert compare_with_baseline(directory, directory).regressions == []
    rows = read_rows(directory / "results.jsonl")
    worse = [replace(r, value=r.value * 2) if (r.contender, r.metric) == ("tarflow", "nll") else r for r in rows]
    after = tmp_path / "after"
    after.mkdir()
    (after / "plan.json").write_text((directory / "plan.json").read_text())
    write_rows(after / "results.jsonl", [r for r in worse if (r.contender, r.seed) != ("cfm", 1)])
    found = compare_with_baseline(directory, after)
    assert {(c.contender, c.metric) for c in found.regressions if c.verdict == "worse"} == {("tarflow", "nll")}
    lost = [c for c in found.changes if c.verdict == "lost"]
    assert {(c.contender, c.how) for c in lost} == {("cfm", "seed 1: not finished")}


@pytest.mark.parametrize("crossed", [True, False])
def test_an_interval_over_crossed_seeds_decides_nothing(workshop, tmp_path, crossed):
    """A shift of one part in a thousand: clear by the interval of four seeds, within the tolerance of one."""
    axes = {"init": [0, 1], "order": [0, 1]} if crossed else {"init": [0, 1, 2, 3]}
    workshop.experiment("cfm", value=2.0)
    assert workshop.run(workshop.bench(contenders={"cfm": "cfm.yaml"}, seeds={"axes": axes})) == 0
    before, now = workshop.runs / "mini", tmp_path / "now"
    now.mkdir()
    (now / "plan.json").write_text((before / "plan.json").read_text())
    rows = read_rows(before / "results.jsonl")
    write_rows(
        now / "results.jsonl", [replace(r, value=1.001 * r.value) if r.metric == "fd[fake]" else r for r in rows]
    )
    found = [c for c in compare_with_baseline(before, now).changes if (c.contender, c.metric) == ("cfm", "fd[fake]")]
    expected = ("same", "crossed seeds, tolerance") if crossed else ("worse", "4 seeds, paired")
    assert [(change.verdict, change.how) for change in found] == [expected]
