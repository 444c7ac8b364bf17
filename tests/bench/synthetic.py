"""A finished bench on disk without any training: rows, curves, samples, trajectories."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from flowbench.bench.plan import Plan
from flowbench.bench.results import collect
from flowbench.bench.status import Status, write_status
from flowbench.core.rows import Row, write_rows
from flowbench.core.storage import write_text

from .goals import declared

LEVEL = {"starflow": 30.0, "wcfm": 18.0, "cfm": 19.0, "tarflow": 24.0}
SWEPT = ("wcfm", "cfm")


def write_synthetic_bench(plan: Plan, seed: int = 0) -> Path:
    """Fill the directory of a plan with made-up results; problems whose name starts with ``toy`` are 2-D."""
    rng = np.random.default_rng(seed)
    write_text(plan.directory / "plan.json", json.dumps(plan.describe()))
    for cell in (*plan.references, *plan.cells):
        cell.directory.mkdir(parents=True)
        rows = _reference_rows(cell) if cell.kind == "reference" else _cell_rows(cell, rng)
        write_rows(cell.directory / "rows.jsonl", rows)
        _arrays(cell, rng)
        write_status(cell.directory, Status("DONE", cell.config_hash, attempts=1, exit_code=0, wall_seconds=3.0))
    collect(plan.directory)
    return plan.directory


def _row(cell, contender, metric, value, **fields) -> Row:
    return Row(
        **{
            "bench": cell.config["run"]["bench"],
            "problem": cell.problem,
            "contender": contender,
            "family": contender.upper(),
            "dataset": "eight_gaussians" if cell.problem.startswith("toy") else "digits",
            "seed": cell.seed,
            "metric": metric,
            **declared(metric),
            "value": value,
            "n": 360,
            "protocol": "digits-cnn/test/360",
            "unit": "",
            "network_evaluations": 32.0,
            "weights": "ema",
            "provenance": {
                "git_sha": "0123abc",
                "versions": {"torch": "2.13", "lightning": "2.6.6"},
                "hardware": "2 x Xeon",
                "parameters": int(1e5 * LEVEL.get(contender, 1)),
                "train_seconds": 50.0 + cell.seed,
            },
            **fields,
        }
    )


def _reference_rows(cell) -> list[Row]:
    toy = cell.problem.startswith("toy")
    quality = {"floor": 6.0, "noise": 240.0, "gaussian": 120.0, "gmm": 60.0}
    make = {"family": "reference", "weights": "none", "network_evaluations": 0.0}
    name = "w2" if toy else "fd[digits-cnn]"
    rows = [_row(cell, key, name, value / (40 if toy else 1), **make) for key, value in quality.items()]
    nll = {"unit": "bits/dim", "protocol": "exact/test/360"}
    return rows + [_row(cell, key, "nll", v, **make, **nll) for key, v in (("gaussian", 2.98), ("gmm", 2.63))]


def _cell_rows(cell, rng) -> list[Row]:
    name, toy = cell.contender, cell.problem.startswith("toy")
    metric, scale = ("w2", 1 / 40) if toy else ("fd[digits-cnn]", 1.0)
    level = LEVEL[name] * scale
    noise = lambda: float(rng.normal(1.0, 0.03))  # noqa: E731
    kind = "bound" if name == "starflow" else "exact" if name == "tarflow" else "ode"
    rows = [
        _row(cell, name, metric, level * noise()),
        _row(cell, name, "nll", 2.3 * noise(), unit="bits/dim", protocol=f"{kind}/test/360"),
        _row(cell, name, "precision[digits-cnn]", min(1.0, 0.8 * noise())),
        _row(cell, name, "straightness", level / 60 * noise(), protocol="data space/256-paths"),
        _row(cell, name, "npe", (level / 60 - 0.3) * noise()),
        _row(cell, name, "samples_per_second", 1e5 / level * noise(), unit="1/s"),
        _row(cell, name, "train_flops", 4e12),
    ]
    if name in SWEPT:
        for count in cell.config["evaluator"]["sweep"]["network_evaluations"]:
            value = level * (1 + 6 / count) * noise()
            swept = _row(
                cell,
                name,
                metric,
                value,
                network_evaluations=float(count),
                axis="network_evaluations",
                at=float(count),
            )
            rows.append(replace(swept, provenance={}))
    points = [
        {
            "step": s,
            "samples_seen": s * 128,
            "train_seconds": s / 20 * (1 + 0.1 * cell.seed),
            "train_flops": s * 1e9,
            "metric": metric,
            "value": level * (1 + 8 * np.exp(-s / 250)) * noise(),
        }
        for s in range(100, 1100, 100)
    ]
    write_text(cell.directory / "curve.jsonl", "".join(json.dumps(p) + "\n" for p in points))
    return rows


def _arrays(cell, rng) -> None:
    if cell.problem.startswith("toy"):
        angle = rng.integers(0, 8, 2000) * np.pi / 4
        ends = 2 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.15 * rng.normal(size=(2000, 2))
        start, times = rng.normal(size=(2000, 2)), np.linspace(0, 1, 17)
        bend = 0.0 if cell.contender == "wcfm" else 1.5
        wave = np.sin(np.pi * times)[:, None, None] * bend * ends[:, ::-1] * [1, -1]
        states = (1 - times[:, None, None]) * start + times[:, None, None] * ends + 0.3 * wave
        np.savez(cell.directory / "samples.npz", x=ends.astype(np.float32))
        if cell.kind == "fit":
            np.savez(cell.directory / "trajectories.npz", states=states[:, :256].astype(np.float32), times=times)
        return
    from sklearn.datasets import load_digits

    digits = load_digits().images[rng.permutation(1797)[:64]][:, None] / 16
    np.savez(cell.directory / "samples.npz", x=(digits * 255).astype(np.uint8))
    if cell.kind == "fit":
        times = np.linspace(0, 1, 17)[:, None, None, None, None]
        states = (1 - times) * rng.normal(size=(64, 1, 8, 8)) + times * (2 * digits - 1)
        np.savez(cell.directory / "trajectories.npz", states=states[:, :16].astype(np.float32), times=times.ravel())
