"""What a command did, in a few lines that fit the terminal; the last line is the folder alone."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from flowbench.cli import main
from flowbench.cli.summaries import facts_text, fit_facts, prediction_facts, preparation_facts, show, statistics_facts

ROOT = Path(__file__).parents[2]
FILE = ROOT / "experiments" / "toy" / "cfm.yaml"
TINY = [
    "budget.steps=6",
    "evaluator.num_samples=60",
    "evaluator.curve=[]",
    "data.batch_size=8",
    "evaluator.num_likelihood=8",
]
TINY += [f"evaluator.metrics.{name}=null" for name in ("mmd", "nll", "sliced_w2", "straightness")]


def facts(text: str) -> dict[str, str]:
    """Names and what they are, lines that go on joined."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, _, rest = line.partition("  ")
        if name:
            last = name
            found[name] = rest.strip()
        else:
            found[last] += f" {rest.strip()}"
    return found


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The words of every command that leaves something, by its name."""
    folder = tmp_path_factory.mktemp("summaries")
    said: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "80")
        images = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
        np.savez("samples.npz", x=images)
        for name, words in {
            "fit": ["fit", "-c", str(FILE), *TINY, "run.name=x"],
            "fit --test": ["fit", "-c", str(FILE), *TINY, "run.name=y", "--test"],
            "validate": ["validate", "-c", "runs/x/config.yaml"],
            "test": ["test", "-c", "runs/x/config.yaml"],
            "predict": ["predict", "-c", "runs/x/config.yaml", "--num-samples", "5", "--network-evaluations", "4"],
            "reconstruct": ["predict", "-c", "runs/x/config.yaml", "--task", "reconstruct", "--num-samples", "5"],
            "reference": ["reference", "-c", "runs/x/config.yaml", "run.dir=runs/reference"],
            "prepare": ["prepare", "-c", "runs/x/config.yaml"],
            "stats": ["stats", "--data", "digits", "--features", "identity", "--num-samples", "40", "-o", "s.npz"],
            "evaluate": [
                "evaluate", "--samples", "samples.npz", "--data", "fashion_mnist_mini", "--features", "identity",
                "--num-reference", "60",
            ],
        }.items():  # fmt: skip
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                assert main(words) == 0, name
            said[name] = out.getvalue().rstrip("\n")
    return folder, said


def test_fit_tells_what_was_spent_reached_and_left_and_what_comes_next(printed):
    folder, said = printed
    found = facts(said["fit"])
    assert found["trained"].startswith("6 steps, 48 samples, ")
    assert found["trained"].endswith(" s, 100% of the budget")
    progress = json.loads((folder / "runs/x/progress.json").read_text())
    assert found["loss"] == f"{progress['loss']:.4g} on the last batch"
    assert progress["samples_seen"] == 48
    assert 0 < progress["train_seconds"] < 60
    assert (folder / found["weights"]).is_file()
    command = found["next"].split()
    assert command[:2] == ["flowbench", "test"]
    assert (folder / command[3]).is_file()
    assert "rows" not in found, "nothing was measured"


def test_a_measurement_shows_its_numbers_and_where_they_lie(printed):
    folder, said = printed
    for name in ("fit --test", "test", "reference", "evaluate"):
        text = said[name]
        metric = "w2" if name != "evaluate" else "fd[identity]"
        assert metric in text, name
        found = facts("\n".join(text.splitlines()[-8:]))
        assert (folder / found["rows"]).is_file(), name


def test_predict_tells_what_was_drawn_at_what_cost(printed):
    folder, said = printed
    found = facts(said["predict"])
    assert found["sample"] == "5 samples of FlowMatching"
    assert found["cost"].startswith("4 network evaluations a sample, ")
    files, _, place = found["files"].partition(" in ")
    assert {(folder / place / name).is_file() for name in files.split(", ")} == {True}
    assert "samples.npz" in files
    found = facts(said["reconstruct"])
    assert "largest_flow_error" in found
    assert found["largest_flow_error"].endswith("model units")


def test_the_rest_tells_what_it_did(printed):
    _, said = printed
    assert facts(said["prepare"])["prepared"].startswith("nothing")
    stats = facts(said["stats"])
    assert stats["images"] == "40 of digits, split train"
    assert stats["statistics"] == "mean and covariance in 64 dimensions"
    assert len(said["validate"].splitlines()) >= 1


def test_the_last_line_is_the_place_alone(printed):
    folder, said = printed
    for name, text in said.items():
        if name not in ("validate", "prepare"):
            assert (folder / text.splitlines()[-1]).exists(), name


def test_lines_fit_the_terminal(printed):
    """Tables are the bench's; what the commands say around them fits 80 columns."""
    for name in ("fit", "validate", "predict", "reconstruct", "prepare", "stats"):
        for line in printed[1][name].splitlines():
            assert len(line) <= 80 or "/" in line.split()[-1], line


def test_only_the_first_of_several_processes_speaks(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LOCAL_RANK", "1")
    show([("a", "b")], tmp_path)
    assert capsys.readouterr().out == ""


def test_folders_that_hold_less_are_told_as_far_as_they_go(tmp_path):
    assert facts_text(fit_facts(tmp_path, False)) == ""
    (tmp_path / "progress.json").write_text("{broken")
    assert facts_text(fit_facts(tmp_path, False)) == ""
    (tmp_path / "manifest.json").write_text(
        json.dumps({"task": "classify", "family": "F", "num_samples": 3, "seconds": 75})
    )
    assert "3 results of F" in facts_text(prediction_facts(tmp_path))
    assert "1 min 15 s" in facts_text(prediction_facts(tmp_path))


def test_what_was_prepared_is_named():
    evaluator = {
        "metrics": {"fd": {"init_args": {"features": "digits-cnn"}}, "kid": {"init_args": {"features": "digits-cnn"}}}
    }
    assert preparation_facts({"autoencoder": Path("a/last.ckpt")}, evaluator) == [
        ("autoencoder", "a/last.ckpt"),
        ("features", "digits-cnn"),
    ]
    assert preparation_facts({}, {"metrics": {"w2": {"class_path": "x"}}})[0][0] == "prepared"
    several = {"metrics": {"fdr": {"init_args": {"features": ["inception", "digits-cnn"]}}, **evaluator["metrics"]}}
    assert preparation_facts({}, several) == [("features", "inception, digits-cnn")]
    assert statistics_facts({"dataset": "x", "count": 1200, "extractor": "e", "protocol": "p"}, 2048)[1] == (
        "images",
        "1,200 of x",
    )
