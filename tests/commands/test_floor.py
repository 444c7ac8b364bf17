"""The floor stands beside every run: what held-out data score where there is no bench that has it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowbench.bench import compare
from flowbench.cli import main
from flowbench.core.rows import FLOOR_FILE, read_rows
from flowbench.data import FlowDataModule
from flowbench.evaluation import Identity

from ..evaluation.evaluator_runs import digits, evaluator, flow, measured, point_metrics, points

FEATURES = ["--data", "digits", "--features", "identity"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path


def first_column(text: str) -> list[str]:
    return [line.strip("│").split("│")[0].strip() for line in text.splitlines() if line.startswith("│")]


@pytest.mark.parametrize(("data", "metrics", "reference"), [(digits, None, "train"), (points, point_metrics(), "val")])
def test_a_single_test_leaves_the_floors_rows_as_a_reference_has_them(tmp_path, data, metrics, reference):
    measure = evaluator(metrics, reference=reference)
    measure.identity = Identity(contender="mine", seed=3)
    measured(tmp_path, "tarflow", data(), measure)
    found = read_rows(tmp_path / FLOOR_FILE)
    assert {(row.contender, row.family, row.seed) for row in found} == {("floor", "reference", 3)}
    expected = [row for row in _until_noise(measure.reference_rows(data()))]
    assert [(r.metric, r.value, r.n, r.protocol) for r in found] == [
        (r.metric, r.value, r.n, r.protocol) for r in expected
    ]
    assert {row.contender for row in read_rows(tmp_path / "rows.jsonl")} == {"mine"}
    column = first_column(compare([tmp_path]))
    assert column[:2] == [f"{tmp_path.name}: mine"[: len(column[0])], "floor"]


def _until_noise(rows):
    for row in rows:
        if row.contender != "floor":
            return
        yield row


def test_a_cell_of_a_bench_leaves_that_to_the_bench(tmp_path):
    measured(tmp_path, "tarflow", digits(), evaluator())
    assert not (tmp_path / FLOOR_FILE).exists()


def test_training_images_that_are_given_as_samples_are_called_copies_beside_the_floor(place, capsys):
    images = FlowDataModule("digits").uint8_images("train", torch.arange(200))
    np.savez("thief.npz", x=images.numpy())
    np.savez("honest.npz", x=FlowDataModule("digits").uint8_images("val", torch.arange(200)).numpy())
    for name in ("thief", "honest"):
        assert main(["evaluate", "--samples", f"{name}.npz", *FEATURES]) == 0
    said = capsys.readouterr().out
    assert "thief looks like copies of the training data: authenticity[identity] 0" in " ".join(said.split())
    assert "honest looks" not in said
    assert "honest is" not in said
    for row in read_rows(place / "runs" / "thief" / FLOOR_FILE):
        assert row.n == 200, "as many as there are samples"
    text = compare(["runs/thief", "runs/honest"])
    assert first_column(text.split("Quality")[1])[:3] == ["thief", "honest", "floor"]
    assert "thief looks like copies" in " ".join(text.split())
    assert "honest" not in text.split("thief looks like copies")[1]


def test_the_flow_that_is_measured_is_not_drawn_for_the_floor(tmp_path, monkeypatch):
    measure = evaluator()
    measure.identity = Identity(contender="mine")
    data = digits()
    family = flow("tarflow", data)
    monkeypatch.setattr(type(family), "sample", lambda *_: pytest.fail("drawn"))
    assert {row.contender for row in measure.floor_rows(data)} == {"floor"}
