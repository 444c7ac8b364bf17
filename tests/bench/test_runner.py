from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from flowbench.bench.plan import make_plan
from flowbench.bench.preview import plan_lines
from flowbench.bench.results import load_rows
from flowbench.bench.status import Status, lock_is_held, read_status, write_status
from tests.marks import slow

from .conftest import PROGRAM, start_bench, wait_for


def two(workshop, **fake):
    workshop.experiment("a", value=1.0)
    workshop.experiment("b", value=2.0, **fake)
    return workshop.bench(contenders={"a": "a.yaml", "b": "b.yaml"}, claims=["a.fd[fake] < b.fd[fake]"])


def test_a_bench_runs_and_a_second_command_does_nothing(workshop):
    path = two(workshop)
    assert workshop.run(path, jobs=2) == 0
    calls = workshop.calls()
    assert calls[0].startswith("prepare")
    assert sorted(calls[1:]) == ["fit a 0", "fit a 1", "fit b 0", "fit b 1", "reference reference 0"]
    rows = load_rows(workshop.runs / "mini")
    assert {r.contender for r in rows} == {"a", "b", "floor", "noise"}
    assert rows[-1].provenance["wait"] == "PASSIVE"
    assert rows[-1].provenance["threads"] == str(make_plan(path, jobs=2).policy.threads)
    assert (workshop.runs / "mini/results.csv").read_text().count("\n") == len(rows) + 1
    before = (workshop.runs / "mini/results.jsonl").read_bytes()
    assert "report.md" in workshop.output.replace("\n", "")

    started = time.monotonic()
    assert workshop.run(path, jobs=2) == 0
    assert time.monotonic() - started < 5
    assert workshop.calls() == []
    assert (workshop.runs / "mini/results.jsonl").read_bytes() == before


def test_dry_run_writes_nothing(workshop):
    path = workshop.bench(contenders={name: workshop.real_experiment(name) for name in "ab"})
    assert workshop.run(path, dry_run=True) == 0
    assert "4 cells" in workshop.output
    assert not workshop.runs.exists()
    assert workshop.calls() == []


def retested(workshop, **fake):
    workshop.experiment("a", value=1.0, steps=3, **fake)
    guided = {"trained": "a", "overrides": {"fake.value": 5.0}}
    return workshop.bench(contenders={"a": "a.yaml", "guided": guided})


def test_weights_are_measured_again_after_their_training(workshop):
    path = retested(workshop)
    assert workshop.run(path, jobs=2) == 0
    calls = [call for call in workshop.calls() if not call.startswith("prepare")]
    assert sorted(calls) == ["fit a 0", "fit a 1", "reference reference 0", "test guided 0", "test guided 1"]
    for seed in (0, 1):
        assert calls.index(f"fit a {seed}") < calls.index(f"test guided {seed}")
    rows = [r for r in load_rows(workshop.runs / "mini") if r.contender == "guided"]
    assert [(r.value, r.provenance["resumed_from"]) for r in rows] == [(5.0, 3), (5.1, 3)]
    assert workshop.run(path, jobs=2) == 0
    assert workshop.calls() == []


@pytest.mark.slow
def test_without_the_training_there_is_nothing_to_measure(workshop):
    path = retested(workshop, crash_unless=str(workshop.folder / "mended"))
    assert workshop.run(path) == 1
    assert not [call for call in workshop.calls() if call.startswith("test")]
    assert "did not finish" in read_status(workshop.cell("guided", 0)).message
    (workshop.folder / "mended").touch()
    assert workshop.run(path) == 0
    assert read_status(workshop.cell("guided", 1)).state == "DONE"


