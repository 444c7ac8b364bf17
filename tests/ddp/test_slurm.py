"""Two tasks that ``srun`` started train together, through the real command line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from processes import HERE, TARFLOW, Workplace

pytestmark = pytest.mark.slow


def test_two_tasks_of_srun_train_and_measure_as_two_processes_do(workplace: Workplace) -> None:
    path = workplace.write("slurm", TARFLOW)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE),
    }  # fmt: skip
    command = [sys.executable, "-m", "flowbench.cli", "fit", "-c", str(path), "--test"]
    command += [f"run.dir={workplace.folder / 'slurm-2'}", "trainer.devices=2", "trainer.strategy=ddp"]
    tasks = [
        subprocess.Popen(
            command,
            cwd=workplace.folder,
            env={**os.environ, **shared, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [task.communicate(timeout=300) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert outputs[1][0] == ""  # the first task alone prints the folder and its rows
    rows = workplace.rows("slurm-2")
    assert {row["provenance"]["world_size"] for row in rows} == {2}
    assert next(row["value"] for row in rows if row["metric"] == "samples_seen") == 6 * 32
