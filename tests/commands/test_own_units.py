"""Own data in units of their own: trained in model space, measured and written in the units of the file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from flowbench.cli import main
from flowbench.core.rows import read_rows

from .conftest import POINTS

RAW = np.random.default_rng(0).normal(size=(60, 2)) * [2e6, 0.01] + [5e8, 3.0]
TEXT = POINTS.replace("steps: 20", "steps: 3")


def train(name: str, file: str, **options: object) -> None:
    data = ", ".join(f"{key}: {value}" for key, value in options.items())
    text = TEXT.replace("dataset: eight_gaussians", f"dataset: npz, path: {file}, {data}")
    Path(f"{name}.yaml").write_text(text)
    assert main(["fit", "-c", f"{name}.yaml", f"run.dir={name}", "--test"]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run on raw values that are standardized, one on values that were standardized by hand, and one on levels."""
    monkeypatch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp("units")
    monkeypatch.chdir(folder)
    order = np.random.default_rng(1).permutation(60)
    raw = {"train": RAW[order[:40]], "val": RAW[order[40:50]], "test": RAW[order[50:]]}
    mean, std = raw["train"].mean(axis=0), raw["train"].std(axis=0)
    np.savez("raw.npz", **raw)
    np.savez("plain.npz", **{name: (values - mean) / std for name, values in raw.items()})
    np.savez("levels.npz", x=np.random.default_rng(0).integers(0, 5, (60, 2)))
    train("raw", "raw.npz", standardize="true")
    train("plain", "plain.npz", standardize="false")
    train("levels", "levels.npz", levels=5)
    monkeypatch.undo()
    return folder


@pytest.fixture
def here(folder, monkeypatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def rows(name: str) -> dict[str, tuple[float, str]]:
    return {row.metric: (row.value, row.unit) for row in read_rows(f"{name}/rows.jsonl")}


def test_likelihoods_differ_by_the_volume_of_the_units_and_distances_do_not(here):
    scale = RAW[np.random.default_rng(1).permutation(60)[:40]].std(axis=0)
    raw, plain = rows("raw"), rows("plain")
    assert raw["nll"][0] == pytest.approx(plain["nll"][0] + np.log(scale).sum(), rel=1e-6)
    assert raw["w2"] == (pytest.approx(plain["w2"][0], rel=1e-6), "model units")
    assert plain["w2"][1] == "data units"


def test_samples_are_in_the_units_of_the_file(here):
    assert main(["predict", "-c", "raw/config.yaml", "run.dir=raw", "--num-samples", "50"]) == 0
    assert main(["predict", "-c", "plain/config.yaml", "run.dir=plain", "--num-samples", "50"]) == 0
    train_split = RAW[np.random.default_rng(1).permutation(60)[:40]]
    mean, std = train_split.mean(axis=0), train_split.std(axis=0)
    for file in ("samples.npz", "samples/samples.npz"):
        ours, theirs = np.load(f"raw/{file}")["x"], np.load(f"plain/{file}")["x"]
        np.testing.assert_allclose((ours - mean) / std, theirs, atol=1e-3)


def test_points_that_are_given_are_in_the_units_of_the_file(here):
    np.savez("given.npz", x=RAW[:7].astype(np.float32))
    words = ["--task", "reconstruct", "--images", "given.npz", "--num-samples", "7"]
    assert main(["predict", "-c", "raw/config.yaml", "run.dir=raw", *words]) == 0
    found = np.load("raw/reconstruct/reconstruct.npz")
    np.testing.assert_allclose(found["original"], RAW[:7], rtol=1e-6)
    # Two midpoint steps are no exact inverse, but half a standard deviation is far less than another unit would be.
    assert np.abs((found["x"] - RAW[:7]) / RAW.std(axis=0)).max() < 0.5


def test_vectors_on_a_grid_are_measured_in_bits_and_written_as_levels(here):
    assert main(["predict", "-c", "levels/config.yaml", "run.dir=levels", "--num-samples", "50"]) == 0
    samples = np.load("levels/samples/samples.npz")["x"]
    assert samples.dtype == np.uint8
    assert samples.max() <= 4
    value, unit = rows("levels")["nll"]
    assert unit == "bits/dim"
    assert value > math.log2(5) - 0.5, "no flow beats the uniform law by more than chance"
    np.savez("bad.npz", x=np.full((3, 2), 5, dtype=np.uint8))
    words = ["--task", "reconstruct", "--images", "bad.npz", "--num-samples", "3"]
    assert main(["predict", "-c", "levels/config.yaml", "run.dir=levels", *words]) == 2