def test_a_crash_is_a_row_and_is_retried(workshop):
    path = two(workshop, crash_unless=str(workshop.folder / "mended"))
    assert workshop.run(path) == 1
    failed = [r for r in load_rows(workshop.runs / "mini") if r.status == "failed"]
    assert [(r.contender, r.seed) for r in failed] == [("b", 0), ("b", 1)]
    assert "loss is nan at step 7" in failed[0].provenance["message"]
    assert "loss is nan at step 7" in Path(failed[0].provenance["log"]).read_text()
    assert read_status(workshop.cell("a", 1)).state == "DONE"
    assert "Incomplete" in (workshop.runs / "mini/report.md").read_text()
    workshop.calls()

    (workshop.folder / "mended").touch()
    assert workshop.run(path) == 0
    assert sorted(workshop.calls()) == ["fit b 0", "fit b 1", "prepare b 0"]
    assert read_status(workshop.cell("b", 0)).attempts == 2
    assert read_status(workshop.cell("a", 0)).attempts == 1
    assert "Incomplete" not in (workshop.runs / "mini/report.md").read_text()


def test_a_changed_experiment_starts_fresh_and_keeps_the_old_one(workshop):
    path = two(workshop)
    workshop.run(path)
    workshop.calls()
    workshop.experiment("b", value=5.0)
    assert workshop.run(path) == 0
    assert workshop.calls() == ["prepare b 0", "fit b 0", "fit b 1"]
    assert (workshop.cell("b", 0).parent / "seed-0.stale-1" / "rows.jsonl").is_file()
    assert {r.value for r in load_rows(workshop.runs / "mini") if r.contender == "b"} == {5.0, 5.1}
    assert workshop.output.count("experiment changed") == 2


def test_cells_run_at_the_same_time(workshop):
    (workshop.folder / "meeting").mkdir()
    workshop.experiment("a", meet=2, meet_in=str(workshop.folder / "meeting"))
    path = workshop.bench(contenders={"a": "a.yaml"})
    assert workshop.run(path, jobs=2) == 0


def test_success_without_rows_is_a_failure(workshop):
    assert workshop.run(two(workshop, no_rows=True)) == 1
    assert "does not exist" in read_status(workshop.cell("b", 0)).message


def test_damaged_rows_of_a_finished_cell_are_measured_again(workshop):
    path = two(workshop)
    workshop.run(path)
    workshop.calls()
    (workshop.cell("a", 1) / "rows.jsonl").write_text("{broken\n")
    assert workshop.run(path) == 0
    assert workshop.calls() == ["prepare a 1", "fit a 1"]
    assert "line 1: not JSON" in workshop.output


def test_a_failed_preparation_fails_its_cells(workshop):
    workshop.experiment("a", value=1.0)
    (workshop.folder / "b.yaml").write_text("base: [a.yaml]\ndata: {dataset: other}\nfake: {prepare_fails: true}\n")
    assert workshop.run(workshop.bench(contenders={"a": "a.yaml", "b": "b.yaml"})) == 1
    assert read_status(workshop.cell("a", 0)).state == "DONE"
    status = read_status(workshop.cell("b", 1))
    assert status.state == "FAILED"
    assert "no such dataset" in status.message
    assert "fit b 0" not in workshop.calls()


def test_sigkill_in_the_middle_of_a_cell(workshop):
    path = two(workshop, steps=40, step_seconds=0.05)
    bench = start_bench(path)
    checkpoint = workshop.cell("b", 0) / "checkpoint"
    wait_for(lambda: checkpoint.exists() and int(checkpoint.read_text()) >= 3, seconds=60)
    bench.send_signal(signal.SIGKILL)
    bench.wait()
    wait_for(lambda: not lock_is_held(workshop.cell("b", 0)))  # the cell died with its bench
    assert int(checkpoint.read_text()) < 40
    assert read_status(workshop.cell("b", 0)).state == "RUNNING"
    assert read_status(workshop.cell("a", 0)).state == "DONE"
    workshop.calls()

    assert workshop.run(path, jobs=2) == 0
    assert sorted(workshop.calls()) == ["fit a 1", "fit b 0", "fit b 1", "prepare b 0"]
    (row,) = [r for r in load_rows(workshop.runs / "mini") if (r.contender, r.seed) == ("b", 0)]
    assert row.provenance["resumed_from"] >= 3
    assert row.value == 2.0


