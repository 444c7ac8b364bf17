"""Whole runs through the command line on the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowbench.cli import main
from flowbench.core.rows import read_rows

from ..commands.conftest import DIGITS, POINTS
from .conftest import DEVICE

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def run(tmp_path: Path, text: str, name: str, *overrides: str, command: str = "fit") -> Path:
    file, folder = tmp_path / "experiment.yaml", tmp_path / name
    file.write_text(text)
    accelerator = "gpu" if DEVICE.type == "cuda" else "cpu"
    words = [command, "-c", str(file), f"run.dir={folder}", f"trainer.accelerator={accelerator}", *overrides]
    assert main([*words, "--test"] if command == "fit" else words) == 0
    return folder


def values(folder: Path) -> dict[str, float | None]:
    return {row.metric: row.value for row in read_rows(folder / "rows.jsonl")}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")["state_dict"]


@pytest.mark.parametrize("text", [POINTS, DIGITS], ids=["points", "digits"])
def test_a_run_is_trained_and_measured_in_bfloat16(text, tmp_path):
    found = values(run(tmp_path, text, "bf16", "trainer.precision=bf16-mixed"))
    assert found["nll"] is not None
    assert found["peak_memory"] > 0
    assert found["train_seconds"] > 0


def test_weights_of_the_gpu_are_measured_alike_on_the_cpu(tmp_path):
    folder = run(tmp_path, DIGITS, "one")
    on_gpu = values(folder)
    file = tmp_path / "experiment.yaml"
    words = ["test", "-c", str(file), f"run.dir={folder}", "trainer.accelerator=cpu"]
    assert main(words) == 0
    on_cpu = values(folder)
    for metric in ("nll", "fd[identity]"):
        assert on_cpu[metric] == pytest.approx(on_gpu[metric], rel=1e-3)


@pytest.mark.parametrize("strategy", ["ddp", "{class_path: flowbench.training.FullyShardedStrategy}"])
def test_one_card_with_nccl_trains_as_one_card_without(strategy, tmp_path):
    plain = run(tmp_path, POINTS, "plain")
    other = run(tmp_path, POINTS, "nccl", f"trainer.strategy={strategy}", "trainer.devices=1")
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(other)[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("file", ["images/gpu/tarflow.yaml", "cifar10/gpu/cfm.yaml", "cifar10/gpu/wcfm.yaml"])
def test_a_gpu_experiment_takes_steps_as_shipped(file, tmp_path, cuda):
    """On pictures of noise, with its own network, precision and batch."""
    import numpy as np

    shape = (3, 32, 32) if "cifar10" in file else (1, 28, 28)
    pictures = tmp_path / "noise.npz"
    np.savez(pictures, x=np.random.default_rng(0).integers(0, 256, (1000, *shape), dtype=np.uint8))
    data = ["data.dataset=npz", f"data.path={pictures}", "data.random_flip=false", "data.train_on_val=false"]
    common = [f"run.dir={tmp_path / 'run'}", "evaluator=null", "requires=null", "budget.steps=5"]
    assert main(["fit", "-c", str(EXPERIMENTS / file), *data, *common]) == 0
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values() if value.is_floating_point())
