"""How this process was started, and its rank among several.

Launchers set environment variables, which everything that a process starts inherits, and which SLURM sets in
the script of a job too, where one process runs for all tasks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

__all__ = ["is_first_process", "local_rank", "number_of_tasks", "process_rank", "started_by_srun", "without_launcher"]

# Variables by which torchrun and Lightning's launchers describe the group of a process.
_VARIABLES = ("LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
# SLURM and IBM's jsrun; their children are no tasks of theirs.
_PREFIXES = ("SLURM_", "JSM_")


def started_by_srun() -> bool:
    """Whether this process is a task that ``srun`` started, one of :func:`number_of_tasks`.

    The script of a job (``sbatch``) and an interactive shell see the job's variables, but not those of a step.
    """
    return "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ and not _is_interactive()


def number_of_tasks() -> int:
    """Tasks of the step of ``srun`` that this process belongs to; 1 where it belongs to none."""
    return int(os.environ.get("SLURM_NTASKS", "1")) if started_by_srun() else 1


def process_rank() -> int:
    """0 for the first process of a run over all machines, above 0 for the others."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", *(("SLURM_PROCID",) if started_by_srun() else ()))
    return max(int(os.environ.get(name) or "0") for name in names)


def is_first_process() -> bool:
    """Whether this process speaks for its run: the first of those that a launcher started, or the only one."""
    return process_rank() == 0


def local_rank() -> int:
    """Number of this process among those of its machine, from 0."""
    given = os.environ.get("LOCAL_RANK") or (os.environ.get("SLURM_LOCALID") if started_by_srun() else None)
    return int(given or "0")


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that is started beside a run: it is no member of the run's group.

    With the launcher's variables it would wait for processes that do not exist.
    """
    return {
        name: value for name, value in environment.items() if name not in _VARIABLES and not name.startswith(_PREFIXES)
    }


def _is_interactive() -> bool:
    """Whether ``srun`` only opened a shell; Lightning asks for the same names."""
    return os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
