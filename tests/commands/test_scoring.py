"""The commands data, stats and evaluate through the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from flowbench.cli import main
from flowbench.core.rows import read_rows
from flowbench.data import FlowDataModule
from flowbench.metrics import FeatureStatistics, load_statistics


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def samples(place):
    """Validation digits that somebody's model might have made."""
    images = FlowDataModule("digits").uint8_images("val", torch.arange(120))
    np.savez(place / "stranger.npz", images.permute(0, 2, 3, 1).numpy())
    return images


def refused(capsys, *words: str) -> str:
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_list_says_what_is_here(capsys, monkeypatch, place):
    monkeypatch.setenv("FLOWBENCH_DATA", str(place / "empty"))
    assert main(["data", "list"]) == 0
    shown = capsys.readouterr().out
    assert "".join(shown[shown.index("downloads go to") :].split()) == (
        f"downloadsgoto{place / 'empty'}(FLOWBENCH_DATAnamesanotherfolder)"
    )
    lines = {line.split()[0]: line for line in shown.splitlines() if line}
    assert {"name", "digits", "mnist", "fashion_mnist", "cifar10", "moons"} <= set(lines)
    assert "3x32x32" in lines["cifar10"]
    assert "45,000 + 5,000 + 10,000" in lines["cifar10"]
    assert "no" in lines["cifar10"].split()
    assert "yes" in lines["digits"].split()


def test_getting_what_is_here_and_what_nobody_has(capsys, monkeypatch, place):
    assert main(["data", "get", "digits", "moons"]) == 0
    assert capsys.readouterr().out == "digits: needs no download\nmoons: needs no download\n"
    assert "did you mean 'cifar10'?" in refused(capsys, "data", "get", "cifar")
    assert "data get needs the name of a dataset" in refused(capsys, "data", "get")
    assert "data list takes no names, got cifar10" in refused(capsys, "data", "list", "cifar10")
    monkeypatch.setenv("FLOWBENCH_OFFLINE", "1")
    monkeypatch.setenv("FLOWBENCH_DATA", str(place / "empty"))
    assert "FLOWBENCH_OFFLINE is set" in refused(capsys, "data", "get", "mnist")


def test_a_strangers_samples_get_the_rows_of_everybody(capsys, samples):
    words = ["--features", "identity", "--features", "digits-cnn", "--num-reference", "500"]
    assert main(["evaluate", "--samples", "stranger.npz", "--data", "digits", *words]) == 0
    out = capsys.readouterr().out
    assert "fd[digits-cnn]" in out
    rows = {row.metric: row for row in read_rows("runs/stranger/rows.jsonl")}
    base = {"fd", "kid", "precision", "recall", "density", "coverage", "authenticity", "data_copying"}
    assert {f"{name}[{features}]" for name in base for features in ("identity", "digits-cnn")} <= set(rows)
    row = rows["fd[identity]"]
    assert (row.contender, row.family, row.dataset, row.weights) == ("stranger", "external", "digits", "none")
    assert (row.n, row.protocol) == (120, "identity/train-500/120")
    train = FlowDataModule("digits").uint8_images("train", torch.arange(500)).double().flatten(1)
    sides = [FeatureStatistics.from_features(x) for x in (samples.double().flatten(1), train)]
    from flowbench.metrics import frechet_distance

    assert row.value == pytest.approx(frechet_distance(*sides), rel=1e-9)


@pytest.mark.parametrize("reference", ["val", "test"])
def test_any_split_may_be_the_reference(samples, reference):
    words = ["--data", "digits", "--features", "identity", "--reference", reference, "--output", reference]
    assert main(["evaluate", "--samples", "stranger.npz", *words]) == 0
    rows = {row.metric: row for row in read_rows(f"{reference}/rows.jsonl")}
    assert rows["fd[identity]"].protocol == f"identity/{reference}-360/120"
    # Copies of images that nobody trained on mean nothing.
    assert "authenticity[identity]" not in rows


@pytest.mark.parametrize("name", ["a/b", "..", " "])
def test_names_that_cannot_name_a_folder(capsys, samples, name):
    words = ["--data", "digits", "--features", "identity", "--samples", "stranger.npz", "--name", name]
    assert "cannot name a folder" in refused(capsys, "evaluate", *words)


