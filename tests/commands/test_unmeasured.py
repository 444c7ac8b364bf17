"""Numbers that cannot be computed, through the command line: the rest is written, a line and the exit status tell."""

from __future__ import annotations

import pytest
import torch

from flowbench.bench import compare
from flowbench.cli import main
from flowbench.commands import runs
from flowbench.core.rows import read_rows
from flowbench.core.statuses import PARTLY_MEASURED

from .conftest import POINTS

# Within one step: no untrained field is integrated at that tolerance.
HOPELESS = "{class_path: flowbench.flows.DormandPrince, init_args: {rtol: 1.0e-6, atol: 1.0e-6, max_steps: 1}}"


@pytest.fixture
def file(tmp_path):
    (tmp_path / "points.yaml").write_text(POINTS)
    words = ["-c", str(tmp_path / "points.yaml"), f"run.dir={tmp_path / 'run'}", "budget.steps=2"]
    return [*words, f"model.init_args.likelihood_solver={HOPELESS}"], tmp_path / "run"


def said(capsys, folder) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "not measured" in line]
    assert line.startswith("flowbench: not measured: nll (DormandPrince(")
    assert line.endswith(f"; everything else is in {folder / 'rows.jsonl'}")
    return line


def test_a_solver_that_gives_up_costs_the_likelihood_alone(file, capsys):
    words, folder = file
    assert main(["fit", *words, "--test"]) == PARTLY_MEASURED
    assert "loosen the tolerances" in said(capsys, folder)
    rows = {row.metric: row for row in read_rows(folder / "rows.jsonl")}
    assert (rows["nll"].status, rows["nll"].value) == ("failed", None)
    assert rows["w2"].status == rows["parameters"].status == "ok"
    # The training is finished: measuring again says the same, training again does nothing.
    assert main(["test", *words]) == PARTLY_MEASURED
    said(capsys, folder)
    assert main(["fit", *words]) == 0
    table = " ".join(compare([folder]).split())
    assert "│ failed │" in table
    assert "nll failed: DormandPrince(" in table


def test_a_mistake_of_the_code_ends_the_command_after_the_rows_are_written(file, monkeypatch, capsys):
    words, folder = file
    monkeypatch.setattr("flowbench.evaluation.Wasserstein2.measure", lambda *_: 1 + "1")
    assert main(["fit", *words, "evaluator.curve=[]", "--test"]) == 1
    assert "TypeError: unsupported operand" in capsys.readouterr().err
    rows = {row.metric: row for row in read_rows(folder / "rows.jsonl")}
    assert rows["w2"].provenance["message"].startswith("TypeError: unsupported operand")
    assert rows["parameters"].status == "ok"


def test_reference_rows_and_their_tables_say_what_is_missing(tmp_path, capsys):
    x = torch.zeros(200, 2)
    x[::5] = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    torch.save(x, tmp_path / "own.pt")
    (tmp_path / "points.yaml").write_text(POINTS)
    words = [f"data.path={tmp_path / 'own.pt'}", "data.dataset=pt", f"run.dir={tmp_path / 'run'}", "evaluator.curve=[]"]
    mmd = "evaluator.metrics.mmd.class_path=flowbench.evaluation.MaximumMeanDiscrepancy"
    assert main(["reference", "-c", str(tmp_path / "points.yaml"), *words, mmd]) == PARTLY_MEASURED
    out, err = capsys.readouterr()
    assert "not measured: floor.mmd, noise.mmd, gaussian.mmd, gmm.mmd (the median distance" in err
    assert "Not measured: floor.mmd" in " ".join(out.split())
    rows = read_rows(tmp_path / "run" / "rows.jsonl")
    assert {row.metric for row in rows if row.status == "ok"} >= {"w2", "nll"}


def test_a_python_caller_gets_the_folder(file, experiment):
    made = experiment(POINTS, "budget.steps=2", f"model.init_args.likelihood_solver={HOPELESS}")
    folder = runs.fit(made, test=True)
    assert {row.status for row in read_rows(folder / "rows.jsonl")} == {"ok", "failed"}
