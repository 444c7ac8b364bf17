"""`python -OO` has neither asserts nor docstrings: every command works as ever."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flowbench.core.rows import read_rows

ROOT = Path(__file__).parents[2]
FILE = ROOT / "experiments" / "toy" / "cfm.yaml"
TINY = [
    "budget.steps=3",
    "evaluator.num_samples=40",
    "evaluator.curve=[]",
    "data.batch_size=8",
    "evaluator.num_likelihood=8",
]
TINY += [f"evaluator.metrics.{name}=null" for name in ("mmd", "nll", "sliced_w2")]
# One process for all, because torch takes its time to be imported.
CODE = """
import json, sys
from flowbench.cli import main
assert False, "asserts are off"
for words in json.loads(sys.argv[1]):
    print("=", *words[:1], main(words))
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> tuple[Path, str, str]:
    folder = tmp_path_factory.mktemp("optimised")
    file, digits = str(FILE), str(ROOT / "experiments/digits/wcfm.yaml")
    commands = [
        ["--help"], ["fit", "--help"], ["list"], ["data", "list"],
        ["fit", "-c", digits, "--dry-run"],
        ["bench", "-c", str(ROOT / "experiments/toy_2d.yaml"), "--dry-run"],
        ["count", "-c", file],
        ["fit", "-c", file, *TINY, "run.dir=run", "--test"],
        ["validate", "-c", "run/config.yaml"],
        ["test", "-c", "run/config.yaml"],
        ["predict", "-c", "run/config.yaml", "--num-samples", "4"],
        ["reference", "-c", "run/config.yaml", "run.dir=reference"],
        ["compare", "run", "reference"],
        ["prepare", "-c", "run/config.yaml"],
        ["fit", "-c", file, "data.batch_size=x"],
    ]  # fmt: skip
    command = [sys.executable, "-OO", "-c", CODE, json.dumps(commands)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return folder, done.stdout, done.stderr


@pytest.mark.slow  # torch is compiled once more for it
def test_every_command_does_its_work(printed):
    _, out, err = printed
    statuses = [line.split()[1:] for line in out.splitlines() if line.startswith("= ")]
    assert len(statuses) == 15, err
    assert {tuple(status) for status in statuses[:-1]} == {(name, "0") for name, _ in statuses[:-1]}, (out, err)
    assert statuses[-1] == ["fit", "2"]
    assert "data.batch_size: FlowDataModule expects int, got 'x' (str)" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_what_is_measured_is_there(printed):
    folder, _, _ = printed
    assert {"w2", "straightness", "parameters"} <= {row.metric for row in read_rows(folder / "run" / "rows.jsonl")}
    assert {row.contender for row in read_rows(folder / "reference" / "rows.jsonl")} >= {"floor", "noise"}


@pytest.mark.slow
def test_lists_and_help_have_their_texts(tmp_path):
    commands = [["--help"], ["fit", "--help"], ["list"], ["data", "list"], ["fit", "-c", str(FILE), "--print-config"]]
    command = [sys.executable, "-OO", "-c", CODE, json.dumps(commands)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert [line for line in done.stdout.splitlines() if line.startswith("= ")] == [
        "= --help 0", "= fit 0", "= list 0", "= data 0", "= fit 0",
    ]  # fmt: skip
    assert "Flow matching whose source points are paired" in text or "flowbench.families.OTCFM" in text
    assert "2-D: Eight equal Gaussians on a ring" in text
    assert "train one experiment" in text
