"""The faster of several ways to compute the same, chosen by measurement on this machine, for each shape.

Which library multiplies faster depends on the processor, the shape and the number of threads: on AMD's AVX-512
processors oneDNN reaches twice the rate of MKL for large float32 products, on Intel's it is the other way round, and
with AVX2 both are alike but for narrow matrices. So each shape is measured once, the first time that it is met.

Ways differ in the last bits, so a choice must not change under a run. What was found is kept in the cache under the
machine's identity: later processes, and a run that is resumed, compute the same way and so the same numbers. Of several
processes that measure at once the first to write decides for all. Where the cache cannot be written each process
measures for itself; a gain below a tenth decides nothing, so that it finds the same but for shapes near that line.

``FLOWBENCH_KERNELS`` overrides the choice: ``plain`` takes PyTorch's own way everywhere, so that no number depends on a
measurement, ``onednn`` takes oneDNN's wherever there is one, ``auto`` (the default) measures.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

from flowbench.core.places import cache_dir, locked
from flowbench.core.storage import write_text

__all__ = [
    "ONEDNN",
    "PLAIN",
    "Kernels",
    "Shape",
    "Way",
    "fastest",
    "is_clearly_faster",
    "kernel_summary",
    "machine_identity",
    "rounded_up",
    "seconds_of",
]

PLAIN = "plain"
"""PyTorch's own way: it is taken wherever nothing is measured, and where another one is not clearly faster."""

ONEDNN = "onednn"
AUTO = "auto"

Shape = tuple[int, ...]
Way = Callable[[], object]
Seconds = Mapping[str, Sequence[float]]

# Share of the plain way's time that another one must stay below, in three of four pairs of calls one after the other:
# the noise between repeats decides nothing. Processors change their rate within milliseconds, so pairs are compared and
# not the fastest calls.
_CLEARLY_FASTER, _PAIRS = 0.9, 0.75
_MIN_REPEATS, _MAX_REPEATS, _MEASURED_SECONDS = 5, 50, 0.03
# What changes the kernels of a process; they are part of the machine's identity.
_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


