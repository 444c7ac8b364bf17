"""What the sections of the GPU run share: where and how large they measure, how they time, what they report."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Line", "Setting", "interleaved", "median_ratio", "milliseconds"]


@dataclass(frozen=True)
class Line:
    """One line of the table: what was measured, the value, a peer of the same run, and what to know about it."""

    what: str
    value: str
    peer: str = ""
    ratio: str = ""
    note: str = ""

    def to_dict(self) -> dict[str, str]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Setting:
    """Where a section measures.

    Attributes:
        device: the accelerator, or the CPU in a dry run.
        tiny: sizes that a CPU computes in seconds; the figures then say nothing.
        reference: checkout of apple/ml-tarflow, or None.
        folder: for files of the section; it is kept.
        seconds: after which the section is ended from outside.
    """

    device: torch.device
    tiny: bool
    reference: Path | None
    folder: Path
    seconds: float = math.inf

    def choose(self, full: Any, tiny: Any) -> Any:
        """One of two sizes."""
        return tiny if self.tiny else full

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def interleaved(
    setting: Setting, runs: Mapping[str, Callable[[], object]], rounds: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of each call, taken in turns, so that a drifting machine treats them alike.

    A run that returns a float has timed itself.

    Args:
        setting: whose device is waited for.
        runs: what is timed, by name.
        rounds: calls of each.
        warm_up: make one more call of each before them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(0 if warm_up else 1, rounds + 1):
        for name, run in runs.items():
            setting.synchronize()
            start = time.perf_counter()
            own = run()
            setting.synchronize()
            if turn:
                seconds[name].append(own if isinstance(own, float) else time.perf_counter() - start)
    return seconds


def median_ratio(top: list[float], bottom: list[float]) -> str:
    """``median (lowest to highest)`` of the ratios round by round."""
    ratios = [a / b for a, b in zip(top, bottom, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def milliseconds(seconds: list[float], calls: int = 1) -> str:
    """The median as milliseconds a call."""
    return f"{1e3 * statistics.median(seconds) / calls:.3g} ms"
