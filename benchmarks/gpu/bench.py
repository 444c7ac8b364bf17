"""A whole bench through the command line: CIFAR-10, four families, two minutes each, FID at 10,000."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu.setting import Line, Setting
from benchmarks.gpu.subjects import pictures
from flowbench.bench.results import Results, collect, load_plan
from flowbench.bench.statistics import summarise
from flowbench.bench.status import read_progress

__all__ = ["BENCH", "measure"]

BENCH = Path(__file__).resolve().parents[2] / "experiments" / "families_cifar10_minutes.yaml"
# Cells at a time: the four families and the reference rows, which take the processor.
JOBS = 5
# Seconds left for the table when the bench has to be stopped.
RESERVE = 20.0
COSTS = ("train_seconds", "step_milliseconds", "samples_per_second", "peak_memory")
FAMILIES = tuple(yaml.safe_load(BENCH.read_text(encoding="utf-8"))["contenders"])
# A dry run keeps every class and shrinks every number; the distance is that of pixels, which needs no download.
TINY = [
    "budget={steps: 1}",
    f"claims={[f'{name}.fd[identity] < gaussian.fd[identity]' for name in FAMILIES]}",
    "problems.cifar10.overrides.evaluator.num_samples=8",
    "problems.cifar10.overrides.evaluator.metrics={fid: {init_args: {features: identity, num_reference: 8}}}",
    "problems.cifar10.overrides.data.batch_size=4",
    "problems.cifar10.overrides.data.random_flip=false",
    "problems.cifar10.overrides.data.train_on_val=false",
    "problems.cifar10.overrides.data.dataset=npz",
    "problems.cifar10.overrides.trainer.accelerator=cpu",
    "contenders.tarflow.overrides.model.init_args={layers: [1, 1], width: 64}",
    *(
        f"contenders.{name}.overrides.model.init_args.network.init_args.{size}"
        for name in FAMILIES
        if name != "tarflow"
        for size in ("channels=8", "num_res_blocks=1", "num_heads=1")
    ),
]


def measure(setting: Setting) -> Iterator[Line]:
    """Run the bench, all families at once on the card, and give its table, also of one that had to be stopped."""
    directory = setting.folder / "run"
    overrides = [f"run_dir={directory}"]
    if setting.tiny:
        overrides += [*TINY, f"problems.cifar10.overrides.data.path={pictures(setting, side=16)}"]
    ended = _run(overrides, setting.seconds - RESERVE)
    plan = load_plan(directory)
    ((kind, amount),) = plan["budget"].items()
    note = f"{ended}; four families and the reference rows share the card; {kind} {amount:g} each, one seed"
    size = setting.choose("10,000", "8")
    value = "fid" if ended == "exit status 0" else "FAILED"
    yield Line(f"CIFAR-10, FID at N = {size} against {size} training images", value, note=note)
    yield from _table(plan, directory, "fd[identity]" if setting.tiny else "fid")


def _run(overrides: list[str], seconds: float) -> str:
    """Run the bench, or stop it in good time; how it ended."""
    command = [sys.executable, "-m", "flowbench.cli", "bench", "-c", str(BENCH), "--jobs", str(JOBS), *overrides]
    process = subprocess.Popen(command)
    try:
        return f"exit status {process.wait(None if math.isinf(seconds) else seconds)}"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # which ends its cells, too
        process.wait()
        return f"stopped after {seconds:.0f} s"


def _table(plan: Mapping[str, Any], directory: Path, metric: str) -> Iterator[Line]:
    """A line for every family and every reference row that has ended, beside the Gaussian of the pixels."""
    (problem,) = plan["problems"]
    results = Results(collect(directory))
    gaussian = results.values(problem, "gaussian", metric)
    for cell in plan["cells"]:
        if (name := cell["contender"]) in plan["contenders"]:
            note = "; ".join([_reached(read_progress(directory / cell["directory"])), *_costs(results, problem, name)])
            yield _beside(name, results.values(problem, name, metric), gaussian, note)
    for name in results.references(problem):
        yield _beside(name, results.values(problem, name, metric), gaussian, "reference row")


def _beside(name: str, values: Mapping[int, float], gaussian: Mapping[int, float], note: str) -> Line:
    """A distance, and its share of the Gaussian's."""
    own, other = _mean(values), _mean(gaussian)
    ratio = f"{own / other:.2f}" if own is not None and other else ""
    return Line(name, _shown(own), f"Gaussian {_shown(other)}", ratio, note)


def _reached(progress: Mapping[str, Any]) -> str:
    return f"{progress.get('step', 0)} steps, {progress.get('samples_seen', 0):,} images seen"


def _costs(results: Results, problem: str, name: str) -> list[str]:
    found = {metric: _mean(results.values(problem, name, metric)) for metric in COSTS}
    return [f"{metric} {_shown(value)}" for metric, value in found.items() if value is not None]


def _mean(values: Mapping[int, float]) -> float | None:
    return summarise(list(values.values())).mean if values else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