@cache
def machine_identity() -> dict[str, str]:
    """Conditions besides the shape on which a kernel's speed depends: processor, libraries and their limits."""
    found = {
        "processor": _processor(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    return found | {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def rounded_up(count: int) -> int:
    """The next power of two: shapes that differ by less are measured as one."""
    return 1 << max(0, count - 1).bit_length()


class Kernels:
    """Measurements of this machine.

    Args:
        folder: where it is kept; None keeps it in the process.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / f"{_digest(machine_identity())}.json"
        self._lock = threading.Lock()
        self._kept: dict[str, str] | None = None
        self._used: dict[tuple[str, Shape, int], str] = {}

    def fastest(self, operation: str, shape: Shape, ways: Callable[[], Mapping[str, Way]]) -> str:
        """The name of the way to take.

        Args:
            operation: what is computed.
            shape: of its operands.
            ways: makes the alternatives on operands of that shape, :data:`PLAIN` among them; called only to measure,
                in a thread of its own.

        Returns:
            A name among those of `ways`.
        """
        asked = (operation, shape, torch.get_num_threads())
        name = self._used.get(asked)  # looked up for each product of each step
        if name is None:
            with self._lock:
                # Another thread may have found it while this one waited.
                name = self._used.get(asked) or self._find(asked, ways)
                self._used[asked] = name
        return name

    def summary(self) -> str:
        """Number of shapes of this process by kernel, e.g. ``onednn 4, plain 9``."""
        counts = Counter(self._used.copy().values())
        return ", ".join(f"{name} {counts[name]}" for name in sorted(counts))

    def free(self) -> None:
        """Let go of what a thread held that a forked process does not have."""
        self._lock = threading.Lock()

    def _find(self, asked: tuple[str, Shape, int], ways: Callable[[], Mapping[str, Way]]) -> str:
        operation, shape, threads = asked
        key = f"{operation} {'x'.join(map(str, shape))} threads={threads}"
        if self._kept is None:
            self._kept = {kept: str(entry["way"]) for kept, entry in self._content().items()}
        if key in self._kept:
            return self._kept[key]
        seconds = _measured(ways, threads)
        if seconds is None:
            return PLAIN
        best = min(seconds, key=lambda name: median(seconds[name]), default=PLAIN)
        if best != PLAIN and not is_clearly_faster(seconds[best], seconds[PLAIN]):
            best = PLAIN
        return self._keep(key, best, seconds)

    def _keep(self, key: str, name: str, seconds: Seconds) -> str:
        """Write the choice down; another process that was faster has decided for both."""
        if self._path is None:
            return name
        try:
            with locked(self._path):
                content = self._content()
                measured = {f"{way}_us": round(1e6 * median(s), 2) for way, s in seconds.items()}
                entry = content.setdefault(key, {"way": name, **measured})
                write_text(self._path, json.dumps({"machine": machine_identity(), "choices": content}, indent=1) + "\n")
                return str(entry["way"])
        except (OSError, ValueError, NotImplementedError):  # a cache that cannot be written, or locked
            return name

    def _content(self) -> dict[str, dict[str, Any]]:
        if self._path is None:
            return {}
        try:
            choices = json.loads(self._path.read_text(encoding="utf-8"))["choices"]
            return {str(key): dict(entry) for key, entry in choices.items() if "way" in entry}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


_kernels: Kernels | None = None


def fastest(operation: str, shape: Shape, ways: Callable[[], Mapping[str, Way]]) -> str:
    """The way to compute an operation of a shape on this machine; see :meth:`Kernels.fastest`.

    Raises:
        ValueError: for an unknown way in ``FLOWBENCH_KERNELS``.
    """
    return override() or _of_this_machine().fastest(operation, shape, ways)


def kernel_summary() -> str:
    """The kernels that this process chose, for the provenance of its numbers; empty without a choice."""
    return override() or (_kernels.summary() if _kernels is not None else "")


@cache
def override() -> str | None:
    """The way that the user chose; None leaves it to the measurement.

    Raises:
        ValueError: for an unknown way.
    """
    asked = os.environ.get("FLOWBENCH_KERNELS") or AUTO
    if asked not in (AUTO, PLAIN, ONEDNN):
        raise ValueError(f"FLOWBENCH_KERNELS is {asked!r}: take {AUTO}, {PLAIN} or {ONEDNN}")
    return None if asked == AUTO else asked


def seconds_of(ways: Mapping[str, Way], threads: int) -> Seconds:
    """Times of a few calls of each way, taken in turns, without gradients.

    Args:
        ways: by name.
        threads: of a call. A single thread is timed by its own processor time, which other work on the machine
            stretches less than the wall's.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for way in ways.values():
            way()
        began = time.perf_counter()
        for repeat in range(_MAX_REPEATS):
            if repeat >= _MIN_REPEATS and time.perf_counter() - began > _MEASURED_SECONDS:
                break
            for name, way in ways.items():
                start = clock()
                way()
                found[name].append(clock() - start)
    return found


def is_clearly_faster(times: Sequence[float], plain: Sequence[float]) -> bool:
    """Whether a way gains more than a tenth over the plain one in three quarters of the pairs of calls."""
    ratios = sorted(a / max(b, 1e-9) for a, b in zip(times, plain, strict=True))
    return ratios[int(_PAIRS * (len(ratios) - 1))] < _CLEARLY_FASTER


def _measured(ways: Callable[[], Mapping[str, Way]], threads: int) -> Seconds | None:
    """Seconds of each way; empty where there is one only, None where there is no memory for a second set of operands.

    A thread of its own has no modes of its caller: no gradients, nothing that counts operations, no other device.
    """
    seconds: Seconds | None = None

    def measure() -> None:
        nonlocal seconds
        if torch.get_num_threads() != threads:  # a new thread may have more than its caller
            torch.set_num_threads(threads)
        with contextlib.suppress(MemoryError, RuntimeError):
            alternatives = ways()
            seconds = seconds_of(alternatives, threads) if len(alternatives) > 1 else {}

    worker = threading.Thread(target=measure)
    worker.start()
    worker.join()
    return seconds


def _of_this_machine() -> Kernels:
    global _kernels
    if _kernels is None:
        _kernels = Kernels(cache_dir() / "kernels")
    return _kernels


def _free_in_child() -> None:
    if _kernels is not None:
        _kernels.free()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_in_child)


def _digest(identity: Mapping[str, str]) -> str:
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()


def _processor() -> str:
    """Name and instruction sets of the processor: clouds name different ones alike."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    first = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    wide = sorted(flag for flag in first.get("flags", "").split() if flag.startswith(("avx", "amx")))
    name = first.get("model name", platform.machine())
    return f"{name} family {first.get('cpu family', '')} model {first.get('model', '')}: {' '.join(wide)}"
