from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from flowbench.commands.bench import run_bench
from flowbench.core.rows import Row

from .goals import declared

PROGRAM = (sys.executable, str(Path(__file__).with_name("fake_cell.py")))
SERVER = (sys.executable, str(Path(__file__).with_name("fake_server.py")))


def start_bench(path: Path, jobs: int = 1, server: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Run a bench of fake cells in a process of its own."""
    code = (
        "import sys; from flowbench.commands.bench import run_bench; "
        f"sys.exit(run_bench({str(path)!r}, jobs={jobs}, program={PROGRAM!r}, server={tuple(server)!r}))"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(condition: Callable[[], object], seconds: float = 15.0) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class Workshop:
    """A folder with experiment files, a bench file and the fake program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls_file = folder / "calls.txt"
        self.runs = folder / "runs"
        self.output = ""

    def experiment(self, name: str, **fake: Any) -> str:
        content = {"data": {"dataset": "fake-data"}, "trainer": {"accelerator": "cpu"}, "fake": fake}
        OmegaConf.save(OmegaConf.create(content), self.folder / f"{name}.yaml")
        return f"{name}.yaml"

    def real_experiment(self, name: str, **init_args: Any) -> str:
        """One that the true program would take."""
        network = {"class_path": "flowbench.networks.MLP", "init_args": {"width": 4}}
        model = {"class_path": "flowbench.families.FlowMatching", "init_args": {"network": network, **init_args}}
        evaluator = {"metrics": {"w2": {"class_path": "flowbench.evaluation.Wasserstein2"}}}
        content = {"data": {"dataset": "moons"}, "trainer": {"accelerator": "cpu"}, "evaluator": evaluator}
        OmegaConf.save(OmegaConf.create({**content, "model": model}), self.folder / f"{name}.yaml")
        return f"{name}.yaml"

    def bench(self, **content: Any) -> Path:
        path = self.folder / "mini.yaml"
        OmegaConf.save(OmegaConf.create({"budget": {"steps": 3}, "seeds": [0, 1], **content}), path)
        return path

    def run(self, path: Path, *overrides: str, **options: Any) -> int:
        console = Console(file=io.StringIO(), width=150)
        try:
            return run_bench(path, overrides, program=PROGRAM, console=console, **options)
        finally:
            self.output = console.file.getvalue()

    def calls(self) -> list[str]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return lines

    def cell(self, contender: str, seed: int) -> Path:
        return self.runs / "mini" / "cells" / contender / f"seed-{seed}"


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    shop = Workshop(tmp_path)
    monkeypatch.setenv("FAKE_CALLS", str(shop.calls_file))
    monkeypatch.setenv("FLOWBENCH_RUNS", str(shop.runs))
    return shop


@pytest.fixture
def make_row() -> Callable[..., Row]:
    def make(contender: str = "cfm", metric: str = "nll", value: float | None = 1.0, **fields: Any) -> Row:
        defaults: dict[str, Any] = {
            "bench": "mini",
            "problem": "",
            **declared(metric),
            "family": "FlowMatching",
            "dataset": "digits",
            "seed": 0,
            "n": 360,
            "protocol": "exact/test/360",
            "unit": "",
            "network_evaluations": 32.0,
            "weights": "ema",
        }
        return Row(contender=contender, metric=metric, value=value, **{**defaults, **fields})

    return make
