"""Runs through the real command line: one process in this one, two as a user starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from flowbench.cli import main

HERE = Path(__file__).parent
TWO = ["trainer.devices=2", "trainer.accelerator=cpu"]
SHARDED = "{class_path: flowbench.training.FullyShardedStrategy}"

EXPERIMENT = {
    "seed": 5,
    "data": {"dataset": "digits", "batch_size": 32, "eval_batch_size": 50},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 6,
        "val_check_interval": 3,
        "gradient_clip_val": 1.0,
    },
    "evaluator": {
        "num_samples": 101,  # odd: the shards of two processes differ
        "batch_size": 40,
        "num_trajectories": 33,
        "curve": ["fd"],
        "metrics": {
            "fd": {"class_path": "flowbench.evaluation.FrechetDistance", "init_args": {"features": "identity"}},
            "kid": {"class_path": "flowbench.evaluation.KernelDistance", "init_args": {"features": "identity"}},
            "few": {
                "class_path": "flowbench.evaluation.PrecisionRecall",
                "init_args": {"features": "identity", "num_samples": 60, "num_reference": 200},
            },
            "copies": {"class_path": "flowbench.evaluation.Memorization", "init_args": {"features": "identity"}},
            "nll": {"class_path": "flowbench.tasks.generation.NegativeLogLikelihood"},
            "straightness": {"class_path": "flowbench.tasks.generation.PathStraightness"},
            "cost": {"class_path": "flowbench.evaluation.CostReport"},
        },
    },
}
# Adam divides by the root of the second moment: where the exact gradient is zero (a key's bias), a small epsilon would
# turn rounding errors, which the number of processes changes, into steps of the full learning rate.
OPTIMIZER = {"lr": 0.01, "eps": 1.0e-4}
TARFLOW = {
    "class_path": "flowbench.families.TARFlow",
    "init_args": {"layers": [1, 1], "width": 16, "head_dim": 8, "patch_size": 4, "training": {"optimizer": OPTIMIZER}},
}
NETWORK = {
    "class_path": "flowbench.networks.DiT",
    "init_args": {"width": 16, "depth": 1, "num_heads": 2, "patch_size": 4},
}


def matching(family: str, **options) -> dict:
    """A small flow-matching model of a family."""
    solver = {"class_path": "flowbench.flows.Midpoint", "init_args": {"num_steps": 2}}
    training = {"optimizer": OPTIMIZER}
    arguments = {"network": NETWORK, "solver": solver, "likelihood_solver": solver, "training": training}
    return {"class_path": f"flowbench.families.{family}", "init_args": {**arguments, **options}}


@dataclass
class Outcome:
    """What a command did."""

    status: int
    stdout: str
    stderr: str


@dataclass
class Workplace:
    """A folder with experiment files and runs."""

    folder: Path

    def write(self, name: str, model: dict, **sections: dict) -> Path:
        """An experiment file; `sections` are merged into the common ones."""
        experiment = {**EXPERIMENT, "model": model}
        for key, value in sections.items():
            experiment[key] = {**EXPERIMENT.get(key, {}), **value} if isinstance(value, dict) else value
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(experiment))
        return path

    def npz(self, name: str, sizes: dict[str, int]) -> Path:
        """Random 4x4 images with splits of the given sizes."""
        rng = np.random.default_rng(0)
        arrays = {split: rng.integers(0, 256, (size, 1, 4, 4), dtype=np.uint8) for split, size in sizes.items()}
        path = self.folder / f"{name}.npz"
        np.savez(path, **arrays)
        return path

    def one(self, *words: str | Path) -> None:
        """A command in this process."""
        assert main([str(word) for word in words]) == 0

    def two(self, *words: str | Path, timeout: float = 200, strategy: str = "ddp", **variables: str) -> Outcome:
        """A command under two processes, as a user starts it; killed with its children when it hangs."""
        command = [sys.executable, "-m", "flowbench.cli", *map(str, words), *TWO, f"trainer.strategy={strategy}"]
        # The package under test may lie on the path instead of being installed.
        path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            pytest.fail(f"two processes hang: {' '.join(command)}")
        return Outcome(process.returncode, stdout, stderr)

    def rows(self, run: str) -> list[dict]:
        """The rows of a run."""
        return read_lines(self.folder / run / "rows.jsonl")

    def checkpoint(self, run: str) -> dict:
        """The last checkpoint of a run."""
        return torch.load(self.last(run), weights_only=True)

    def last(self, run: str) -> Path:
        """Path of the last checkpoint."""
        return self.folder / run / "checkpoints" / "last.ckpt"


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
