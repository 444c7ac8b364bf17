"""Tiny experiments in a folder of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flowbench.config import Experiment

from ..bench.conftest import workshop

__all__ = [
    "AUTOENCODER", "DIGITS", "POINTS", "QUALITY", "STARFLOW", "WEIGHTED", "experiment", "latent_files", "quality",
    "workshop",
]  # fmt: skip

POINTS = """
seed: 0
data: {dataset: eight_gaussians, batch_size: 32, eval_batch_size: 128}
model:
  class_path: flowbench.families.FlowMatching
  init_args:
    network: {class_path: flowbench.networks.MLP, init_args: {width: 16, depth: 2}}
    solver: {class_path: flowbench.flows.Midpoint, init_args: {num_steps: 2}}
    likelihood_solver: {class_path: flowbench.flows.RungeKutta4, init_args: {num_steps: 1}}
    training: {optimizer: {lr: 1.0e-2}}
trainer: {accelerator: cpu, devices: 1, limit_test_batches: 1, limit_val_batches: 1}
budget: {steps: 20}
evaluator:
  reference: val
  held_out: test
  num_samples: 50
  curve: [w2]
  metrics:
    w2: {class_path: flowbench.evaluation.Wasserstein2}
    nll: {class_path: flowbench.tasks.generation.NegativeLogLikelihood}
    cost: {class_path: flowbench.evaluation.CostReport}
"""

DIGITS = """
seed: 0
data: {dataset: digits, batch_size: 16}
model:
  class_path: flowbench.families.TARFlow
  init_args:
    {layers: [1, 1], width: 16, head_dim: 8, patch_size: 4, conditional: true, training: {optimizer: {lr: 1.0e-2}}}
trainer: {accelerator: cpu, devices: 1}
budget: {steps: 6}
evaluator:
  num_samples: 40
  curve: [fd]
  metrics:
    fd: {class_path: flowbench.evaluation.FrechetDistance, init_args: {features: identity}}
    nll: {class_path: flowbench.tasks.generation.NegativeLogLikelihood}
    cost: {class_path: flowbench.evaluation.CostReport}
"""

# A family with running statistics, averaged weights, paths and a sweep: everything that a resumed run must carry over.
WEIGHTED = """
seed: 3
data: {dataset: digits, batch_size: 16}
model:
  class_path: flowbench.families.WeightedCFM
  init_args:
    network: {class_path: flowbench.networks.DiT, init_args: {width: 16, depth: 1, num_heads: 2, patch_size: 4}}
    weight: {class_path: flowbench.flows.GibbsWeight, init_args: {kappa: 0.5}}
    solver: {class_path: flowbench.flows.Midpoint, init_args: {num_steps: 2}}
    likelihood_solver: {class_path: flowbench.flows.RungeKutta4, init_args: {num_steps: 1}}
    conditional: true
    training: {optimizer: {lr: 1.0e-2}}
trainer: {accelerator: cpu, devices: 1}
budget: {steps: 20}
evaluator:
  num_samples: 40
  num_trajectories: 8
  trajectory_points: 3
  curve: [fd]
  sweep: {network_evaluations: [1, 2]}
  metrics:
    fd: {class_path: flowbench.evaluation.FrechetDistance, init_args: {features: identity}}
    nll: {class_path: flowbench.tasks.generation.NegativeLogLikelihood}
    straightness: {class_path: flowbench.tasks.generation.PathStraightness}
    cost: {class_path: flowbench.evaluation.CostReport}
loggers:
  tensorboard:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {name: "", version: tensorboard, default_hp_metric: false}
"""

# A flow that requires a trained autoencoder, and the autoencoder.
AUTOENCODER = """
data: {dataset: digits, batch_size: 16}
model:
  class_path: flowbench.families.Autoencoder
  init_args: {network: {class_path: flowbench.networks.KLAutoencoder, init_args: {width: 8, latent_channels: 2}}}
trainer: {accelerator: cpu, devices: 1}
budget: {steps: 2}
"""
STARFLOW = """
data: {dataset: digits, batch_size: 16}
requires: {autoencoder: autoencoder.yaml}
model:
  class_path: flowbench.families.STARFlow
  init_args: {deep_layers: 1, shallow_blocks: 1, shallow_layers: 1, width: 16, head_dim: 8}
trainer: {accelerator: cpu, devices: 1}
budget: {steps: 2}
"""

# What a metric says about quality; costs are measured on a clock.
QUALITY = ("fd[identity]", "w2", "nll", "straightness", "path_energy", "displacement", "npe", "path_length_ratio")


@pytest.fixture(autouse=True)
def few_mixtures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row `gmm` is chosen among two mixtures here; tests/evaluation fits those that a run chooses among."""
    monkeypatch.setattr("flowbench.tasks.generation.references.Mixture.sizes", (1, 2))


@pytest.fixture
def experiment(tmp_path) -> Callable[..., Experiment]:
    """Write `text` to a file and compose it with overrides; runs go to tmp_path/runs/<name>."""

    def make(text: str = POINTS, *overrides: str, name: str = "one") -> Experiment:
        file = tmp_path / "experiment.yaml"
        file.write_text(text)
        return Experiment.from_files([file], [f"run.dir={tmp_path / 'runs' / name}", *overrides])

    return make


def latent_files(folder: Path, *, autoencoder_steps: int = 2, evaluator: str = "") -> Path:
    """Write a latent flow's file, which is returned, and beside it that of the autoencoder that it requires.

    Args:
        folder: where to.
        autoencoder_steps: budget of the autoencoder.
        evaluator: lines that the flow's file ends with.
    """
    budget = f"budget: {{steps: {autoencoder_steps}}}"
    (folder / "autoencoder.yaml").write_text(AUTOENCODER.replace("budget: {steps: 2}", budget))
    file = folder / "latent.yaml"
    file.write_text(STARFLOW + evaluator)
    return file


def quality(run_dir: Path) -> dict[tuple[str, float | None, str], float | None]:
    """The rows that must not depend on how the training went on."""
    from flowbench.core.rows import read_rows

    rows = read_rows(run_dir / "rows.jsonl")
    return {(r.metric, r.network_evaluations, r.protocol): r.value for r in rows if r.metric in QUALITY}
