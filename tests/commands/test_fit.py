from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowbench.commands import runs
from flowbench.core.rows import read_rows
from flowbench.training import read_checkpoint
from tests.marks import slow

from .conftest import DIGITS, POINTS, WEIGHTED, quality


def steps_of(run_dir) -> int:
    return read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["global_step"]


def curve_of(run_dir) -> list[tuple[int, str, float]]:
    points = [json.loads(line) for line in (run_dir / "curve.jsonl").read_text().splitlines()]
    return [(p["step"], p["metric"], p["value"]) for p in points]


def progress_of(run_dir) -> dict:
    return json.loads((run_dir / "progress.json").read_text())


def same_weights(one, other) -> None:
    first, second = (read_checkpoint(d / "checkpoints" / "last.ckpt") for d in (one, other))
    for part in (lambda c: c["state_dict"], lambda c: c["ema"]["shadow"]):
        assert part(first).keys() == part(second).keys()
        for name, value in part(first).items():
            assert torch.equal(value, part(second)[name]), name


def test_a_run_leaves_its_files(experiment):
    run = experiment(WEIGHTED)
    runs.fit(run, test=True)
    folder = run.run_dir
    assert (folder / "config.source.yaml").is_file()
    assert (folder / "config.yaml").is_file()
    assert steps_of(folder) == 20
    progress = progress_of(folder)
    assert (progress["phase"], progress["step"], progress["max_steps"], progress["fraction"]) == ("done", 20, 20, 1.0)
    assert abs(progress["updated"] - time.time()) < 600
    metrics = {row.metric for row in read_rows(folder / "rows.jsonl")}
    assert {"fd[identity]", "nll", "straightness", "train_flops", "parameters"} <= metrics
    assert [step for step, *_ in curve_of(folder)] == [4, 8, 12, 16, 20]
    assert (folder / "samples.npz").is_file()
    assert (folder / "trajectories.npz").is_file()
    assert list((folder / "tensorboard").glob("events*"))
    # No temporary file is left over.
    assert not [p for p in folder.rglob(".*")]


def test_the_same_command_again_trains_nothing_and_measures_the_same(experiment, monkeypatch):
    run = experiment(WEIGHTED)
    runs.fit(run, test=True)
    before, rows = (run.run_dir / "checkpoints" / "last.ckpt").read_bytes(), quality(run.run_dir)
    curve = curve_of(run.run_dir)
    monkeypatch.setattr("lightning.Trainer.fit", lambda *given, **options: pytest.fail("trained again"))
    runs.fit(run, test=True)
    assert (run.run_dir / "checkpoints" / "last.ckpt").read_bytes() == before
    assert quality(run.run_dir) == rows
    assert curve_of(run.run_dir) == curve
    assert progress_of(run.run_dir)["phase"] == "done"
    costs = {row.metric: row.value for row in read_rows(run.run_dir / "rows.jsonl")}
    assert costs["samples_seen"] == 20 * 16
    assert costs["train_seconds"] > 0


def test_the_saved_configuration_reproduces_the_weights_bit_for_bit(experiment, tmp_path):
    from flowbench.cli import main

    run = experiment(WEIGHTED)
    runs.fit(run)
    other = tmp_path / "other"
    torch.manual_seed(12345)  # whatever the process drew before
    assert main(["fit", "-c", str(run.run_dir / "config.yaml"), f"run.dir={other}"]) == 0
    same_weights(run.run_dir, other)


@pytest.mark.slow
def test_never_resuming_starts_over(experiment):
    run = experiment(DIGITS)
    runs.fit(run)
    runs.fit(run, resume="never")
    again = experiment(DIGITS, name="again")
    runs.fit(again)
    same_weights(run.run_dir, again.run_dir)
    assert curve_of(run.run_dir) == curve_of(again.run_dir)


@pytest.mark.parametrize(
    "step",
    [
        9,
        slow(8),
        slow(6),
        slow(20),
    ],
)
def test_a_run_that_died_goes_on_as_if_it_had_not(experiment, monkeypatch, step):
    """In the middle of validation (8, and 20 the last), between checkpoints (9), right after one (6)."""
    whole, broken = experiment(WEIGHTED, name="whole"), experiment(WEIGHTED, name="broken")
    runs.fit(whole, test=True)

    class Killed(BaseException):
        pass

    def die(module, *given):
        if module.trainer.global_step == step:
            raise Killed

    with monkeypatch.context() as patch:
        hook = "on_validation_start" if step in (8, 20) else "on_train_batch_start"
        patch.setattr(f"flowbench.families.FlowModule.{hook}", die)
        with pytest.raises(Killed):
            runs.fit(broken, test=True)
    assert steps_of(broken.run_dir) == step // 2 * 2
    runs.fit(broken, test=True)
    same_weights(whole.run_dir, broken.run_dir)
    assert quality(broken.run_dir) == quality(whole.run_dir)
    assert curve_of(broken.run_dir) == curve_of(whole.run_dir)