def test_an_experiment_says_how_to_measure(capsys, samples, place):
    (place / "e.yaml").write_text(
        "data: {dataset: digits}\n"
        "model: {class_path: flowbench.families.TARFlow}\n"
        "evaluator:\n  num_samples: 50\n  metrics:\n"
        "    fd: {class_path: flowbench.evaluation.FrechetDistance, init_args: {features: identity}}\n"
        "    nll: {class_path: flowbench.tasks.generation.NegativeLogLikelihood}\n"
    )
    words = ["evaluate", "--samples", "stranger.npz", "-c", "e.yaml", "evaluator.reference=val", "--name", "x"]
    assert main([*words, "--num-samples", "50", "--output", "there"]) == 0
    (row,) = read_rows("there/rows.jsonl")
    assert (row.contender, row.metric, row.protocol) == ("x", "fd[identity]", "identity/val-360/50")
    capsys.readouterr()
    for option in (["--features", "identity"], ["--num-reference", "5"], ["--train-on-val"]):
        assert f"{option[0]} goes with --data" in refused(capsys, *words, *option)


def test_evaluate_says_what_is_missing(capsys, samples):
    assert "needs one of --data, -c and --bench, got none" in refused(capsys, "evaluate", "--samples", "stranger.npz")
    both = ["evaluate", "--samples", "stranger.npz", "--data", "digits", "-c", "e.yaml"]
    assert "got --data and -c" in refused(capsys, *both)
    missing = ["evaluate", "--samples", "none.npz", "--data", "digits", "--features", "identity"]
    assert "'none.npz' does not exist" in refused(capsys, *missing)
    other = ["evaluate", "--samples", "stranger.npz", "--data", "fashion_mnist_mini", "--features", "identity"]
    assert "images of shape (8, 8, 1), but fashion_mnist_mini has (1, 28, 28)" in refused(capsys, *other)


def test_statistics_of_a_split_and_of_images(capsys, samples):
    words = ["stats", "--data", "digits", "--features", "digits-cnn"]
    assert main([*words, "--split", "val", "--num-samples", "120", "-o", "val.npz"]) == 0
    assert main([*words, "--samples", "stranger.npz", "-o", "stranger.stats.npz"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line.split()) == 1] == ["val.npz", "stranger.stats.npz"]
    assert lines[1].split() == "images 120 of digits, split val".split()
    split, about = load_statistics("val.npz")
    images, _ = load_statistics("stranger.stats.npz")
    found = about["dataset"], about["split"], about["count"], about["extractor"]
    assert found == ("digits", "val", 120, "digits-cnn")
    # The same images by both ways.
    torch.testing.assert_close(split.mean, images.mean)
    torch.testing.assert_close(split.outer, images.outer)


def test_a_strangers_samples_join_the_tables_of_a_bench(capsys, samples, place):
    """As the bench measures: its data, its evaluator, its number of samples; a line in italics, no contender."""
    bench = place / "runs" / "b"
    (bench / "reference").mkdir(parents=True)
    (bench / "reference" / "cell.yaml").write_text(
        "data: {dataset: digits}\nmodel: {class_path: flowbench.families.TARFlow}\n"
        "evaluator:\n  num_samples: 100\n  reference: train\n  metrics:\n"
        "    fd: {class_path: flowbench.evaluation.FrechetDistance, init_args: {features: identity}}\n"
    )
    plan = {
        "name": "b", "question": "Which?", "contenders": ["cfm"], "seeds": [0], "budget": {"steps": 1}, "sweep": {},
        "claims": [], "tasks": {"": ["cfm"]}, "reasons": {}, "policy": "one at a time", "jobs": 1, "threads": 1,
        "cells": [],
    }  # fmt: skip
    (bench / "plan.json").write_text(json.dumps(plan))
    words = ["evaluate", "--samples", "stranger.npz", "--bench", "runs/b"]
    assert main(words) == 0
    assert capsys.readouterr().out.strip().endswith("report.md")
    (row,) = read_rows(bench / "results.jsonl")
    assert (row.bench, row.contender, row.family, row.n) == ("b", "stranger", "external", 100)
    assert "| _stranger_ |" in (bench / "report.md").read_text()
    assert "is a contender of the bench already" in refused(capsys, *words, "--name", "cfm")
    assert "--output does not go with --bench" in refused(capsys, *words, "--output", "x")
    assert "holds no bench" in refused(capsys, "evaluate", "--samples", "stranger.npz", "--bench", "elsewhere")
    np.savez(place / "few.npz", samples[:40].numpy())
    assert "holds 40 images, but the contenders drew 100" in refused(capsys, *words[:2], "few.npz", *words[3:])
    (bench / "reference" / "cell.yaml").unlink()
    assert "has not run yet" in refused(capsys, *words)
