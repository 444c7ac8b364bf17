"""From a folder of photographs to a report: what the README shows, as it stands there, in an empty directory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from flowbench.cli import main
from flowbench.core.remarks import say_once
from flowbench.core.rows import Row, read_rows

ROOT = Path(__file__).resolve().parents[1]
# The README's budgets and counts are for a user who waits; these are for a test that does not.
SHORT = [
    "budget.steps=2",
    "run.name=mine",
    "model.init_args.network.init_args={width: 16, depth: 1, num_heads: 2}",
    "evaluator.num_samples=20",
    "evaluator.num_likelihood=2",
    "evaluator.num_trajectories=4",
]
SHORT_BENCH = ["seeds=[0]", "budget.steps=2", *(f"tasks.mine.overrides.{item}" for item in SHORT[3:])]


def block(name: str) -> str:
    """The YAML of the README that begins with this file's name."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (found,) = [text for text in blocks if text.startswith(f"# {name}\n")]
    return found


def photographs(folder: Path, count: int = 40) -> None:
    """Patches of the two photographs that scikit-learn ships."""
    folder.mkdir()
    rng, images = np.random.default_rng(0), load_sample_images().images
    for number in range(count):
        image = images[number % 2]
        y, x = (rng.integers(side - 48) for side in image.shape[:2])
        Image.fromarray(image[y : y + 48, x : x + 48]).save(folder / f"{number}.png")


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that holds nothing but photographs and what the README says."""
    place = tmp_path / "work"
    place.mkdir()
    photographs(place / "photos")
    for name in ("mine.yaml", "photos.yaml"):
        (place / name).write_text(block(name))
    monkeypatch.chdir(place)
    say_once.cache_clear()
    return place


def names(rows: list[Row]) -> set[str]:
    return {row.metric for row in rows}


def test_a_flow_is_trained_and_measured_without_editing(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", "mine.yaml", "--test", *SHORT]) == 0
    rows = read_rows(directory / "runs" / "mine" / "rows.jsonl")
    assert {"fd[identity]", "kid[identity]", "recall[identity]", "nll", "straightness", "parameters"} <= names(rows)
    assert all(row.value is not None for row in rows)
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("features: auto takes")]
    assert lines == [
        "features: auto takes identity for image_folder: no classes to train a classifier on, and 16x16 pixels are too "
        "few for efficientnet-lite0"
    ]
    assert "fd[identity]" in shown.out
    assert {path.name for path in directory.iterdir()} == {"photos", "mine.yaml", "photos.yaml", "runs"}


def test_the_bench_of_the_readme_is_short_and_planned(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(block("photos.yaml").splitlines()) <= 8
    assert main(["bench", "-c", "photos.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "photos: 6 cells" in shown
    assert all(f"flowbench:digits/{name}.yaml" in shown for name in ("cfm", "wcfm", "tarflow"))


@pytest.mark.slow
def test_a_bench_over_families_reports_on_own_photographs(directory: Path) -> None:
    assert main(["bench", "-c", "photos.yaml", *SHORT_BENCH]) == 0
    bench = directory / "runs" / "photos"
    rows = [row for path in bench.rglob("rows.jsonl") for row in read_rows(path)]
    contenders = {row.contender for row in rows if row.metric == "fd[identity]"}
    assert {"cfm", "wcfm", "tarflow", "floor", "noise", "gaussian", "gmm"} <= contenders
    report = (bench / "report.md").read_text()
    assert "fd[identity]" in report
    assert "cfm.fd[identity] < gaussian.fd[identity]" in report


def build_wheel(folder: Path) -> Path:
    """The wheel of this checkout, made of a copy, because a build leaves folders beside its sources."""
    source = folder / "source"
    shutil.copytree(ROOT / "flowbench", source / "flowbench", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "experiments", source / "experiments")
    (source / "data").mkdir()
    for name in ("data/README.md", "data/fashion_mnist_mini.npz", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and re.search(r"No matching distribution|Connection|Temporary failure", done.stderr):
        pytest.skip("the build needs setuptools from a package index, which cannot be reached")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """A fresh environment with the wheel, and the packages of this one for what it depends on."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    (site,) = (folder / "lib").glob("*/site-packages")
    shared = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "shared.pth").write_text("\n".join(shared))
    return python


SHIPPED = list((ROOT / "experiments").rglob("*.yaml"))
# One process for all questions: each would spend seconds on its imports.
LOOK = """
import flowbench
from flowbench.bench.plan import make_plan
from flowbench.config import compose
from flowbench.core.resources import experiment_names
from flowbench.data import FlowDataModule
print(flowbench.__file__)
print(len(experiment_names()))
print(len(FlowDataModule("fashion_mnist_mini").split("train")))
print(len(make_plan("flowbench:starflow_vs_wcfm.yaml").cells))
print(list(compose(["flowbench:digits/latent_cfm.yaml"]).resolved["requires"]))
"""


@pytest.mark.slow
def test_a_wheel_carries_all_of_it(directory: Path, tmp_path: Path) -> None:
    python = install(build_wheel(tmp_path / "build"), tmp_path / "venv")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"FLOWBENCH_CACHE": str(tmp_path / "cache"), "FLOWBENCH_OFFLINE": "1"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return done

    where, *found = run(str(python), "-c", LOOK).stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path / "venv")
    assert found == [str(len(SHIPPED)), "1750", "6", "['autoencoder']"]
    trained = run(str(python.with_name("flowbench")), "fit", "-c", "mine.yaml", "--test", *SHORT)
    assert "features: auto takes identity" in trained.stderr
    assert "fd[identity]" in trained.stdout
    assert not (directory / "data").exists(), "caches are the user's, not the directory's"
