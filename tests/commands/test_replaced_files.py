"""A user's own files are known by what they hold: where one is replaced, nothing of the old one is taken for it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from flowbench.bench.plan import make_plan
from flowbench.cli import main
from flowbench.config import ConfigError, Experiment, compose, fingerprint, to_yaml

from .conftest import POINTS

OWN = POINTS.replace("dataset: eight_gaussians", "dataset: npz, path: mine.npz, standardize: true").replace(
    "steps: 20", "steps: 3"
)
AUTOENCODER = """
data: {dataset: npz, path: images.npz, batch_size: 8}
model:
  class_path: flowbench.families.Autoencoder
  init_args: {network: {class_path: flowbench.networks.KLAutoencoder, init_args: {width: 8, latent_channels: 2}}}
trainer: {accelerator: cpu, devices: 1}
budget: {steps: 1}
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "cache"))


def points(seed: int) -> None:
    np.savez("mine.npz", x=np.random.default_rng(seed).normal(size=(60, 2)) * 50)


def photos(folder: str, seed: int, num: int = 12) -> None:
    rng = np.random.default_rng(seed)
    Path(folder).mkdir(exist_ok=True)
    for number in range(num):
        pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(Path(folder) / f"{number:02}.png")


def write(name: str, text: str) -> Path:
    Path(name).write_text(text)
    return Path(name)


