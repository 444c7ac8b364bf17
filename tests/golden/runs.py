"""What is compared with the stored numbers: four experiments of 20 steps, measured, and 20 losses of every family."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flowbench.commands import runs
from flowbench.config import Experiment
from flowbench.core.rows import Row, read_rows
from tests.contract.builders import CASES, batch_of, build

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STEPS = 20
IMAGES = [
    "evaluator.num_samples=96",
    "evaluator.num_likelihood=8",
    "evaluator.num_trajectories=16",
    "evaluator.metrics.nll.init_args.num_checked=2",
]
POINTS = ["evaluator.num_samples=200", "evaluator.num_likelihood=64", "evaluator.num_trajectories=32"]
MEASURED: dict[str, list[str]] = {
    "digits/wcfm": IMAGES,
    "digits/starflow": [*IMAGES, f"requires.autoencoder.budget={{steps: {STEPS}}}"],
    "digits/tarflow": IMAGES,
    "toy/ot_cfm": POINTS,
}
"""Experiment -> what keeps it short. All that ships is measured, at smaller N."""

# What was counted (parameters, operations, samples) is the same on any machine; these are not.
COSTS = {"flop_utilisation", "peak_memory", "samples_per_second", "step_milliseconds", "train_seconds"}
# Rows that came after the golden ones were stored; the losses and likelihoods behind them are golden themselves.
LATER = {"nll_error", "optimizer_state_bytes", "validation_loss"}


def measured_rows(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of an experiment after 20 steps, without costs: metric, what it was measured at, value."""
    overrides = [*MEASURED[name], f"budget={{steps: {STEPS}}}", "loggers={}", "trainer.enable_progress_bar=false"]
    experiment = Experiment.from_files(
        [str(EXPERIMENTS / f"{name}.yaml")],
        [*overrides, "evaluator.sweep={network_evaluations: [2]}", "evaluator.curve=[]", f"run.dir={folder / name}"],
    )
    directory = runs.fit(experiment, test=True)
    for row in read_rows(directory / "rows.jsonl"):
        if row.metric not in COSTS | LATER:
            yield {"experiment": name, **identity(row), "value": row.value}


def identity(row: Row) -> dict[str, Any]:
    """What tells one row of a run from the others."""
    return {
        "contender": row.contender,
        "metric": row.metric,
        "n": row.n,
        "protocol": f"{row.protocol}/sweep" if row.axis else row.protocol,  # as it was when they were stored
        "unit": row.unit,
        "network_evaluations": f"{row.network_evaluations:g}",
        "sampler": row.sampler,
        "weights": row.weights,
        "status": row.status,
    }


def exact_products() -> None:
    """Products and convolutions in true float32, which models of GPU have in common."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def losses(device: torch.device) -> Iterator[tuple[str, list[float]]]:
    """``family-data`` and its losses of 20 steps, from weights none of which is zero."""
    for family, spec in CASES:
        module = build(family, spec).train().to(device)
        optimizer = module.optimizer_config.build(module)
        found = []
        for step in range(STEPS):
            batch = batch_of(spec, 16, seed=step)
            # Indices key generators of the host and stay there, as the datamodule leaves them.
            batch = dataclasses.replace(batch, x=batch.x.to(device), label=batch.label.to(device))
            generator = torch.Generator(device).manual_seed(step)
            loss = module.training_loss(batch, generator).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        yield f"{family}-{spec.name}", found
