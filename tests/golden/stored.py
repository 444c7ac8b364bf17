"""The stored numbers: what they are, and how far another make of processor may be from them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["DEVICES", "FIXED", "Numbers", "compute", "deviations", "file_of", "load", "names_of", "save"]

DEVICES = ("cpu", "cuda")
"""Kinds of device that may have stored numbers."""
FIXED = {"OMP_NUM_THREADS": "1", "FLOWBENCH_KERNELS": "plain"}
"""One thread and PyTorch's own kernels: with both the numbers are a function of the code and the processor."""

Numbers = dict[str, list[float | None]]
"""Name of a loss curve or of a row -> its values; None is a row without a number."""

_MARGIN = 10.0
# What instruction sets, or models of GPU, that the storing machine lacks may add.
_LEAST_RELATIVE = {"cpu": 2e-5, "cuda": 1e-3}
# Shares of samples jump by one of them where a distance crosses another.
_COUNTED = re.compile(r"metric=(precision|recall|density|coverage)\[.* n=(\d+) ")
_COUNTS = 2


def file_of(device: str) -> Path:
    """Where the numbers of a kind of device are stored; it need not exist."""
    return Path(__file__).with_name(f"numbers-{device}.json")


def compute(folder: Path, environment: Mapping[str, str], device: str = "cpu") -> Numbers:
    """Compute all numbers in a process of its own, whose environment is complete."""
    output = folder / "numbers.json"
    command = [sys.executable, "-m", "tests.golden", "compute", str(output), "--device", device]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env={**environment, **FIXED},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the golden runs ended with status {done.returncode}:\n{done.stdout[-4000:]}")
    return dict(json.loads(output.read_text(encoding="utf-8")))


def names_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for every row, from all that tells it from the others."""
    return [" ".join(f"{key}={value}" for key, value in row.items() if key != "value") for row in rows]


def load(device: str = "cpu") -> tuple[Numbers, dict[str, list[float]]]:
    """The stored numbers of a kind of device and the largest deviation allowed for each."""
    stored = json.loads(file_of(device).read_text(encoding="utf-8"))
    return (
        {name: entry["values"] for name, entry in stored.items()},
        {name: entry["tolerances"] for name, entry in stored.items()},
    )


def save(numbers: Numbers, others: Sequence[Numbers], device: str) -> None:
    """Store numbers; the tolerance is ten times the largest deviation of the other instruction sets or runs."""
    stored = {}
    for name, values in sorted(numbers.items()):
        counted = _COUNTED.search(name)
        tolerances = [_COUNTS / int(counted.group(2)) if counted else 0.0]
        for i, value in enumerate(values):
            found = [abs(other[name][i] - value) for other in others] if value is not None else [0.0]
            # Of a curve each step inherits the deviations of the steps before.
            tolerances.append(
                max(_MARGIN * max(found, default=0.0), _LEAST_RELATIVE[device] * abs(value or 0.0), tolerances[-1])
            )
        tolerances = tolerances[1:]
        stored[name] = {"values": values, "tolerances": [float(f"{tolerance:.2g}") for tolerance in tolerances]}
    file_of(device).write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def deviations(found: Numbers, exactly: bool, device: str = "cpu") -> list[str]:
    """One line for each number that is not the stored one, worst first."""
    values, tolerances = load(device)
    lines = [f"{name}: is not stored" for name in sorted(found.keys() - values.keys())]
    lines += [f"{name}: is missing" for name in sorted(values.keys() - found.keys())]
    worst: list[tuple[float, str]] = []
    for name in sorted(values.keys() & found.keys()):
        if len(found[name]) != len(values[name]):
            lines.append(f"{name}: {len(found[name])} numbers, stored are {len(values[name])}")
            continue
        for step, (new, old, tolerance) in enumerate(zip(found[name], values[name], tolerances[name], strict=True)):
            if new == old:
                continue
            if new is None or old is None:
                worst.append((float("inf"), f"{name}[{step}]: {new}, stored is {old}"))
            elif exactly or not abs(new - old) <= tolerance:
                worst.append((abs(new - old) / max(tolerance, 1e-300), f"{name}[{step}]: {new}, stored is {old}"))
    return lines + [line for _, line in sorted(worst, reverse=True)]
