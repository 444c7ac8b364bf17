"""`features: auto`: what it stands for, on which data, and that it is said once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from flowbench.core.remarks import say_once
from flowbench.core.rows import read_rows
from flowbench.data import DataSpec, FlowDataModule, list_datasets
from flowbench.evaluation import (
    ClassAccuracy,
    FrechetDistance,
    Memorization,
    auto_features,
    extractors,
    get_extractor,
)
from flowbench.evaluation.auto_features import planned_features, resolve_features
from flowbench.evaluation.samples import RealSet
from flowbench.metrics import IdentityFeatures, frechet_distance_of_features

from .evaluator_runs import evaluator, flow, quick, trainer


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    """As in a new process that may not download."""
    monkeypatch.setenv("FLOWBENCH_OFFLINE", "1")
    for held in (auto_features._weights_fault, say_once):
        held.cache_clear()
    yield
    for held in (auto_features._weights_fault, say_once):
        held.cache_clear()


def spec(*shape: int, classes: int | None = None) -> DataSpec:
    return DataSpec("own", "1", shape, classes, None if len(shape) == 1 else 256)


CASES = [
    (spec(1, 8, 8, classes=10), "own-cnn", "a classifier of its 10 classes"),
    (spec(4, 64, 64, classes=2), "own-cnn", "a classifier of its 2 classes"),
    (spec(2), "identity", "points are compared by their coordinates"),
    (spec(7, classes=3), "identity", "points are compared by their coordinates"),
    (spec(1, 28, 28), "identity", "28x28 pixels are too few for efficientnet-lite0"),
    (spec(3, 64, 31), "identity", "64x31 pixels are too few"),
    (spec(4, 64, 64), "identity", "no other network takes 4 channels"),
    (spec(3, 16, 16, classes=1), "identity", "no classes to train a classifier on"),
    (spec(1, 3, 3, classes=5), "identity", "3x3 pixels are too few"),
]


@pytest.mark.parametrize(("data", "expected", "reason"), CASES)
def test_auto_is_what_suits_the_data_and_one_line_says_why(data, expected, reason, capsys):
    assert [resolve_features("auto", "own", data) for _ in range(3)] == [expected] * 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"features: auto takes {expected} for own: ")
    assert reason in line
    shape = {"shape": list(data.shape), "num_classes": data.num_classes}
    assert planned_features("auto", {"dataset": "npz", **shape}) == expected.replace("own", "npz")
    assert not capsys.readouterr().err, "planning says nothing"


def test_large_images_without_labels_get_a_network_of_photographs_where_its_weights_are(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path))
    for shape in ((3, 32, 32), (1, 64, 48)):
        assert resolve_features("auto", "own", spec(*shape)) == "identity"
        assert planned_features("auto", {"dataset": "npz", "shape": shape}) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "efficientnet-lite0 cannot be had (no weights for efficientnet-lite0" in line
    assert "FLOWBENCH_OFFLINE is set" in line
    auto_features._weights_fault.cache_clear()
    monkeypatch.setattr(auto_features, "efficientnet_weights", lambda: None)
    assert resolve_features("auto", "own", spec(3, 32, 32)) == "efficientnet-lite0"
    assert "network of photographs" in capsys.readouterr().err


def test_a_registry_that_cannot_be_reached_is_asked_once_a_process(monkeypatch):
    asked = []

    def refuse() -> None:
        asked.append(1)
        raise OSError("no route to\nthe registry")

    monkeypatch.setattr(auto_features, "efficientnet_weights", refuse)
    assert {resolve_features("auto", "own", spec(3, 40 + n, 40)) for n in range(4)} == {"identity"}
    assert len(asked) == 1


def test_other_processes_are_silent(capsys, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    assert resolve_features("auto", "own", spec(2)) == "identity"
    assert not capsys.readouterr().err


def test_every_other_name_stands_for_itself(capsys):
    for name in ("identity", "inception", "digits-cnn", "no-such"):
        assert resolve_features(name, "digits", spec(1, 8, 8)) == planned_features(name, {}) == name
    assert not capsys.readouterr().err


@pytest.mark.parametrize("entry", list_datasets(), ids=lambda entry: entry.name)
def test_shipped_data_sets_keep_the_names_of_their_metrics(entry):
    """Claims, curves and tables name `fd[digits-cnn]`; a plan knows them before anything is read."""
    labelled = entry.spec.modality == "image" and entry.spec.num_classes is not None
    expected = f"{entry.name}-cnn" if labelled else "identity"
    assert resolve_features("auto", entry.name, entry.spec) == expected
    assert planned_features("auto", {"dataset": entry.name}) == expected


def test_own_data_are_not_read_for_a_plan(tmp_path):
    assert planned_features("auto", {"dataset": "npz", "path": str(tmp_path / "absent.npz")}) is None
    assert planned_features("auto", {}) == "digits-cnn"


def test_the_extractor_is_had_by_that_name_too(monkeypatch, tmp_path):
    assert isinstance(get_extractor("auto", FlowDataModule("moons")), IdentityFeatures)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "own.npz", x=rng.integers(0, 256, (40, 3, 32, 32), dtype=np.uint8))
    monkeypatch.setattr(auto_features, "efficientnet_weights", lambda: None)
    monkeypatch.setitem(extractors.PRETRAINED, "efficientnet-lite0", lambda device: f"on {device}")
    assert get_extractor("auto", FlowDataModule("npz", str(tmp_path / "own.npz"))) == "on cpu"


def metrics() -> dict:
    return {
        "fd": FrechetDistance("auto"),
        "copies": Memorization("auto", num_pairs=2),
        "labels": ClassAccuracy("auto"),
        "raw": FrechetDistance("identity"),
    }


@pytest.fixture
def labelled(tmp_path, monkeypatch) -> FlowDataModule:
    """A labelled file, whose classifier is trained for two steps."""
    inner = extractors.train_classifier
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(extractors, "train_classifier", lambda *a, **k: inner(*a, **{**k, "num_steps": 2}))
    x = np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", x=x, label=np.arange(60) % 3)
    return FlowDataModule("npz", str(tmp_path / "own.npz"), batch_size=8)


def test_rows_and_curves_carry_the_name_that_auto_stands_for(tmp_path, labelled):
    made = evaluator(metrics(), curve=["fd"])
    run = trainer(tmp_path, made, max_steps=2)
    family = quick(flow("cfm", labelled))
    run.fit(family, labelled)
    run.test(family, labelled, verbose=False)
    names = {row.metric for row in read_rows(tmp_path / "rows.jsonl")}
    assert {"fd[npz-cnn]", "authenticity[npz-cnn]", "fd[identity]"} <= names
    assert not any("[auto]" in name for name in names)
    assert "fd[npz-cnn]" in (tmp_path / "curve.jsonl").read_text()


@pytest.mark.slow
def test_one_evaluator_serves_two_data_sets(labelled):
    made = evaluator({"fd": FrechetDistance("auto")})
    for data, expected in ((FlowDataModule("moons"), "fd[identity]"), (labelled, "fd[npz-cnn]")):
        assert {row.metric for row in made.reference_rows(data)} == {expected}


def folder(path: Path, count: int, mode: str, size: int) -> Path:
    """Photographs of noise."""
    path.mkdir()
    rng, bands = np.random.default_rng(0), len(Image.new(mode, (1, 1)).getbands())
    for number in range(count):
        pixels = rng.integers(0, 256, (size, size, bands), dtype=np.uint8)
        Image.fromarray(pixels[:, :, 0] if bands == 1 else pixels, mode).save(path / f"{number}.png")
    return path


@pytest.mark.parametrize(("mode", "size", "count"), [("L", 12, 60), ("RGBA", 8, 60), ("RGB", 6, 12)])
def test_a_folder_without_labels_is_measured(tmp_path, capsys, mode, size, count):
    """Grey and small, with transparency, and a dozen of them."""
    data = FlowDataModule("image_folder", str(folder(tmp_path / "photos", count, mode, size)), batch_size=8)
    made = evaluator(metrics())
    trainer(tmp_path / "run", made).test(flow("tarflow", data), data, verbose=False)
    rows = {row.metric: row.value for row in made.rows}
    assert np.isfinite([rows["fd[identity]"], rows["authenticity[identity]"]]).all()
    assert not any(name.startswith("class_accuracy") for name in rows)
    few = f"fd[identity]: N={min(20, len(data.split('train')))} samples of {data.spec.num_dims} features"
    assert capsys.readouterr().err.count(few) == 1
    floor = {row.contender: row.value for row in made.reference_rows(data) if row.metric == "fd[identity]"}
    assert set(floor) == {"floor", "noise", "gaussian", "gmm"}
    if len(data.split("test")) == 1:
        assert floor.pop("floor") is None, "a single image has no distance"
    assert np.isfinite(list(floor.values())).all()


def test_the_distance_of_few_wide_features_is_the_same_by_either_route(tmp_path):
    """Sums take a D x D matrix, which images of 100 pixels a side have no memory for."""
    data = FlowDataModule("image_folder", str(folder(tmp_path / "photos", 60, "RGB", 10)))
    real, other = RealSet(data, "train"), torch.randn(30, 300, dtype=torch.float64) * 50 + 128
    extractor = IdentityFeatures(300)
    moments = real.moments(extractor, len(real))
    assert isinstance(moments, torch.Tensor)
    by_sums = frechet_distance_of_features(other, real.statistics(extractor, len(real)))
    assert frechet_distance_of_features(other, moments) == pytest.approx(by_sums, rel=1e-9)
    assert not isinstance(RealSet(FlowDataModule("digits"), "train").moments(IdentityFeatures(64), 200), torch.Tensor)
