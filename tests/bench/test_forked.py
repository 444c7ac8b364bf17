"""Cells that are forked from a server: they find what new processes find, and end as those do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flowbench.bench.forked import PROGRAM, Starter
from flowbench.bench.forked import SERVER as REAL_SERVER
from flowbench.bench.status import lock_is_held, read_status
from flowbench.core.rows import read_rows
from tests.marks import slow

from .conftest import SERVER, start_bench, wait_for

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="who takes orphans")
KILL, SEGV = -signal.SIGKILL, -signal.SIGSEGV


def facts_of(workshop, name: str = "a") -> dict:
    return json.loads((workshop.folder / f"{name}.facts").read_text())


def bench(workshop, seeds=(0,), **contenders) -> Path:
    for name, fake in contenders.items():
        workshop.experiment(name, facts=str(workshop.folder / f"{name}.facts"), **fake)
    return workshop.bench(contenders={name: f"{name}.yaml" for name in contenders}, seeds=list(seeds))


def is_forked(workshop, name: str = "a") -> bool:
    return facts_of(workshop, name)["forked"]


def test_what_is_forked_finds_what_a_new_process_finds(workshop, monkeypatch):
    """Environment, signals, descriptors, folder, its own session, and the bench as its parent."""
    monkeypatch.setenv("RANK", "3")  # of a launcher, whose process is the bench
    monkeypatch.setenv("FLOWBENCH_EXAMPLE", "ä = 1\n2")
    path = bench(workshop, a={})
    found = []
    for server in ((), SERVER):
        assert workshop.run(path, jobs=1, server=server) == 0
        found.append(facts_of(workshop))
        assert (workshop.cell("a", 0) / "log.txt").read_text().startswith("=== a seed 0, attempt 1, ")
        workshop.runs.rename(workshop.folder / f"runs-{len(found)}")
    fresh, forked = found
    assert (fresh.pop("forked"), forked.pop("forked")) == (False, True)
    assert forked == fresh
    assert fresh["leads"]
    assert fresh["parent"] == os.getpid()
    assert fresh["environment"]["FLOWBENCH_EXAMPLE"] == "ä = 1\n2"


def test_preparations_are_forked_too_and_tell_how_far_they_are(workshop):
    path = bench(workshop, a={"prepare_notes": [["training autoencoder", 0.5]]})
    assert workshop.run(path, server=SERVER) == 0
    note = json.loads((workshop.runs / "mini/prepare/a.progress.json").read_text())
    assert note == {"what": "training autoencoder", "fraction": 0.5}


@pytest.mark.parametrize(("code", "tries"), [(KILL, 2), (SEGV, 2), (137, 2), (1, 1)])
def test_what_ends_a_cell_is_known_and_ends_nothing_else(workshop, code, tries):
    path = bench(workshop, a={"die": {"fit": [code, code]}}, b={"value": 2.0})
    assert workshop.run(path, server=SERVER) == 1
    assert workshop.calls().count("fit a 0") == tries
    status = read_status(workshop.cell("a", 0))
    assert (status.state, status.exit_code) == ("FAILED", code)
    assert read_status(workshop.cell("b", 0)).state == "DONE"
    assert is_forked(workshop, "a")
    assert is_forked(workshop, "b")


def test_an_error_stands_in_the_log(workshop):
    path = bench(workshop, a={"crash_unless": "/nowhere/mended"})
    assert workshop.run(path, server=SERVER) == 1
    assert read_status(workshop.cell("a", 0)).message == "RuntimeError: loss is nan at step 7"
    assert is_forked(workshop)


def test_a_server_that_is_killed_takes_no_cell_with_it(workshop):
    """What it forked goes on, and what is left is started anew."""
    path = bench(workshop, a={"kills_the_server": True, "steps": 3, "step_seconds": 0.2}, b={"value": 2.0})
    assert workshop.run(path, jobs=1, server=SERVER) == 0
    assert (is_forked(workshop, "a"), is_forked(workshop, "b")) == (True, False)
    assert read_status(workshop.cell("a", 0)).attempts == 1


@pytest.mark.parametrize(
    ("server", "text"),
    [
        ((sys.executable, "-c", "import sys; sys.exit('out of order')"), "out of order"),
        slow((sys.executable, "-c", "print('0 cells'); import os, sys; os.close(int(sys.argv[1]))"), "0 cells"),
        slow(("/nowhere/server",), ""),
    ],
)
def test_without_a_server_each_cell_is_a_new_process(workshop, server, text):
    path = bench(workshop, a={})
    assert workshop.run(path, server=server) == 0
    assert not is_forked(workshop)
    assert text in (workshop.runs / "mini/prepare/a.log").read_text()


def test_cells_that_may_use_a_gpu_are_new_processes(workshop):
    path = bench(workshop, a={})
    file = workshop.folder / "a.yaml"
    file.write_text(file.read_text().replace("accelerator: cpu", "accelerator: auto"))
    assert workshop.run(path, server=SERVER) == 0
    assert not is_forked(workshop)
    assert not Path(f"{workshop.calls_file}-server").exists()


def test_no_server_is_left(workshop):
    assert workshop.run(bench(workshop, a={}), server=SERVER) == 0
    number = int(Path(f"{workshop.calls_file}-server").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
    Path(f"{workshop.calls_file}-server").unlink()
    assert workshop.run(workshop.folder / "mini.yaml", server=SERVER) == 0
    assert not Path(f"{workshop.calls_file}-server").exists(), "there was nothing to run"


@pytest.mark.parametrize("number", [*(slow(number) for number in (signal.SIGINT, signal.SIGTERM)), signal.SIGKILL])
def test_cells_and_server_end_with_the_bench(workshop, number):
    path = bench(workshop, a={"steps": 400, "step_seconds": 0.05})
    process = start_bench(path, server=SERVER)
    wait_for(lambda: lock_is_held(workshop.cell("a", 0)), seconds=60)
    server = int(Path(f"{workshop.calls_file}-server").read_text())
    process.send_signal(number)
    assert process.wait(30) == (-number if number == signal.SIGKILL else 128 + number)
    wait_for(lambda: not lock_is_held(workshop.cell("a", 0)))
    wait_for(lambda: not Path(f"/proc/{server}/cmdline").exists() or not Path(f"/proc/{server}/cmdline").read_bytes())
    assert is_forked(workshop)


def test_a_process_with_threads_is_not_forked(tmp_path):
    code = (
        "import socket, threading, time; from flowbench.core.forking import serve; "
        "threading.Thread(target=time.sleep, args=(5,), daemon=True).start(); serve(socket.socketpair()[0])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stderr.strip().endswith("RuntimeError: a process with 2 threads cannot be forked")


@pytest.mark.slow
def test_a_forked_training_has_the_numbers_of_a_new_one_and_its_memory(tmp_path):
    """Bit by bit; only times differ, and memory by a few per cent."""
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    rows = {}
    with Starter(PROGRAM, REAL_SERVER, environment) as forked:
        for name, start in (("new", Starter(PROGRAM, (), environment)), ("forked", forked)):
            words = ["fit", "-c", "flowbench:digits/cfm.yaml", "--test", f"run.dir={tmp_path / name}", "run.name=x"]
            words += ["budget.train_flops=null", "budget.steps=3", "evaluator.curve=[]", "evaluator.num_samples=32"]
            words += ["evaluator.num_likelihood=4", "evaluator.num_trajectories=8"]
            process = start(words, tmp_path / f"{name}.log", {}, name)
            assert process.wait() == 0, (tmp_path / f"{name}.log").read_text()
            rows[name] = read_rows(tmp_path / name / "rows.jsonl")
        assert forked.is_ready
    measured = {row.metric for row in rows["new"] if row.unit in ("s", "ms", "1/s") or row.metric == "flop_utilisation"}
    values = {
        name: [(row.metric, row.at, row.value) for row in found if row.metric not in {*measured, "peak_memory"}]
        for name, found in rows.items()
    }
    assert values["forked"] == values["new"]
    memory = {name: next(row.value for row in found if row.metric == "peak_memory") for name, found in rows.items()}
    assert memory["forked"] == pytest.approx(memory["new"], rel=0.1)