def error(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("data: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("flowbench: error: ")
    return lines[0].removeprefix("flowbench: error: ")


# ---- runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A folder with data, an experiment on them and its run."""
    folder, before = tmp_path_factory.mktemp("original"), Path.cwd()
    os.chdir(folder)
    try:
        points(0)
        write("mine.yaml", OWN)
        assert main(["fit", "-c", "mine.yaml", "run.dir=run"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def trained(original, tmp_path) -> Path:
    """The run, here, where the file holds other data by now."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    points(1)
    return Path("run")


@pytest.mark.parametrize("command", ["fit", "test", "validate", "predict", "reference", "prepare"])
def test_a_saved_run_is_refused_where_its_data_are_others_by_now(trained, capsys, command):
    before = (trained / "checkpoints" / "last.ckpt").read_bytes()
    folder = "other" if command == "reference" else "run"  # reference rows have a folder of their own
    assert main([command, "-c", "run/config.yaml", f"run.dir={folder}"]) == 2
    text = error(capsys)
    assert text.startswith("mine.npz: holds something else than when this run was configured (sha256:")
    assert text.endswith("restore it, or start another run with the override files=null")
    assert (trained / "checkpoints" / "last.ckpt").read_bytes() == before
    assert not (trained / "rows.jsonl").exists()


def test_training_does_not_go_on_with_other_data(trained, capsys):
    assert main(["fit", "-c", "mine.yaml", "run.dir=run"]) == 2
    assert "run holds a run of another configuration" in error(capsys)


def test_the_remedies_of_the_message_help(trained, capsys):
    assert main(["fit", "-c", "run/config.yaml", "files=null", "run.dir=other"]) == 0
    assert main(["test", "-c", "other/config.yaml", "run.dir=other"]) == 0
    points(0)
    assert main(["test", "-c", "run/config.yaml", "run.dir=run"]) == 0


def test_without_a_name_other_data_are_another_run(trained):
    replaced = Experiment.from_files(["mine.yaml"])
    points(0)
    assert Experiment.from_files(["mine.yaml"]).run_dir != replaced.run_dir


def test_the_same_data_elsewhere_are_the_same_run(trained, tmp_path):
    first = Experiment.from_files(["mine.yaml"]).fingerprint
    shutil.copy("mine.npz", "copy.npz")
    os.utime("copy.npz", (1, 1))
    assert Experiment.from_files(["mine.yaml"], ["data.path=copy.npz"]).fingerprint == first
    assert Experiment.from_files(["mine.yaml"], [f"data.path={tmp_path / 'copy.npz'}"]).fingerprint == first


def test_a_run_that_was_saved_before_contents_were_recorded_loads(trained):
    points(0)
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert saved["files"] == {"mine.npz": Experiment.from_files(["mine.yaml"]).resolved["files"]["mine.npz"]}
    del saved["files"], saved["run"]
    write("run/config.yaml", yaml.safe_dump(saved))
    old = compose(["run/config.yaml"]).resolved
    assert "files" not in old
    assert fingerprint(old) == fingerprint(saved)
    assert main(["test", "-c", "run/config.yaml", "run.dir=run"]) == 0
    assert main(["fit", "-c", "run/config.yaml", "data.dataset=npz", "run.dir=run", "--dry-run"]) == 0


def test_other_data_named_on_top_of_a_saved_run_are_identified(trained):
    points(0)
    shutil.copy("mine.npz", "new.npz")
    resolved = compose(["run/config.yaml"], ["data.path=new.npz"]).resolved
    assert list(resolved["files"]) == ["new.npz"]
    digits = compose(["run/config.yaml"], ["data={dataset: digits}"]).resolved
    assert "files" not in digits


def test_a_saved_configuration_composes_to_itself(trained):
    resolved = compose(["mine.yaml"]).resolved
    write("again.yaml", to_yaml(resolved))
    assert compose(["again.yaml"]).resolved == resolved


def test_data_of_the_catalogue_leave_the_configuration_and_its_fingerprint_alone():
    write("plain.yaml", POINTS)
    resolved = compose(["plain.yaml"]).resolved
    assert "files" not in resolved
    Path("eight_gaussians").mkdir()  # a folder that happens to have a name of the configuration
    Path("w2").write_text("")
    assert compose(["plain.yaml"]).resolved == resolved


def test_counting_reads_no_file(monkeypatch, capsys):
    points(0)
    write("mine.yaml", OWN.replace("standardize: true", "standardize: true, shape: [2]"))
    monkeypatch.setattr("flowbench.config.files.content_of", lambda *given: pytest.fail("a file was read"))
    assert main(["count", "-c", "mine.yaml"]) == 0
    assert "FlowMatching" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["files: 3", "files: [a]", "files: {a.npz: 3}"])
def test_files_written_by_hand_are_checked(text):
    write("plain.yaml", f"{POINTS}\n{text}\n")
    with pytest.raises(ConfigError, match="files must hold 'name: content' lines"):
        compose(["plain.yaml"])


def test_a_file_that_is_not_there_is_left_to_the_class_that_wants_it():
    write("mine.yaml", OWN)
    experiment = Experiment.from_files(["mine.yaml"])
    assert "files" not in experiment.resolved
    with pytest.raises(ValueError, match=r"path: 'mine.npz' does not exist"):
        experiment.build_data()


# ---- every kind of file -----------------------------------------------------------------------------------

INPAINTING = """
data: {dataset: fashion_mnist_mini}
model:
  class_path: flowbench.families.FlowMatching
  init_args:
    network: {class_path: flowbench.networks.UNet}
    conditioner: {class_path: flowbench.families.InpaintingConditioner, init_args: {mask: mask.png}}
"""
STATISTICS = POINTS.replace(
    "w2: {class_path: flowbench.evaluation.Wasserstein2}",
    "fd: {class_path: flowbench.evaluation.FrechetDistance, init_args: {features: identity, statistics: stats.npz}}",
)
PRETRAINED = """
data: {dataset: cifar10}
model:
  class_path: flowbench.families.PretrainedAutoencoder
  init_args: {network: {class_path: flowbench.families.TAEF2, init_args: {weights: taef2}}}
budget: {steps: 1}
"""
DIFFUSERS = PRETRAINED.replace("TAEF2, init_args: {weights: taef2}", "DiffusersAutoencoder, init_args: {path: taef2}")
PERCEPTUAL = AUTOENCODER.replace("npz, path: images.npz", "digits").replace(
    "init_args: {network:", "init_args: {perceptual: {network: classifier, weights: taef2/a.pt}, network:"
)
REQUIRED = """
data: {dataset: npz, path: images.npz, batch_size: 8}
requires: {autoencoder: autoencoder.yaml}
model: {class_path: flowbench.families.STARFlow, init_args: {layers: 1}}
budget: {steps: 1}
"""


def change(path: str) -> None:
    content = bytearray(Path(path).read_bytes())
    content[-1] ^= 1
    Path(path).write_bytes(bytes(content))


KINDS: dict[str, tuple[str, str]] = {
    "data in a file": (OWN, "mine.npz"),
    "data in a folder": (OWN.replace("npz, path: mine.npz", "image_folder, path: photos"), "photos/03.png"),
    "statistics": (STATISTICS, "stats.npz"),
    "a mask": (INPAINTING, "mask.png"),
    "weights in a folder": (PRETRAINED, "taef2/a.pt"),
    "a network in a folder": (DIFFUSERS, "taef2/a.pt"),
    "a file of weights": (PERCEPTUAL, "taef2/a.pt"),
    "data of a required experiment": (REQUIRED, "images.npz"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_result_depends_on_is_known_by_its_content(kind, tmp_path):
    text, file = KINDS[kind]
    points(0)
    photos("photos", 0)
    np.savez("stats.npz", mu=np.zeros(2), sigma=np.eye(2))
    np.savez("images.npz", x=np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8))
    Image.new("L", (28, 28), 255).save("mask.png")
    Path("taef2").mkdir()
    torch.save({}, "taef2/a.pt")
    write("autoencoder.yaml", AUTOENCODER)
    write("mine.yaml", text)
    before = compose(["mine.yaml"]).resolved
    assert compose(["mine.yaml"]).resolved == before
    change(file)
    after = compose(["mine.yaml"]).resolved
    assert fingerprint(after) != fingerprint(before)
    assert list(after["files"]) == list(before["files"])
    write("saved.yaml", to_yaml(before))
    recorded = compose(["saved.yaml"]).resolved
    assert recorded == before, "what was recorded stands"
    experiment = Experiment.from_files(["mine.yaml"]) if kind != "data of a required experiment" else None
    if experiment is not None:
        experiment.check_files()
        with pytest.raises(ConfigError, match="holds something else than when this run was configured"):
            Experiment.from_files(["saved.yaml"]).check_files()


def test_the_prerequisite_of_new_data_is_a_new_one():
    """And one that was recorded is refused rather than trained on something else."""
    np.savez("images.npz", x=np.zeros((20, 1, 8, 8), dtype=np.uint8))
    write("autoencoder.yaml", AUTOENCODER)
    write("mine.yaml", REQUIRED)
    before = compose(["mine.yaml"]).resolved
    change("images.npz")
    after = compose(["mine.yaml"]).resolved
    first, second = (tree["requires"]["autoencoder"] for tree in (before, after))
    assert fingerprint(first) != fingerprint(second), "the folder in the cache is named by it"
    write("required.yaml", to_yaml(first))
    with pytest.raises(ConfigError, match=r"images.npz: holds something else"):
        Experiment.from_files(["required.yaml"]).build_data()
    assert after["files"] == second["files"]


def test_what_an_outer_experiment_recorded_holds_inside():
    np.savez("images.npz", x=np.zeros((20, 1, 8, 8), dtype=np.uint8))
    write("autoencoder.yaml", AUTOENCODER)
    pinned = compose([write("mine.yaml", REQUIRED)]).resolved["files"]
    change("images.npz")
    write("cell.yaml", yaml.safe_dump({"base": ["mine.yaml"], "files": pinned}))
    assert compose(["cell.yaml"]).resolved["requires"]["autoencoder"]["files"] == pinned


# ---- benches ----------------------------------------------------------------------------------------------


def bench(**content: Any) -> Path:
    contenders = {"one": "mine.yaml", "two": {"experiment": "mine.yaml", "overrides": {"data.batch_size": 16}}}
    tree = {"contenders": contenders, "seeds": [0, 1], "budget": {"steps": 3}, **content}
    return write("bench.yaml", yaml.safe_dump(tree))


def test_a_bench_starts_over_on_new_data_and_its_cells_know_which_they_are_for():
    points(0)
    write("mine.yaml", OWN)
    before = make_plan(bench())
    points(1)
    after = make_plan(bench())
    everything = [(*plan.cells, *plan.references) for plan in (before, after)]
    for old, new in zip(*everything, strict=True):
        assert old.config_hash != new.config_hash, old.label
        assert old.config["files"] != new.config["files"]
    assert {cell.preparation for cell in before.cells}.isdisjoint(cell.preparation for cell in after.cells)
    # A cell that was planned for the first data and starts when they are others.
    write("cell.yaml", before.cells[0].config_text())
    experiment = Experiment.from_files(["cell.yaml"])
    assert experiment.fingerprint == before.cells[0].config_hash
    with pytest.raises(ConfigError, match=r"mine.npz: holds something else"):
        experiment.build_data()


def test_cells_of_data_of_the_catalogue_say_nothing_of_files():
    write("mine.yaml", POINTS)
    assert "files" not in make_plan(bench()).cells[0].config
