"""predict, reference, prepare."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from flowbench.bench.status import lock_is_held
from flowbench.commands import runs
from flowbench.config import Experiment
from flowbench.core.endings import ProcessEnded
from flowbench.core.rows import read_rows
from flowbench.evaluation import Evaluator

from .conftest import DIGITS, POINTS, WEIGHTED, latent_files


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A conditional continuous flow, a conditional block flow and a flow of points, hardly trained."""
    folder = tmp_path_factory.mktemp("trained")
    found = {}
    for name, text in (("weighted", WEIGHTED), ("blocks", DIGITS), ("points", POINTS)):
        file = folder / f"{name}.yaml"
        file.write_text(text)
        # The output layers start at zero: the field must have moved for labels to matter.
        moved = (
            ["model.init_args.training.ema.decay=0.5", "budget.steps=20"] if name == "weighted" else ["budget.steps=3"]
        )
        found[name] = Experiment.from_files([file], [f"run.dir={folder / name}", "evaluator=null", *moved])
        runs.fit(found[name])
    return found


def test_predict_writes_samples_a_grid_and_a_manifest(trained, tmp_path):
    run = trained["weighted"]
    folder = runs.predict(run, num_samples=13, output=tmp_path / "out")
    assert folder == tmp_path / "out"
    saved = np.load(folder / "samples.npz")
    assert saved["x"].shape == (13, 1, 8, 8)
    assert saved["x"].dtype == np.uint8
    assert saved["label"].tolist() == [i % 10 for i in range(13)]
    assert set(np.unique(saved["x"])) <= {k * 255 // 16 for k in range(17)}
    grid = np.asarray(Image.open(folder / "grid.png"))
    # Two rows of eight pictures of 64 pixels with a frame of one pixel around each.
    assert grid.shape == (2 * 66, 8 * 66)
    assert (grid[1:65:8, 1:65:8] == saved["x"][0, 0]).all()
    assert (grid[67:131:8, 4 * 66 + 1 : 4 * 66 + 65 : 8] == saved["x"][12, 0]).all()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["checkpoint"] == str(run.run_dir / "checkpoints" / "last.ckpt")
    assert manifest["config_hash"] == run.fingerprint
    assert (manifest["num_samples"], manifest["seed"], manifest["network_evaluations"]) == (13, 3, 4.0)


def test_predict_repeats_itself_and_extends(trained, tmp_path):
    """Noise is keyed by the index: more samples begin with the fewer."""
    few, again, more = (
        np.load(runs.predict(trained["points"], num_samples=n, output=tmp_path / str(i)) / "samples.npz")["x"]
        for i, n in enumerate((5, 5, 300))
    )
    assert few.dtype == np.float32
    assert (few == again).all()
    np.testing.assert_allclose(few, more[:5], rtol=1e-5, atol=1e-6)
    assert more.shape == (300, 2)


def test_predict_points_have_no_picture(trained, tmp_path):
    folder = runs.predict(trained["points"], num_samples=2, output=tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "samples.npz"]


@pytest.mark.parametrize("name", ["weighted", "blocks"])
def test_guidance_is_honoured_and_recorded(trained, tmp_path, name):
    plain, guided = (
        runs.predict(trained[name], num_samples=4, output=tmp_path / str(s), guidance=s) for s in (1.0, 3.0)
    )
    one, two = (json.loads((folder / "manifest.json").read_text()) for folder in (plain, guided))
    assert (one["guidance"], two["guidance"]) == (1.0, 3.0)
    assert two["network_evaluations"] == 2 * one["network_evaluations"]
    assert (np.load(plain / "samples.npz")["x"] != np.load(guided / "samples.npz")["x"]).any()


def test_the_number_of_evaluations_is_honoured(trained, tmp_path):
    folder = runs.predict(trained["weighted"], num_samples=2, output=tmp_path, network_evaluations=6)
    assert json.loads((folder / "manifest.json").read_text())["network_evaluations"] == 6


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("blocks", {"network_evaluations": 4}, "TARFlow has a fixed cost per sample"),
        ("blocks", {"guidance": 0.5}, "0.5"),
        ("weighted", {"guidance": -1.0}, "--guidance must be a number in .*, got -1.0"),
        ("weighted", {"guidance": float("nan")}, "--guidance must be a number in .*, got nan"),
        ("weighted", {"guidance": 2.0, "network_evaluations": 3}, "cannot spend exactly 3 network evaluations"),
        ("weighted", {"network_evaluations": 3}, "3"),
        ("weighted", {"num_samples": 0}, "--num-samples must be a whole number in .*, got 0"),
        ("points", {"guidance": 2.0}, "guidance=2.0 needs labels"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(trained, tmp_path, name, options, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        runs.predict(trained[name], output=tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_predict_uses_the_averaged_weights(trained, tmp_path):
    """Against the samples drawn by hand from the checkpoint's averaged weights."""
    run = trained["points"]
    drawn = np.load(runs.predict(run, num_samples=6, output=tmp_path) / "samples.npz")["x"]
    model = run.build().model
    state = torch.load(run.run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    model.load_state_dict(state["ema"]["shadow"])
    expected = model.sample(model.draw_noise(torch.arange(6), run.seed)).x
    np.testing.assert_allclose(drawn, expected.numpy(), rtol=1e-6)
    live = state["state_dict"]
    assert any(not torch.equal(live[name], value) for name, value in state["ema"]["shadow"].items())


def test_reference_writes_the_rows_that_nobody_owns(experiment):
    run = experiment(DIGITS, "run.bench=b", "run.problem=t")
    runs.reference(run)
    rows = read_rows(run.run_dir / "rows.jsonl")
    assert {(r.contender, r.metric) for r in rows} == {
        ("floor", "fd[identity]"),
        ("noise", "fd[identity]"),
        ("gaussian", "fd[identity]"),
        ("gmm", "fd[identity]"),
        ("gaussian", "nll"),
        ("gmm", "nll"),
    }
    assert {(r.bench, r.problem, r.family, r.weights, r.dataset) for r in rows} == {
        ("b", "t", "reference", "none", "digits")
    }
    value = {(r.contender, r.metric): r.value for r in rows}
    assert max(v for (c, m), v in value.items() if m != "nll" and c != "noise") < 0.5 * value["noise", "fd[identity]"]
    # Measured apart from this code: 2.98 bits/dim for the Gaussian; a mixture is well below.
    assert value["gaussian", "nll"] == pytest.approx(2.98, abs=0.05)
    assert value["gmm", "nll"] < value["gaussian", "nll"] - 0.1
    assert not (run.run_dir / "checkpoints").exists()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def latent(tmp_path, *overrides: str, autoencoder_steps: int = 2) -> Experiment:
    return Experiment.from_files([latent_files(tmp_path, autoencoder_steps=autoencoder_steps)], overrides)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ("auto", ["required", "features"]),
        ("identity", ["required", "features"]),
        ("inception", ["features", "required"]),
    ],
)
def test_what_is_fetched_comes_before_what_is_required_and_the_classifier_after_it(
    tmp_path, monkeypatch, features, expected
):
    """Neither a download that fails after a long training, nor a long training that waits for another's classifier."""
    metric = {"class_path": "flowbench.evaluation.FrechetDistance", "init_args": {"features": features}}
    experiment = latent(tmp_path, f"evaluator={{metrics: {{fd: {json.dumps(metric)}}}}}")
    made: list[str] = []
    monkeypatch.setattr(runs, "required_checkpoints", lambda _: made.append("required"))
    monkeypatch.setattr(Evaluator, "prepare", lambda *_: made.append("features"))
    runs.prepare(experiment)
    assert made == expected


@pytest.mark.slow
def test_a_required_autoencoder_is_trained_once_and_shared(tmp_path, cache, capsys):
    first = latent(tmp_path, f"run.dir={tmp_path / 'a'}")
    found = runs.prepare(first)
    said = capsys.readouterr().err
    assert said.startswith("training the required autoencoder once, in ")
    checkpoint = found["autoencoder"]
    assert checkpoint.is_file()
    assert checkpoint.is_relative_to(cache)
    stamp = checkpoint.stat().st_mtime_ns
    runs.fit(first)
    # Another contender of the same bench, with the same autoencoder.
    runs.fit(latent(tmp_path, f"run.dir={tmp_path / 'b'}", "seed=4", "model.init_args.width=24"))
    assert capsys.readouterr().err == ""
    assert checkpoint.stat().st_mtime_ns == stamp
    assert len(list(cache.glob("autoencoder-*/"))) == 1
    # The flow's own checkpoint does not hold it.
    state = torch.load(tmp_path / "a" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not any("autoencoder" in name for name in state)


@pytest.mark.slow
def test_a_requirement_that_fails_names_its_log(tmp_path, cache, capsys):
    """Its own folder is in the way: a file stands where its checkpoints go."""
    experiment = latent(tmp_path)
    folder = cache / f"autoencoder-{experiment.requirements['autoencoder'].fingerprint}"
    folder.mkdir(parents=True)
    (folder / "checkpoints").touch()
    message = f"training the required autoencoder ended with exit status 1: see {folder / 'log.txt'}"
    with pytest.raises(ProcessEnded, match=re.escape(message)):
        runs.prepare(experiment)
    assert "checkpoints" in (folder / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's death signal")
def test_the_training_of_a_requirement_dies_with_the_command_that_started_it(tmp_path, cache):
    """It would go on beside the next command, and hold its folder against it."""
    latent(tmp_path, autoencoder_steps=100_000)
    command = [sys.executable, "-m", "flowbench.cli", "prepare", "-c", str(tmp_path / "latent.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def soon(condition) -> bool:
        limit = time.monotonic() + 120
        while not condition() and time.monotonic() < limit:
            time.sleep(0.05)
        return condition()

    def held() -> bool:
        return any(lock_is_held(folder) for folder in cache.glob("autoencoder-*/"))

    assert soon(held)
    process.kill()
    process.wait()
    assert soon(lambda: not held())
