"""Every file in experiments/ is parsed, built and run for one step; a new file joins by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flowbench import runs
from flowbench.cli import main
from flowbench.config import Experiment
from flowbench.families import read_checkpoint
from flowbench.rows import read_rows

ROOT = Path(__file__).parent.parent / "experiments"
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.yaml"))


def content(file: Path) -> dict:
    return yaml.safe_load((ROOT / file).read_text())


def has_a_model(file: Path) -> bool:
    """A whole experiment names a class, itself or in the files that it is based on."""
    found = content(file)
    if "class_path" in found.get("model", {}):
        return True
    return any(has_a_model(file.parent / base) for base in found.get("base", []))


BENCHES = [file for file in FILES if "contenders" in content(file)]
EXPERIMENTS = [file for file in FILES if file not in BENCHES and has_a_model(file)]
# One step is enough, of the required autoencoder too; that one is as narrow as it can be.
SHORT = ["budget=null", "trainer.max_steps=1", "trainer.limit_val_batches=1", "data.batch_size=8"]
TINY_AUTOENCODER = [
    "requires.autoencoder.budget.steps=1",
    "requires.autoencoder.model.init_args.network.init_args.width=8",
]
TINY_AUTOENCODER += ["requires.autoencoder.data.batch_size=8"]


def sweep_of(file: Path) -> list[int]:
    """The budgets of network evaluations that a bench asks of this experiment."""
    asked = {n for b in BENCHES if str(file) in content(b)["contenders"].values() for n in _swept(b)}
    return sorted(asked)


def _swept(bench: Path) -> list[int]:
    return content(bench).get("sweep", {}).get("network_evaluations", [])


def bases(file: Path) -> set[Path]:
    found = {
        (ROOT / file.parent / base).resolve().relative_to(ROOT.resolve()) for base in content(file).get("base", [])
    }
    return found | {deeper for base in found for deeper in bases(base)}


def test_the_benches_ask_for_few_evaluations_too():
    assert sweep_of(Path("toy/cfm.yaml")) == sweep_of(Path("digits/wcfm.yaml")) == [1, 2, 4, 8, 16, 32]


def test_every_file_is_an_experiment_a_bench_or_part_of_one():
    assert len(EXPERIMENTS) >= 14
    assert len(BENCHES) >= 3
    parts = {part for file in EXPERIMENTS for part in bases(file)}
    assert set(FILES) == set(EXPERIMENTS) | set(BENCHES) | parts


@pytest.mark.parametrize("file", EXPERIMENTS, ids=str)
def test_an_experiment_is_parsed_built_and_trained_for_a_step(file, tmp_path, monkeypatch):
    overrides = [f"run.dir={tmp_path / 'run'}", *SHORT]
    if "autoencoder" in Experiment.from_files([ROOT / file]).requirements:
        overrides += TINY_AUTOENCODER
    experiment = Experiment.from_files([ROOT / file], overrides)
    if experiment.build_evaluator() is not None:
        # A point of the curve costs thousands of samples; tests/evaluation measures in earnest.
        # What the benches ask of its sampler is checked when training begins.
        overrides += ["evaluator.curve=[]", f"evaluator.sweep.network_evaluations={sweep_of(file)}"]
        experiment = Experiment.from_files([ROOT / file], overrides)
    runs.fit(experiment)
    state = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert state["global_step"] == 1
    assert all(value.isfinite().all() for value in state["state_dict"].values())


@pytest.mark.parametrize("file", EXPERIMENTS, ids=str)
def test_an_experiment_as_shipped_has_an_end(file):
    experiment = Experiment.from_files([ROOT / file])
    experiment.require_budget()
    assert experiment.budget is not None, "a budget travels to any batch size, trainer.max_steps does not"


@pytest.mark.parametrize("file", BENCHES, ids=str)
def test_a_bench_is_planned(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "-c", str(ROOT / file), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    for name in content(file)["contenders"]:
        assert name in plan
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("file", [file for file in EXPERIMENTS if file.stem != "autoencoder"], ids=str)
def test_an_experiment_is_measured_with_all_its_metrics(file, tmp_path):
    """The shipped metrics on a flow of one step, with few samples; every number is finite."""
    few = ["evaluator.num_samples=60", "evaluator.num_trajectories=20", "evaluator.sweep.network_evaluations=[2,4]"]
    overrides = [f"run.dir={tmp_path / 'run'}", *SHORT, *few, "trainer.limit_test_batches=1", "data.eval_batch_size=50"]
    if "autoencoder" in Experiment.from_files([ROOT / file]).requirements:
        overrides += TINY_AUTOENCODER
    experiment = Experiment.from_files([ROOT / file], overrides)
    runs.fit(experiment, test=True)
    rows = read_rows(tmp_path / "run" / "rows.jsonl")
    assert all(row.status == "ok" for row in rows)
    assert {"nll", "straightness", "parameters"} <= {row.metric for row in rows}
    assert any("sweep" in row.protocol for row in rows) == ("tarflow" not in file.stem and "starflow" not in file.stem)
    assert (tmp_path / "run" / "curve.jsonl").is_file()
