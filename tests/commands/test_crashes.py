"""A process that is killed by SIGKILL, wherever it is, leaves a folder in which the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flowbench.core.rows import read_rows
from flowbench.training import read_checkpoint
from tests.marks import slow

from .conftest import POINTS, quality

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")

SMALL = POINTS.replace("    nll: {class_path: flowbench.tasks.generation.NegativeLogLikelihood}\n", "").replace(
    "budget: {steps: 20}", "budget: {steps: 10}"
)
# One kill in training, in measuring and in validation; the slow tests go through all points of a run.
QUICK = [("after last.ckpt", 5), ("after rows.jsonl", 1), ("hook on_validation_end", 5)]


class Server:
    """A process that forks one for each command."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("crash_server.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(self, words: list[str], **request) -> int:
        self.process.stdin.write(json.dumps({"words": words, **request}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server():
    found = Server()
    yield found
    found.process.stdin.close()
    found.process.wait(60)


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """The run that nobody killed, and how often it reaches each point."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "points.yaml").write_text(SMALL)
    words = ["fit", "-c", str(folder / "points.yaml"), f"run.dir={folder / 'run'}", "--test"]
    assert server.run(words, counts=str(folder / "counts.json")) == 0
    return folder


def left(run: Path) -> dict[str, Any]:
    """What a run left, but for what a clock measured."""
    state = read_checkpoint(run / "checkpoints" / "last.ckpt")
    progress = json.loads((run / "progress.json").read_text())
    curve = map(json.loads, (run / "curve.jsonl").read_text().splitlines())
    return {
        "step": state["global_step"],
        "weights": {name: value.tolist() for name, value in state["state_dict"].items()},
        "averages": {name: value.tolist() for name, value in state["ema"]["shadow"].items()},
        "rows": quality(run),
        "curve": [(point["step"], point["metric"], point["value"]) for point in curve],
        "progress": (progress["phase"], progress["trained"], progress["step"]),
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()),
    }


def kill_and_go_on(server: Server, whole: Path, tmp_path: Path, point: str, call: int) -> dict[str, Any]:
    """What a run left that was killed at a point and went on."""
    words = ["fit", "-c", str(whole / "points.yaml"), f"run.dir={tmp_path / 'run'}", "--test"]
    assert server.run(words, point=point, call=call) == -signal.SIGKILL, f"{point} is not reached {call} times"
    assert server.run(words) == 0
    return left(tmp_path / "run")


def test_a_run_that_nobody_kills_is_finished(whole):
    found = left(whole / "run")
    assert (found["step"], found["progress"]) == (10, ("done", True, 10))
    assert all(found.values())


@pytest.mark.parametrize(("point", "call"), QUICK)
def test_a_kill_in_training_measuring_and_validation(server, whole, tmp_path, point, call):
    assert kill_and_go_on(server, whole, tmp_path, point, call) == left(whole / "run")


@pytest.mark.slow
def test_a_kill_anywhere(server, whole, tmp_path):
    """At the first, a middle and the last time of every hook, and before and after every file appears."""
    counts = json.loads((whole / "counts.json").read_text())
    hooks = {point for point in counts if point.startswith("hook ")}
    # Nothing that a run does is left out: files of a run, and all of Lightning's stages.
    assert {f"{when} {name}" for when in ("before", "after") for name in (
        "config.source.yaml", "config.yaml", "last.ckpt", "progress.json", "curve.jsonl", "floor.jsonl", "rows.jsonl",
        "samples.npz",
    )} == counts.keys() - hooks  # fmt: skip
    assert len(hooks) > 25
    for point, number in counts.items():
        for call in sorted({1, (number + 1) // 2, number}):
            place = tmp_path / f"{point.replace(' ', '-')}-{call}"
            assert kill_and_go_on(server, whole, place, point, call) == left(whole / "run"), (point, call)


@pytest.mark.slow
def test_two_kills_in_a_row(server, whole, tmp_path):
    words = ["fit", "-c", str(whole / "points.yaml"), f"run.dir={tmp_path / 'run'}", "--test"]
    for point, call in (("after last.ckpt", 3), ("hook on_train_batch_start", 2), ("before curve.jsonl", 1)):
        assert server.run(words, point=point, call=call) == -signal.SIGKILL
    assert server.run(words) == 0
    assert left(tmp_path / "run") == left(whole / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "call"),
    [
        ("before rows.jsonl", 2),
        *(
            slow(f"{when} {name}", call)
            for when in ("before", "after")
            for name in ("samples.npz", "rows.jsonl")
            for call in (1, 2)
        ),
    ],
)
def test_a_kill_while_earlier_results_are_moved(server, whole, tmp_path, point, call):
    """The first time each file appears is in the folder of earlier results, the second in its own place."""
    words = ["-c", str(whole / "points.yaml"), f"run.dir={tmp_path / 'run'}"]
    assert server.run(["fit", *words, "--test"]) == 0
    before = (tmp_path / "run" / "rows.jsonl").read_bytes()
    again = ["test", *words, "evaluator.num_samples=40"]
    assert server.run(again, point=point, call=call) == -signal.SIGKILL
    assert server.run(again) == 0
    (kept,) = (tmp_path / "run" / "before").iterdir()
    assert (kept / "rows.jsonl").read_bytes() == before
    assert (kept / "samples.npz").is_file()
    assert next(row.n for row in read_rows(tmp_path / "run" / "rows.jsonl") if row.metric == "w2") == 40
    assert (tmp_path / "run" / "samples.npz").is_file()