@pytest.mark.parametrize("number", [slow(signal.SIGINT), signal.SIGTERM])
def test_signals_end_the_children(workshop, number):
    path = two(workshop, steps=400, step_seconds=0.05)
    bench = start_bench(path)
    wait_for(lambda: lock_is_held(workshop.cell("b", 0)), seconds=60)
    bench.send_signal(number)
    assert bench.wait(20) == 128 + number
    assert not lock_is_held(workshop.cell("b", 0))


@pytest.mark.slow
def test_a_cell_that_outlived_its_bench_is_waited_for(workshop):
    path = two(workshop, steps=20, step_seconds=0.1)
    plan = make_plan(path)
    cell = next(c for c in plan.cells if (c.contender, c.seed) == ("b", 0))
    cell.directory.mkdir(parents=True)
    cell.config_path.write_text(cell.config_text())
    write_status(cell.directory, Status("RUNNING", cell.config_hash, attempts=1, started=time.time()))
    orphan = subprocess.Popen([*PROGRAM, "fit", "-c", str(cell.config_path), "--test"])
    wait_for(lambda: lock_is_held(cell.directory))
    assert workshop.run(path, jobs=3) == 0
    assert orphan.wait() == 0
    assert workshop.calls().count("fit b 0") == 1
    assert read_status(cell.directory).attempts == 1


@pytest.mark.slow
def test_a_cell_that_ended_after_its_bench_died_is_not_repeated(workshop):
    path = two(workshop)
    workshop.run(path)
    workshop.calls()
    status = read_status(workshop.cell("b", 1))
    write_status(workshop.cell("b", 1), Status("RUNNING", status.config_hash, 1, started=status.started))
    assert workshop.run(path) == 0
    assert workshop.calls() == []


def test_two_benches_do_not_share_a_directory(workshop):
    path = two(workshop, steps=400, step_seconds=0.05)
    bench = start_bench(path)
    wait_for(lambda: lock_is_held(workshop.cell("b", 0)), seconds=60)
    with pytest.raises(ValueError, match="another bench is at work"):
        workshop.run(path)
    bench.send_signal(signal.SIGTERM)
    bench.wait(20)


def test_a_full_disk_is_one_line(workshop, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "status.json")

    monkeypatch.setattr("flowbench.bench.runner.write_status", full)
    assert workshop.run(two(workshop)) == 1
    assert "No space left on device: status.json; make room" in workshop.output


def test_a_missing_program_is_one_line(workshop, monkeypatch):
    monkeypatch.setitem(type(workshop).run.__globals__, "PROGRAM", ("/nowhere/flowbench",))
    with pytest.raises(ValueError, match="/nowhere/flowbench does not exist"):
        workshop.run(two(workshop))


def test_concurrent_timings_are_announced(workshop):
    before = dict(os.environ)
    plan = make_plan(two(workshop), ["budget.train_seconds=5"], jobs=2)
    assert "under 2 concurrent cells" in plan_lines(plan)
    assert dict(os.environ) == before, "the policy is for cells, not for this process"


@pytest.mark.slow
def test_what_a_preparation_does_not_concern_runs_beside_it(workshop):
    """Reference rows and contenders that require no training begin while a training is prepared."""
    workshop.experiment("quick")
    slow = workshop.folder / workshop.experiment("slow", prepare_notes=[["training teacher", k / 6] for k in range(6)])
    slow.write_text(slow.read_text() + "requires: {teacher: quick.yaml}\n")
    path = workshop.bench(contenders={"slow": "slow.yaml", "quick": "quick.yaml"}, seeds=[0])
    assert workshop.run(path, jobs=2) == 0
    assert sum(call.startswith("prepare") for call in workshop.calls()) == 2
    lines = [line[9:] for line in workshop.output.splitlines()]
    order = ["preparing 1/2", "preparing 2/2", "start reference", "start quick", "done  quick", "start slow"]
    places = [next(k for k, line in enumerate(lines) if line.startswith(text)) for text in order]
    assert places == sorted(places)

    workshop.runs.rename(workshop.folder / "before")
    assert workshop.run(path, jobs=1) == 0  # one place: everything is prepared for first
    assert [call.split()[0] for call in workshop.calls()] == ["prepare", "prepare", "reference", "fit", "fit"]
