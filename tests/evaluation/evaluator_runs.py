"""Small flows, evaluators and trainers, and the rows that they write."""

from __future__ import annotations

import lightning as L

from flowbench.config.references import default_references
from flowbench.core.rows import read_rows
from flowbench.data import FlowDataModule
from flowbench.evaluation import CostReport, Evaluator, FrechetDistance, Identity, Wasserstein2
from flowbench.flows import Midpoint, RungeKutta4
from flowbench.tasks.generation import NegativeLogLikelihood, PathStraightness

from ..contract.builders import build


def digits() -> FlowDataModule:
    return FlowDataModule("digits", batch_size=16)


def points() -> FlowDataModule:
    return FlowDataModule("eight_gaussians", batch_size=16, eval_batch_size=100)


def flow(name: str, data: FlowDataModule, **options):
    return build(name, data.spec, **options)


def image_metrics(features: str = "identity") -> dict:
    return {
        "fd": FrechetDistance(features),
        "nll": NegativeLogLikelihood(),
        "paths": PathStraightness(),
        "cost": CostReport(),
    }


def point_metrics() -> dict:
    return {"w2": Wasserstein2(), "nll": NegativeLogLikelihood(), "paths": PathStraightness(), "cost": CostReport()}


def evaluator(metrics: dict | None = None, **options) -> Evaluator:
    settings = {"num_samples": 20, "num_trajectories": 6, "trajectory_points": 5, "num_pictures": 4}
    metrics = image_metrics() if metrics is None else metrics
    made = Evaluator(metrics, **{"references": default_references(), **settings, **options})
    made.identity = Identity(bench="b", problem="t", contender="c", seed=3, config_hash="abc")
    return made


def trainer(tmp_path, measure: Evaluator | None, **options) -> L.Trainer:
    settings = {
        "max_steps": 6,
        "max_epochs": -1,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "inference_mode": False,
        "default_root_dir": tmp_path,
        "callbacks": [measure] if measure else [],
    }
    return L.Trainer(**{**settings, **options})


def quick(family):
    """Small solvers for the continuous families."""
    if hasattr(family, "solver"):
        family.solver, family.likelihood_solver = Midpoint(num_steps=2), RungeKutta4(num_steps=1)
    return family


def rows_of(tmp_path) -> dict:
    return {(r.metric, r.network_evaluations if r.axis else None): r for r in read_rows(tmp_path / "rows.jsonl")}


def measured(tmp_path, name: str, data: FlowDataModule, measure: Evaluator, **options) -> dict:
    trainer(tmp_path, measure, limit_test_batches=1).test(quick(flow(name, data, **options)), data, verbose=False)
    return rows_of(tmp_path)