@pytest.mark.slow
def test_a_run_killed_by_sigkill_goes_on_as_if_it_had_not(experiment):
    """A real process, killed while it trains."""
    whole = experiment(WEIGHTED, "budget.steps=600", name="whole")
    runs.fit(whole, test=True)
    killed = experiment(WEIGHTED, "budget.steps=600", name="killed")
    file = killed.run_dir.parent / "killed.yaml"
    killed.write(file)
    command = [sys.executable, "-m", "flowbench.cli", "fit", "-c", str(file), "--test"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = killed.run_dir / "checkpoints" / "last.ckpt"
    limit = time.monotonic() + 300
    while not checkpoint.is_file() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < steps_of(killed.run_dir) < 600
    assert not (killed.run_dir / "rows.jsonl").exists()
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    same_weights(whole.run_dir, killed.run_dir)
    assert quality(killed.run_dir) == quality(whole.run_dir)
    assert curve_of(killed.run_dir) == curve_of(whole.run_dir)


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ("budget.steps=7", 7),
        slow("budget.samples_seen=100", 6),  # 16 per step; the rest does not pay for another
        slow("budget.epochs=0.1", 6),  # 1077 training digits: 6.73 batches
        ("budget.train_flops={flops}", 5),
        slow("trainer.max_steps=4", 4),
    ],
)
def test_budgets_end_where_they_should(experiment, budget, steps):
    probe = experiment(DIGITS, name="probe")
    if "{flops}" in budget:
        runs.fit(probe, test=True)
        row = next(r for r in read_rows(probe.run_dir / "rows.jsonl") if r.metric == "train_flops")
        budget = budget.format(flops=row.value / 6 * 5.5)
    run = experiment(DIGITS, *([budget] if "max_steps" not in budget else [budget, "budget=null"]))
    runs.fit(run)
    assert steps_of(run.run_dir) == steps


def test_accumulated_gradients_spend_the_same_budget_in_fewer_steps(experiment):
    run = experiment(DIGITS, "budget.samples_seen=320", "trainer.accumulate_grad_batches=2")
    runs.fit(run, test=True)
    assert steps_of(run.run_dir) == 10
    assert [step for step, *_ in curve_of(run.run_dir)] == [2, 4, 6, 8, 10]
    rows = {row.metric: row for row in read_rows(run.run_dir / "rows.jsonl")}
    assert rows["samples_seen"].value == 320
    assert rows["nll"].provenance["global_batch"] == 32


def test_a_budget_of_seconds_stops_at_its_limit_and_is_not_spent_twice(experiment, monkeypatch):
    """Every training step takes a quarter of a second on this clock; validation and checkpoints take none."""
    now = [0.0]

    def clock() -> float:
        now[0] += 0.25
        return now[0]

    inner = runs.Budget
    monkeypatch.setattr(runs, "Budget", lambda *given, **options: inner(*given, **options, clock=clock))
    run = experiment(POINTS, "budget.train_seconds=2")
    runs.fit(run)
    assert steps_of(run.run_dir) == 8
    assert progress_of(run.run_dir)["fraction"] == 1.0
    monkeypatch.setattr("lightning.Trainer.fit", lambda *given, **options: pytest.fail("trained again"))
    runs.fit(run)


def test_measuring_again_leaves_a_finished_run_finished(experiment):
    """A bench reads the phase: a test by hand must not make it repeat the cell."""
    run = experiment(DIGITS)
    runs.fit(run, test=True)
    runs.test(run)
    assert progress_of(run.run_dir)["phase"] == "done"


@pytest.mark.slow
def test_commands_after_training_write_no_step_zero_into_tensorboard(experiment):
    run = experiment(WEIGHTED)
    runs.fit(run, test=True)
    runs.test(run)
    runs.validate(run)
    events = EventAccumulator(str(run.run_dir / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()
    assert {e.step for e in events.Images("test/samples")} == {20}
    assert [e.step for e in events.Images("val/samples")] == [4, 8, 12, 16, 20]
    assert 0 not in {e.step for e in events.Scalars("val/loss")}


def test_validation_gives_the_objective_and_keeps_the_curve(experiment):
    run = experiment(DIGITS)
    runs.fit(run)
    curve = curve_of(run.run_dir)
    metrics = runs.validate(run)
    assert metrics["val/loss"] > 0
    assert runs.validate(run, run.run_dir / "checkpoints" / "last.ckpt") == metrics
    assert curve_of(run.run_dir) == curve
    assert len(curve) == 6


@pytest.mark.parametrize("optimizer", ["AdamW", "SinkGD"])
def test_rows_hold_the_last_validation_and_what_the_optimiser_keeps(experiment, optimizer):
    spec = f"{{_replace_: true, class_path: flowbench.training.{optimizer}}}"
    run = experiment(DIGITS, f"model.init_args.optimizer={spec}", "evaluator.curve=[]")
    rows = {row.metric: row for row in read_rows(runs.fit(run, test=True) / "rows.jsonl")}
    loss = rows["validation_loss"]
    assert loss.value == pytest.approx(runs.validate(run)["val/loss"], rel=1e-6)
    assert (loss.protocol, loss.goal) == ("val/step-6", "none")
    # All that was saved but the counter of each tensor.
    (state,) = read_checkpoint(run.run_dir / "checkpoints" / "last.ckpt")["optimizer_states"]
    kept = [value for moments in state["state"].values() for name, value in moments.items() if name != "step"]
    assert rows["optimizer_state_bytes"].value == sum(value.nbytes for value in kept)
    # Measured from the checkpoint, too.
    again = {row.metric: row.value for row in read_rows(runs.test(run) / "rows.jsonl")}
    assert all(again[name] == rows[name].value for name in ("validation_loss", "optimizer_state_bytes"))


@pytest.mark.slow
def test_importing_the_runs_first_needs_no_other_import():
    """In a notebook it may be the first import; the guard of torchvision must come before Lightning."""
    subprocess.run([sys.executable, "-c", "import flowbench.commands.runs"], check=True)
