"""Seeds of a bench that are taken apart: what cells are given, what rows carry, how the spread is split."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from flowbench.bench import build_report
from flowbench.bench.plan import make_plan
from flowbench.bench.results import Results, load_plan, load_rows
from flowbench.bench.seed_axes import read_bench_seeds
from flowbench.bench.variance import idle_axes, variance_components, variance_table
from flowbench.config import Experiment
from tests.marks import slow

AXES = {"axes": {"init": [0, 1], "order": [0, 4], "noise": [2], "evaluation": [0, 7]}}


def test_every_combination_is_a_training_and_every_further_evaluation_another_measurement_of_it(workshop):
    workshop.experiment("cfm")
    plan = make_plan(workshop.bench(contenders={"cfm": "cfm.yaml"}, seeds=AXES))
    found = [
        (c.kind, c.config["seeds"]["init"], c.config["data"]["seed"], c.config["evaluator"]["seed"]) for c in plan.cells
    ]
    assert found == [
        (kind, init, order, evaluation)
        for init in (0, 1)
        for order in (0, 4)
        for kind, evaluation in (("fit", 0), ("test", 7))
    ]
    assert {c.config["seeds"]["noise"] for c in plan.cells} == {2}
    assert [c.seed for c in plan.cells] == [0, 0, 1, 1, 2, 2, 3, 3]
    for fit, again in zip(plan.cells[::2], plan.cells[1::2], strict=True):
        assert again.trained == fit.directory
    assert len({c.config_hash for c in plan.cells}) == 8


def test_a_cell_is_planned_under_the_fingerprint_that_its_process_finds(workshop):
    workshop.real_experiment("cfm")
    plan = make_plan(workshop.bench(contenders={"cfm": "cfm.yaml"}, seeds=AXES))
    for cell in plan.cells:
        if cell.kind == "fit":
            cell.directory.mkdir(parents=True)
            cell.config_path.write_text(cell.config_text())
            assert Experiment.from_files([cell.config_path]).fingerprint == cell.config_hash


def test_one_seed_for_everything_means_what_it_did(workshop):
    workshop.experiment("cfm")
    plain, named = (
        make_plan(workshop.bench(contenders={"cfm": "cfm.yaml"}, seeds=s)) for s in ([0, 3], {"all": [0, 3]})
    )
    assert plain.cells == named.cells
    assert plain.describe() == named.describe()
    assert "seed_axes" not in plain.describe()
    assert "seeds" not in plain.cells[0].config


def test_the_report_takes_the_spread_apart(workshop):
    workshop.experiment("cfm", value=2.0)
    assert workshop.run(workshop.bench(contenders={"cfm": "cfm.yaml"}, seeds=AXES)) == 0
    directory = workshop.runs / "mini"
    results = Results.of_bench(load_plan(directory), load_rows(directory))
    main = results.values("", "cfm", "fd[fake]")
    again = results.sweep("", "cfm", "fd[fake]", "evaluation_seed")
    assert list(main) == [0, 1, 2, 3]
    assert {at: list(values) for at, values in again.items()} == {7.0: [0, 1, 2, 3]}
    text = build_report(directory).read_text()
    assert "### Spread of training and of sampling" in text
    # The fake program's values are 2, 2.1, 2.2, 2.3, whatever the seed of the evaluation.
    assert f"| cfm | fd[fake] | {np.std([2, 2.1, 2.2, 2.3], ddof=1):.3g} | 0 | 100% | 4 | 8 |" in text
    assert "- seed 3: init 1, order 4, noise 2" in text
    assert "are not independent" in text


def test_trainings_that_share_seeds_decide_no_claim(workshop):
    """However far apart the sides are; where one axis alone varies, the trainings are independent."""
    for name, value in (("cfm", 2.0), ("tarflow", 20.0)):
        workshop.experiment(name, value=value)
    contenders = {"cfm": "cfm.yaml", "tarflow": "tarflow.yaml"}
    found = {}
    for axes in ({"init": [0, 1], "order": [0, 1]}, {"init": [0, 1, 2, 3], "order": [3]}):
        bench = workshop.bench(contenders=contenders, seeds={"axes": axes}, claims=["cfm.fd[fake] < tarflow.fd[fake]"])
        assert workshop.run(bench) == 0
        directory = workshop.runs / "mini"
        found[len(axes["init"])] = json.loads((directory / "claims.json").read_text())[0]["verdict"]
        text = (directory / "report.md").read_text()
        shared = len(axes["order"]) > 1
        assert ("trainings share seeds (init and order are crossed)" in text) == shared
        assert ("Crossed seeds give no verdict" in text) == shared
        assert ("no claim is decided by them" in text) == shared
        assert ("4 seeds can show a gap" in text) != shared
        shutil.rmtree(directory)
    assert found == {2: "undecided", 4: "holds"}


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ({"axes": {"inits": [0]}}, "seeds.axes: unknown key 'inits'; did you mean 'init'"),
        ({"axes": {"init": [0, 0]}}, "seeds.axes.init [0, 0] name 0 more than once"),
        ({"axes": {"init": 3}}, "seeds.axes.init is 3; write a list of whole numbers"),
        ({"axes": {}}, "seeds.axes is {}"),
        ({"axes": {"init": [0]}, "all": [0]}, "give either all or axes"),
        ({"every": [0]}, "seeds: unknown key 'every'"),
        ({}, "give either all or axes"),
        ([0, -1], "seeds[1]"),
    ],
)
def test_mistakes_in_the_seeds_cost_one_line(seeds, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_bench_seeds("seeds", seeds)


def test_contenders_may_not_set_what_the_axes_set(workshop):
    workshop.experiment("cfm")
    contenders = {"cfm": {"experiment": "cfm.yaml", "overrides": {"seeds.init": 3}}}
    with pytest.raises(ValueError, match="overrides may not set 'seeds'"):
        make_plan(workshop.bench(contenders=contenders))


# ---- the decomposition ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("training", "sampling"), [(1.0, 0.5), (0.3, 2.0), (2.0, 0.1), (0.0, 1.0)])
@pytest.mark.parametrize("shared", [slow(0.0), 1.5])
def test_the_components_of_a_simulation_are_recovered_on_average(training, sampling, shared):
    """Whatever part of the sampling moves all trainings alike."""
    rng, runs, size = np.random.default_rng(0), 4000, (5, 3)
    found = []
    for _ in range(runs):
        table = 5.0 + rng.normal(0, training, (size[0], 1)) + rng.normal(0, shared, (1, size[1]))
        found.append(variance_components((table + rng.normal(0, sampling, size)).tolist()))
    drawn = np.array([f.sampling for f in found])
    assert drawn.mean() == pytest.approx(sampling**2 + shared**2, abs=5 * drawn.std() / runs**0.5)
    # The estimate is unbiased before it is cut at 0, so with a clear training variance after it too.
    between = np.array([f.training for f in found])
    if training >= 2 * sampling:
        assert between.mean() == pytest.approx(training**2, abs=5 * between.std() / runs**0.5)
    assert all(f.training == 0 for f in found if f.negative)
    if training == 0:
        assert np.mean([f.negative for f in found]) > 0.4


def test_the_components_of_a_table_worked_by_hand():
    # Means of rows 2, 6, 4 and of columns 3, 5; the residuals of the rows are 0, -1, 1 and their opposites.
    # MST = 2 (4 + 4 + 0) / 2 = 8, MSE = 3 (1 + 1) / 1 = 6, MSR = 4 / 2 = 2: (8 - 2) / 2 = 3 and (6 + 2 x 2) / 3.
    found = variance_components([[1.0, 3.0], [4.0, 8.0], [4.0, 4.0]])
    assert (found.training, found.trainings, found.measurements) == (3.0, 3, 6)
    assert found.sampling == pytest.approx(10 / 3)
    assert found.share == pytest.approx(9 / 19)
    exact = variance_components([[0.1, 0.1, 0.1], [0.3, 0.3, 0.3]])
    assert (exact.sampling, exact.training, exact.share) == (0.0, pytest.approx(0.02), 1.0)
    assert variance_components([[1.0], [2.0]]) is None
    assert variance_components([]) is None
    assert (variance_components([[1.0, 3.0]]).training, variance_components([[1.0, 3.0]]).sampling) == (None, 2.0)


def test_an_axis_that_changes_nothing_is_found():
    seeds = read_bench_seeds("seeds", {"axes": {"init": [0, 1], "noise": [0, 1], "evaluation": [0, 1]}})
    assert [seeds.of(n)["init"] for n in range(4)] == [0, 0, 1, 1]
    fixed, moved = {0: 2.0, 1: 2.0, 2: 5.0, 3: 5.0}, {0: 2.0, 1: 2.0, 2: 5.0, 3: 5.5}
    assert idle_axes(seeds, [fixed]) == ["noise"]
    assert idle_axes(seeds, [fixed, moved]) == []
    assert idle_axes(seeds, [{0: 2.0, 3: 5.0}]) == []  # nothing to compare
    assert idle_axes(seeds, []) == []


def test_the_report_names_an_axis_that_changes_nothing_and_counts_its_trainings_once(workshop):
    workshop.experiment("cfm", value=2.0)
    axes = {"axes": {"init": [0], "noise": [0, 1], "evaluation": [0, 7]}}
    workshop.run(workshop.bench(contenders={"cfm": "cfm.yaml"}, seeds=axes))
    directory = workshop.runs / "mini"
    plan, rows = load_plan(directory), load_rows(directory)
    assert not variance_table(plan, Results.of_bench(plan, rows), "").notes[1:]
    alike = [dataclasses.replace(row, value=2.0) for row in rows]
    table = variance_table(plan, Results.of_bench(plan, alike), "")
    assert "cfm: the seed of noise changes no number" in table.notes[1]
    assert [entry.text for entry in table.rows[0]][-2:] == ["1", "2"]
