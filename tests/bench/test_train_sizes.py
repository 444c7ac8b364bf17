"""A bench over sizes of the training split: its cells, rows, claims, table and picture; and equal parameters."""

from __future__ import annotations

import re

import pytest

from flowbench.bench import build_report
from flowbench.bench.equality import equality_notes
from flowbench.bench.plan import make_plan
from flowbench.bench.report import _verdicts
from flowbench.bench.results import Results, load_plan, load_rows
from flowbench.config import Experiment

SIZES = {"train_size": [50, 100], "network_evaluations": [2]}


def sized(workshop, **fake):
    name = workshop.experiment("cfm", value=1.0, **fake)
    return workshop.bench(contenders={"cfm": name}, sweep=SIZES, claims=["cfm.fd[fake]@train_size=50 > cfm.fd[fake]"])


def test_each_size_is_a_cell_that_measures_no_other_sweep(workshop):
    plan = make_plan(sized(workshop))
    assert [(c.seed, c.config["data"].get("train_size") if "data" in c.config else None) for c in plan.cells] == [
        (seed, size) for seed in (0, 1) for size in (None, 50, 100)
    ]
    main, small, _ = plan.cells[:3]
    assert main.config["evaluator"]["sweep"] == {"network_evaluations": [2]}
    assert small.config["evaluator"]["sweep"] is None
    assert small.directory == workshop.runs / "mini/cells/cfm/train_size-50/seed-0"
    assert len({c.config_hash for c in plan.cells}) == 6
    assert {c.kind for c in plan.cells} == {"fit"}
    assert small.label == "cfm train_size-50 seed 0"


def test_the_main_cells_are_those_of_the_bench_without_sizes(workshop):
    with_sizes = make_plan(sized(workshop))
    without = make_plan(workshop.bench(contenders={"cfm": "cfm.yaml"}, sweep={"network_evaluations": [2]}))
    mains = [c for c in with_sizes.cells if not c.variation.axis]
    assert [(c.config_hash, c.directory) for c in mains] == [(c.config_hash, c.directory) for c in without.cells]


def test_a_cell_is_planned_under_the_fingerprint_that_its_process_finds(workshop):
    workshop.real_experiment("cfm")
    for cell in make_plan(workshop.bench(contenders={"cfm": "cfm.yaml"}, sweep=SIZES)).cells:
        cell.directory.mkdir(parents=True)
        cell.config_path.write_text(cell.config_text())
        assert Experiment.from_files([cell.config_path]).fingerprint == cell.config_hash


def test_another_measurement_of_a_size_takes_the_weights_of_that_size(workshop):
    workshop.experiment("cfm")
    contenders = {"cfm": "cfm.yaml", "again": {"trained": "cfm", "overrides": {"model.init_args.solver": "x"}}}
    plan = make_plan(workshop.bench(contenders=contenders, sweep={"train_size": [50]}, seeds=[0]))
    where = {c.directory: c for c in plan.cells}
    again = [c for c in plan.cells if c.contender == "again"]
    assert [where[c.trained].config.get("data") for c in again] == [None, {"train_size": 50}]


def test_rows_carry_the_size_and_claims_select_it(workshop):
    path = sized(workshop)
    assert workshop.run(path, "claims=[]") == 0
    directory = workshop.runs / "mini"
    rows = [row for row in load_rows(directory) if row.contender == "cfm" and row.metric == "fd[fake]"]
    assert {(r.axis, r.at, r.seed): r.value for r in rows if r.axis in ("", "train_size")} == pytest.approx(
        {("", None, 0): 1.0, ("", None, 1): 1.1}
        | {("train_size", 50.0, 0): 3.0, ("train_size", 50.0, 1): 3.1}
        | {("train_size", 100.0, 0): 2.0, ("train_size", 100.0, 1): 2.1}
    )
    plan = load_plan(directory) | {"claims": ["cfm.fd[fake]@train_size=50 > cfm.fd[fake]@train_size=100"]}
    (verdict,) = _verdicts(plan, Results.of_bench(plan, rows))
    assert verdict.alone.difference is not None
    assert verdict.alone.difference.mean == pytest.approx(1.0)
    text = build_report(directory).read_text()
    table = text[text.index("### Quality against training samples") :]
    assert "| contender | metric | 50 | 100 | as trained |" in table
    line = next(line for line in table.splitlines() if line.startswith("| cfm | fd[fake] |"))
    assert [cell.split()[0] for cell in line.split("|")[3:6]] == ["3.05", "2.05", "1.05"]
    assert (directory / "pictures" / "train_sizes.png").is_file()


@pytest.mark.slow
def test_a_size_that_fails_costs_its_own_numbers_alone(workshop):
    assert workshop.run(sized(workshop, crash_at_size=50), "claims=[]") == 1
    directory = workshop.runs / "mini"
    plan = load_plan(directory)
    results = Results.of_bench(plan, load_rows(directory))
    assert results.lost_seeds("", "cfm") == {}
    assert results.gaps("", "cfm", "fd[fake]") == {}
    assert set(results.gaps("", "cfm", "fd[fake]", 50, "train_size")) == {0, 1}
    assert "cfm train_size=50 seed 0 (" in build_report(directory).read_text()


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"train_size": [0]}, "sweep.train_size[0] must be a number in [1, 1e+12], got 0"),
        ({"train_size": [2.5]}, "must be whole numbers"),
        ({"train_size": [5, 5]}, "distinct"),
    ],
)
def test_sizes_that_are_none_are_refused(workshop, sweep, message):
    workshop.experiment("cfm")
    with pytest.raises(ValueError, match=re.escape(message)):
        make_plan(workshop.bench(contenders={"cfm": "cfm.yaml"}, sweep=sweep))


def test_a_claim_on_a_size_that_is_not_swept_is_refused(workshop):
    workshop.experiment("cfm")
    path = workshop.bench(contenders={"cfm": "cfm.yaml"}, sweep=SIZES, claims=["cfm.fd@train_size=70 < 1"])
    with pytest.raises(ValueError, match=r"70 is not swept; sweep.train_size is \[50, 100\]"):
        make_plan(path)


# ---- equal parameters -----------------------------------------------------------------------------------


def notes(make_row, equal, **parameters):
    rows = [make_row(name, "parameters", float(n), group="cost") for name, n in parameters.items()]
    plan = {"problems": {"": list(parameters)}, **equal}
    return equality_notes(plan, Results(rows), "")


def test_a_contender_outside_of_five_percent_is_flagged(make_row):
    (line,) = notes(make_row, {"equal": ["parameters"]}, first=1000, above=1050, below=950, far=1051)
    assert line.startswith("**not equal**: far has 1051 parameters, +5.1% of first's 1000")
    (line,) = notes(make_row, {"equal": ["parameters"]}, first=1000, far=900)
    assert "-10.0%" in line


def test_nothing_is_flagged_that_is_not_asked_for(make_row):
    assert notes(make_row, {}, first=1000, far=2000) == []


def test_the_bench_file_asks_for_it(workshop):
    workshop.experiment("cfm")
    path = workshop.bench(contenders={"cfm": "cfm.yaml"}, equal="parameters")
    assert make_plan(path).describe()["equal"] == ["parameters"]
    with pytest.raises(ValueError, match="equal is 'paramters'; contenders can be held equal in parameters"):
        make_plan(path, ["equal=paramters"])
