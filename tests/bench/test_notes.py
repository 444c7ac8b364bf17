"""A reader of any table is told in words of copies, of samples off the data, and of too few samples."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from flowbench import metrics as pure
from flowbench.bench import build_report, compare
from flowbench.bench.notes import reading_notes
from flowbench.bench.plan import make_plan
from flowbench.bench.report import print_summary
from flowbench.bench.results import Results, collect
from flowbench.core.rows import read_rows, write_rows

from .synthetic import write_synthetic_bench

FEATURES = "[digits-cnn]"


def told(make_row, values, references=(), n=360, protocol="p"):
    rows = [make_row("mine", metric, value, n=n, protocol=protocol) for metric, value in values.items()]
    for name, metric, value in references:
        rows.append(make_row(name, metric, value, n=n, protocol=protocol, family="reference"))
    return reading_notes(Results(rows), "")


def points(num, seed, dim):
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def memorization_rows(make_row, samples, train, fresh):
    found = pure.memorization(samples, train, fresh)
    values = {
        f"authenticity{FEATURES}": found.authenticity,
        f"data_copying{FEATURES}": found.copying_z,
        f"neighbour_distance_ratio{FEATURES}": found.median_ratio,
    }
    return told(make_row, values, n=len(samples))


@pytest.mark.parametrize("dim", [1, 2, 16])
@pytest.mark.parametrize("seed", range(4))
def test_fresh_samples_are_called_nothing_in_any_dimension(make_row, dim, seed):
    train, fresh, samples = points(1000, 3 * seed, dim), points(300, 3 * seed + 1, dim), points(300, 3 * seed + 2, dim)
    assert memorization_rows(make_row, samples, train, fresh) == []


@pytest.mark.parametrize("dim", [1, 2, 16])
@pytest.mark.parametrize("jitter", [0.0, 1e-6, 1e-3])
def test_copies_are_called_copies_in_any_dimension(make_row, dim, jitter):
    train, fresh = points(1000, 0, dim), points(300, 1, dim)
    (note,) = memorization_rows(make_row, train[:300] + jitter * points(300, 2, dim), train, fresh)[:1]
    # A jitter of a thousandth is as far as the next point where a thousand points lie on a line.
    words = ("looks like copies of the training data", "is closer than held-out data to the training data")
    assert note.startswith(tuple(f"mine {word}" for word in (words if (dim, jitter) == (1, 1e-3) else words[:1])))


@pytest.mark.parametrize("dim", [2, 16])
def test_a_third_of_copies_is_noticed(make_row, dim):
    train, fresh = points(1000, 0, dim), points(300, 1, dim)
    (note,) = memorization_rows(make_row, torch.cat([train[:100], points(200, 2, dim)]), train, fresh)
    assert note.startswith("mine is closer than held-out data to the training data: authenticity[digits-cnn]")


def test_samples_far_from_all_data_are_off_the_data(make_row):
    train, fresh = points(1000, 0, 8), points(300, 1, 8)
    (note,) = memorization_rows(make_row, points(300, 2, 8) * 9, train, fresh)
    assert note.startswith("mine is off the data: ")
    assert "neighbour_distance_ratio[digits-cnn]" in note


@pytest.mark.parametrize(
    ("values", "references", "words"),
    [
        ({"precision[x]": 0.01, "density[x]": 0.3}, [], "mine is off the data: precision[x] 0.01."),
        ({"density[x]": 0.0}, [], "mine is off the data: density[x] 0."),
        ({"fd[x]": 60.0}, [("noise", "fd[x]", 53.5)], "fd[x] 60 is worse than that of noise, 53.5"),
        ({"w2": 3.0}, [("noise", "w2", 2.0)], "w2 3 is worse than that of noise, 2"),
        ({"fid": 20.0}, [("floor", "fid", 30.0)], "mine is better than held-out data (fid 20, floor 30)"),
        ({}, [("floor", "authenticity[x]", 0.0)], "held-out data look like copies of the training data"),
    ],
)
def test_each_sign_is_told(make_row, values, references, words):
    notes = [note for note in told(make_row, values, references, n=20_000) if "N=" not in note]
    assert len(notes) == 1
    assert words in notes[0]


@pytest.mark.parametrize(
    ("values", "references"),
    [
        ({"precision[x]": 0.2, "density[x]": 0.1}, []),
        ({"fd[x]": 50.0}, [("noise", "fd[x]", 53.5), ("floor", "fd[x]", 55.0)]),
        ({"recall[x]": 0.0, "precision[x]": 0.9}, [("noise", "recall[x]", 0.5)]),
        ({"authenticity[x]": 0.4, "data_copying[x]": 2.0, "neighbour_distance_ratio[x]": 1.1}, []),
        ({"curvature": 9.0}, [("noise", "curvature", 1.0)]),  # no quality
    ],
)
def test_what_is_no_sign_is_not_told(make_row, values, references):
    assert told(make_row, values, references) == []


def test_a_floor_of_another_protocol_is_no_measure(make_row):
    rows = [make_row("mine", "fd[x]", 1.0, protocol="a"), make_row("floor", "fd[x]", 9.0, family="reference")]
    assert reading_notes(Results(rows), "") == []


def test_numbers_of_samples_are_told(make_row):
    rows = [make_row("mine", "fd[x]", 1.0, n=1000), make_row("floor", "fd[x]", 1.0, n=360, family="reference")]
    assert reading_notes(Results(rows), "") == [
        "fd[x]: the floor stands at N=360, others at N=1000, and the distance depends on N."
    ]
    (few,) = told(make_row, {"fd[x]": 1.0, "precision[x]": 0.9, "straightness": 0.1}, n=12)
    assert few.startswith("fd[x], precision[x]: N=12 samples are few")
    assert told(make_row, {"fd[x]": 1.0, "precision[x]": 0.9}, n=100) == []
    (fid,) = told(make_row, {"fid": 40.0}, n=500)
    assert fid.startswith("fid: N=500 samples of 2048 features")


def test_report_summary_and_comparison_say_the_same(workshop, monkeypatch):
    monkeypatch.setattr("flowbench.bench.report._pictures", lambda *_: [])
    workshop.experiment("x")
    contenders = {"wcfm": "x.yaml", "cfm": "x.yaml"}
    sweep = {"network_evaluations": [1]}
    directory = write_synthetic_bench(make_plan(workshop.bench(contenders=contenders, seeds=[0], sweep=sweep)))
    rows = directory / "cells/wcfm/seed-0/rows.jsonl"
    (quality, *_) = read_rows(rows)
    copied = [replace(quality, metric="authenticity[digits-cnn]", value=0.0)]
    write_rows(rows, [*read_rows(rows), *copied])
    collect(directory)
    console = Console(file=io.StringIO(), width=200)
    print_summary(directory, console)
    texts = [build_report(directory).read_text(), console.file.getvalue(), compare([directory])]
    for text in texts:
        assert "wcfm looks like copies of the training data: authenticity[digits-cnn] 0" in " ".join(text.split())
