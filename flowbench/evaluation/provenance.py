"""Where a number comes from: code, configuration, versions and hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from flowbench.core.kernels import kernel_summary
from flowbench.evaluation.product_rate import product_rate
from flowbench.evaluation.subject import Cost
from flowbench.families import FlowModule
from flowbench.training import Budget

__all__ = ["cost_of", "environment", "git_revision", "peak_memory_mb"]

PACKAGES = ("flowbench", "torch", "lightning", "torchmetrics", "torchdiffeq", "pot", "numpy", "scikit-learn")


@cache
def git_revision() -> str:
    """Commit of the code, with `+dirty` when tracked files differ; `unknown` outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=here, capture_output=True, check=True, timeout=10)
        return done.stdout.decode("utf-8", "replace").strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def environment() -> dict[str, Any]:
    """Versions and hardware of this process, as plain values."""
    hardware = f"{_processor()}, {_cores()} cores"
    if torch.cuda.is_available():
        hardware += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return {
        "git_sha": git_revision(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "hardware": hardware,
        "platform": platform.platform(terse=True),
        "threads": torch.get_num_threads(),
        "concurrent_cells": int(os.environ.get("FLOWBENCH_JOBS", "1")),
        "kernels": kernel_summary(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
    }


def peak_memory_mb(device: torch.device) -> float:
    """Highest memory so far in MiB: allocated on the GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return peak / 2**20 if platform.system() == "Darwin" else peak / 2**10


def cost_of(flow: FlowModule, budget: Budget | None, rate: float | None, world_size: int = 1) -> Cost:
    """What a flow cost.

    Args:
        flow: the flow.
        budget: what its training spent; None where it was not metered.
        rate: samples per second; None where none were drawn.
        world_size: number of processes.
    """
    return Cost(
        parameters=sum(p.numel() for p in flow.parameters() if p.requires_grad),
        train_seconds=budget.train_seconds if budget else 0.0,
        train_flops=budget.train_flops if budget else 0.0,
        samples_seen=budget.samples_seen if budget else 0,
        peak_memory_mb=peak_memory_mb(flow.device),
        samples_per_second=rate,
        steps=budget.steps if budget else 0,
        product_rate=world_size * product_rate(flow.device) if budget and budget.steps else None,
        optimizer_state_bytes=4 * flow.optimizer_config.num_moments(flow),
        validation=max(flow.validation_losses.items(), default=None),
    )
