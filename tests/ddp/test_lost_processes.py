"""Three processes, one of which ends: one line, one status, no process left, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import HERE, TARFLOW, Workplace

pytestmark = pytest.mark.slow

ENDING = {**TARFLOW, "class_path": "ddp_dummies.EndingTARFlow"}
# A few seconds after the end of one process none may be left.
SECONDS = 30


def run(workplace: Workplace, *words: str, **variables: str) -> tuple[int, str]:
    """A command under three processes, as a user starts it; its status and what it said of errors."""
    where = ["trainer.devices=3", "trainer.accelerator=cpu", "trainer.strategy=ddp"]
    process = subprocess.Popen(
        [sys.executable, "-m", "flowbench.cli", *words, *where],
        cwd=workplace.folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(_paths()), **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, said = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.fail("the processes hang")
    limit = time.monotonic() + SECONDS
    while _lives(process.pid):
        assert time.monotonic() < limit, "a process is left"
        time.sleep(0.1)
    return process.returncode, said


def _paths() -> list[str]:
    return [str(HERE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def experiment(workplace: Workplace) -> Path:
    return workplace.write("ending", ENDING, data={"batch_size": 30})


@pytest.fixture(scope="module")
def whole(workplace: Workplace, experiment: Path) -> Path:
    folder = workplace.folder / "ending-whole"
    status, said = run(workplace, "fit", "-c", str(experiment), f"run.dir={folder}")
    assert status == 0, said
    return folder


def check_goes_on(workplace: Workplace, experiment: Path, folder: Path, whole: Path) -> None:
    status, said = run(workplace, "fit", "-c", str(experiment), f"run.dir={folder}")
    assert status == 0, said
    one, two = (torch.load(place / "checkpoints" / "last.ckpt", weights_only=True) for place in (folder, whole))
    assert one["global_step"] == two["global_step"] == 6
    for name, value in two["ema"]["shadow"].items():
        # Not bit for bit: DDP sums the gradients of its first step in another order than those of later ones.
        torch.testing.assert_close(one["ema"]["shadow"][name], value, rtol=1e-4, atol=1e-6)


def progress(folder: Path) -> dict:
    return json.loads((folder / "progress.json").read_text())


@pytest.mark.parametrize(
    ("rank", "how", "status", "said"),
    [
        (1, "SIGKILL", 137, "process 1 of 3 was ended by SIGKILL, perhaps for want of memory"),
        (2, "SIGKILL", 137, "process 2 of 3 was ended by SIGKILL, perhaps for want of memory"),
        (1, "SIGSEGV", 139, "process 1 of 3 was ended by SIGSEGV"),
        (1, "error", 1, "process 1 of 3 failed: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        (2, "mistake", 2, "process 2 of 3 failed: data.path holds something else here"),
        (0, "error", 1, "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_the_end_of_one_process_is_named_in_one_line(workplace, experiment, whole, rank, how, status, said):
    folder = workplace.folder / f"ending-{rank}-{how}"
    words = ["fit", "-c", str(experiment), f"run.dir={folder}", "--test"]
    code, err = run(workplace, *words, FLOWBENCH_TEST_END=f"{rank},3,{how}")
    assert code == status, err
    (line,) = err.strip().splitlines()
    assert line.startswith(f"flowbench: error: {said}; ")
    assert f"the same command continues from {folder / 'checkpoints' / 'last.ckpt'} (step " in line
    assert f"details in {folder / 'error.log'}" in line
    log = (folder / "error.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "process 0 (pid " in log
    assert (progress(folder)["phase"], progress(folder)["reason"]) == ("failed", said)
    if how == "SIGKILL":
        check_goes_on(workplace, experiment, folder, whole)


def test_the_end_of_the_first_process_is_told_by_the_second(workplace, experiment, whole):
    folder = workplace.folder / "ending-first"
    words = ["fit", "-c", str(experiment), f"run.dir={folder}"]
    code, err = run(workplace, *words, FLOWBENCH_TEST_END="0,3,SIGKILL")
    assert code == -signal.SIGKILL
    (line,) = err.strip().splitlines()
    assert line == (
        "flowbench: error: process 0 is gone, killed perhaps for want of memory; the same command continues"
    )
    assert progress(folder)["phase"] == "failed"
    check_goes_on(workplace, experiment, folder, whole)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT"])
def test_a_signal_to_one_process_stops_all_at_the_same_step(workplace, experiment, whole, rank, how):
    folder = workplace.folder / f"ending-{rank}-{how}"
    words = ["fit", "-c", str(experiment), f"run.dir={folder}"]
    code, err = run(workplace, *words, FLOWBENCH_TEST_END=f"{rank},2,{how}")
    number = getattr(signal, how)
    assert code == 128 + number, err
    (line,) = err.strip().splitlines()
    what = "interrupted" if how == "SIGINT" else "ended by SIGTERM"
    assert line == (
        f"flowbench: {what}; at step 3 of 6; the same command continues from "
        f"{folder / 'checkpoints' / 'last.ckpt'} (step 3)"
    )
    assert not (folder / "error.log").exists()
    assert progress(folder)["phase"] == "interrupted"
    if how == "SIGTERM":
        check_goes_on(workplace, experiment, folder, whole)


def test_a_process_that_works_on_without_the_lost_one_is_ended(workplace, experiment, whole):
    """Nothing is exchanged for a minute; Lightning would end the first process by SIGKILL."""
    started = time.monotonic()
    words = ["test", "-c", str(whole / "config.yaml"), f"run.dir={whole}"]
    code, err = run(workplace, *words, FLOWBENCH_TEST_END="1,test,SIGKILL", FLOWBENCH_TEST_WORK="300")
    assert time.monotonic() - started < 250
    assert code == 137
    (line,) = err.strip().splitlines()
    assert line.startswith("flowbench: error: process 1 of 3 was ended by SIGKILL")
    assert not (whole / "rows.jsonl").exists()
    assert progress(whole)["trained"]
