"""A process inside a SLURM job is one of several only where ``srun`` started it as such."""

from __future__ import annotations

import os

import pytest
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from flowbench.commands.lightning_trainer import make_trainer
from flowbench.core.launch import local_rank, number_of_tasks, process_rank, started_by_srun, without_launcher

# As in the script of `sbatch --ntasks=2`, which runs once.
JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
# What `srun` adds for its second task.
STEP = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
ARGUMENTS = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def inside(monkeypatch):
    def enter(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return enter


@pytest.mark.parametrize("job", [{"SLURM_NTASKS": "2"}, JOB, {**JOB, "SLURM_JOB_NAME": "bash", "SLURM_STEP_ID": "0"}])
def test_one_process_in_a_job_trains_alone(job, inside) -> None:
    inside(job)
    trainer = make_trainer([], devices=1, **ARGUMENTS)
    assert trainer.world_size == 1
    assert isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment)
    assert (process_rank(), local_rank(), number_of_tasks(), started_by_srun()) == (0, 0, 1, False)


def test_tasks_of_srun_belong_together(inside) -> None:
    inside(STEP)
    trainer = make_trainer([], devices=2, strategy="ddp", **ARGUMENTS)
    assert isinstance(trainer._accelerator_connector.cluster_environment, SLURMEnvironment)
    assert (trainer.world_size, trainer.global_rank) == (2, 1)
    assert (process_rank(), local_rank(), number_of_tasks(), started_by_srun()) == (1, 1, 2, True)


def test_another_number_of_tasks_than_processes_is_one_line(inside) -> None:
    inside({name: value for name, value in STEP.items() if name not in ("SLURM_NTASKS_PER_NODE", "SLURM_NNODES")})
    with pytest.raises(ValueError, match=r"^trainer: You set `--ntasks=2`.*Use `--ntasks-per-node=2` instead"):
        make_trainer([], devices=1, **ARGUMENTS)
    inside({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    with pytest.raises(ValueError, match=r"^srun started 1 tasks, but .* make 2 processes"):
        make_trainer([], devices=2, strategy="ddp", **ARGUMENTS)
    inside(STEP)
    with pytest.raises(ValueError, match=r"^srun started 2 tasks, but .* make 1 processes"):
        make_trainer([], devices=1, **ARGUMENTS)


def test_a_named_environment_decides_for_itself(inside) -> None:
    inside(JOB)
    trainer = make_trainer([SLURMEnvironment()], devices=2, strategy="ddp", **ARGUMENTS)
    assert isinstance(trainer._accelerator_connector.cluster_environment, SLURMEnvironment)


def test_what_lightning_refuses_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^trainer: .*gradient_clip_algorithm.* invalid"):
        make_trainer([], gradient_clip_algorithm="most", **ARGUMENTS)


def test_processes_started_beside_a_run_are_no_members_of_it() -> None:
    environment = {**STEP, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "PATH": "/bin", "OMP_NUM_THREADS": "1"}
    assert without_launcher(environment) == {"PATH": "/bin", "OMP_NUM_THREADS": "1"}
