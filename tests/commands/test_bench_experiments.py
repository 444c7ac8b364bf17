"""A dry run meets what would stop a cell when it starts: once, in one line, with problem and contender."""

from __future__ import annotations

import pytest

from flowbench.bench.plan import make_plan
from flowbench.cli import main
from flowbench.commands import bench_experiments as validation
from flowbench.commands.bench_experiments import check_experiments
from flowbench.config import Experiment
from flowbench.data import FlowDataModule

MODEL = "model.init_args"


MOONS, RINGS = ({"overrides": {"data.dataset": name}} for name in ("moons", "ring"))


def bench_of(workshop, contenders, **content):
    workshop.real_experiment("cfm")
    found = {name: {"experiment": "cfm.yaml", "overrides": change} for name, change in contenders.items()}
    return workshop.bench(contenders={"cfm": "cfm.yaml", **found}, **content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{MODEL}.label_dropuot": 0.2}, "FlowMatching does not accept 'label_dropuot'; did you mean 'label_dropout'"),
        ({f"{MODEL}.solver": {"class_path": "flowbench.flows.Hein"}}, "did you mean"),
        ({f"{MODEL}.path": {"class_path": "flowbench.flows.LinearPath", "init_args": {"sigma": "a"}}}, "sigma"),
        ({"model.class_path": "flowbench.famlies.FlowMatching"}, "no module 'flowbench.famlies'"),
        ({"data.batch": 3}, "does not accept 'batch'"),
        ({"trainer.max_step": 3}, "does not accept 'max_step'"),
        ({"evaluator.num_sample": 3}, "does not accept 'num_sample'"),
        ({"evaluator.metrics.w2.class_path": "flowbench.evaluation.W3"}, "evaluator.metrics.w2"),
        ({"callbacks.c.class_path": "flowbench.evaluation.Nobody"}, "callbacks.c"),
        ({"evaluater.num_samples": 3}, "unknown key 'evaluater'"),
        ({"requires.autoencoder": {"data": {"dataset": "moons"}}}, "requires.autoencoder: the experiment"),
    ],
)
@pytest.mark.parametrize("problem", ["", "moons"])
def test_a_bad_contender_is_one_line_with_its_name(workshop, capsys, change, message, problem):
    problems = {"problems": {"rings": {**RINGS, "only": ["cfm"], "reason": "no"}, problem: MOONS}} if problem else {}
    path = bench_of(workshop, {"bad": change}, **problems)
    assert main(["bench", "-c", str(path), "--dry-run"]) == 2
    captured = capsys.readouterr()
    named = "flowbench: error: problem 'moons', contender 'bad': " if problem else "flowbench: error: contender 'bad': "
    assert captured.err.startswith(named)
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not workshop.runs.exists()


def test_what_cannot_be_composed_names_its_contender_too(workshop):
    path = bench_of(workshop, {"bad": {f"{MODEL}.conditional": "${nowhere.to.be.found}"}}, problems={"t": MOONS})
    with pytest.raises(ValueError, match=r"^problem 't', contender 'bad': key .* cannot be resolved"):
        make_plan(path)


def test_each_contender_of_a_problem_is_looked_at_once_and_equal_sections_are_not_looked_at_again(
    workshop, monkeypatch
):
    seen: list[dict] = []
    original = validation._validate
    monkeypatch.setattr(validation, "_validate", lambda tree, file: (seen.append(tree), original(tree, file))[1])
    problems = {"moons": MOONS, "rings": RINGS}
    path = bench_of(workshop, {"drop": {f"{MODEL}.label_dropout": 0.2}}, problems=problems, seeds=list(range(9)))
    check_experiments(make_plan(path))
    assert [(tree["data"]["dataset"], "evaluator" in tree, "trainer" in tree) for tree in seen] == [
        ("moons", True, True),
        ("moons", False, False),  # another model
        ("ring", False, False),  # other data
    ]  # and the fourth has nothing that is new


def test_no_data_are_read_and_no_weights_are_made(workshop, monkeypatch):
    def build(*_):
        raise AssertionError("built")

    monkeypatch.setattr(Experiment, "build", build)
    monkeypatch.setattr(FlowDataModule, "split", build)
    assert main(["bench", "-c", str(bench_of(workshop, {"b": {f"{MODEL}.label_dropout": 0.2}})), "--dry-run"]) == 0
