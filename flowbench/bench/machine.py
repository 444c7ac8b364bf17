"""Number of cells that run at once, and threads of each.

Two intra-op threads on a busy two-core machine ran 4 to 10 times slower than one (OpenMP threads spin while
they wait for each other), so the number of threads is a policy of the bench and never left to the default of
a library.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from flowbench.core.checks import check_count

__all__ = ["Policy", "available_cores", "choose_policy", "memory_limit"]


@dataclass(frozen=True)
class Policy:
    """Concurrency of a bench: ``jobs`` cells at once, ``threads`` threads each, on ``cores`` cores.

    Example:
        >>> Policy(cores=8, jobs=4, threads=2, reason="one for each two cores").describe()
        '4 at a time, 2 threads each (one for each two cores)'
    """

    cores: int
    jobs: int
    threads: int
    reason: str

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of every cell."""
        count = str(self.threads)
        return {
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "OPENBLAS_NUM_THREADS": count,
            "FLOWBENCH_THREADS": count,
            "FLOWBENCH_JOBS": str(self.jobs),
            "OMP_WAIT_POLICY": "PASSIVE",
            "KMP_BLOCKTIME": "0",
            "PYTHONUNBUFFERED": "1",
        }

    def describe(self) -> str:
        """One line for the plan and the report."""
        return f"{self.jobs} at a time, {self.threads} thread{'s' * (self.threads > 1)} each ({self.reason})"


def available_cores() -> int:
    """Cores this process may use: the CPU affinity, limited by the quota of the control group."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    quota = _cgroup_quota()
    return max(1, min(cores, math.floor(quota))) if quota is not None else cores


def choose_policy(jobs: int | str, num_cells: int, *, cpu_only: bool) -> Policy:
    """Choose how many cells run at once, and their threads: the cores' share of each, at most OMP_NUM_THREADS.

    Args:
        jobs: a number, or ``"auto"``: one cell per core on the CPU, one at a time where the cells use a GPU.
        num_cells: cells in the plan; more jobs than cells would leave cores idle.
        cpu_only: whether every cell has ``trainer.accelerator: cpu``.

    Raises:
        ValueError: when jobs is neither ``"auto"`` nor a positive number.
    """
    cores = available_cores()
    if jobs == "auto":
        shared_gpu = not cpu_only and _has_gpu()
        number = 1 if shared_gpu else max(1, min(cores, num_cells))
        kind = "a GPU is shared by one cell at a time" if shared_gpu else "auto"
    elif not isinstance(jobs, str):
        check_count("jobs", jobs, hint="or auto")
        number, kind = jobs, "asked for"
    else:
        raise ValueError(f"jobs is {jobs!r}; give a positive number or auto")
    threads, reason = max(1, cores // number), f"{cores} core{'s' * (cores > 1)}, {kind}"
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and 0 < int(limit) < threads:
        threads, reason = int(limit), f"{reason}, OMP_NUM_THREADS"
    return Policy(cores, number, threads, reason)


def _has_gpu() -> bool:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return hidden not in ("", "-1") and any(Path("/dev").glob("nvidia[0-9]*"))


def _cgroup_quota() -> float | None:
    """CPU quota in cores of control group v2 or v1, None where there is no limit."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        folder = Path("/sys/fs/cgroup/cpu")
        limit_us = int((folder / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        return limit_us / int((folder / "cpu.cfs_period_us").read_text(encoding="utf-8")) if limit_us > 0 else None
    except (OSError, ValueError):
        return None


def memory_limit() -> int | None:
    """Bytes that the processes here may use together: the control group's limit or the machine's memory, the smaller.

    None where neither is known.
    """
    found = [_group_memory(), _machine_memory()]
    return min((size for size in found if size), default=None)


def _group_memory() -> int | None:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # control groups v2 and v1
        try:
            text = (Path("/sys/fs/cgroup") / name).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if text.isdigit():
            return int(text)
    return None


def _machine_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None
