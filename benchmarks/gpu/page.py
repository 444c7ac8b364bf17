"""The page that `make gpu` writes."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import torch

from benchmarks.gpu.setting import Line

__all__ = ["document"]

PACKAGES = ("torch", "lightning", "flowbench")


def document(
    device: str, size: str, sections: Mapping[str, Sequence[Line]], seconds: Mapping[str, float], total: float
) -> str:
    """The Markdown page.

    Args:
        device: `cuda` or `cpu`.
        size: `full` or `tiny`.
        sections: lines by section.
        seconds: how long each section took.
        total: seconds of the whole so far.
    """
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    lines = [
        "# What a GPU shows",
        "",
        f"`make gpu`, {time.strftime('%Y-%m-%d')}, size {size}. {_hardware(device)}. Python "
        f"{platform.python_version()}, {versions}. {total:.0f} s in all.",
        "",
        "| what | here | peer in the same run | here / peer | note |",
        "|:---|---:|---:|---:|:---|",
    ]
    for name, found in sections.items():
        lines.append(f"| **{name}** ({seconds[name]:.0f} s) | | | | |")
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in line.to_dict().values())} |" for line in found]
    return "\n".join(lines) + "\n"


def _hardware(device: str) -> str:
    if device == "cpu":
        return f"CPU: {platform.processor() or platform.machine()} (a dry run: the figures say nothing)"
    card = torch.cuda.get_device_properties(0)
    return f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}; {os.cpu_count()} CPU cores"
