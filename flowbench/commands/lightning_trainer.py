"""Lightning's Trainer as this process was started: alone, by a launcher, or as a task of SLURM."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException

from flowbench.core.launch import number_of_tasks, started_by_srun

__all__ = ["listed", "make_trainer"]


def make_trainer(plugins: Any = None, **arguments: Any) -> L.Trainer:
    """A trainer, or one line about what Lightning refuses.

    In the script of a SLURM job, or a shell inside one, Lightning would take this process for one of the job's tasks
    and wait for the others; the trainer is for one process there. Only tasks that ``srun`` started belong together.

    Args:
        plugins: one, several or None; a cluster environment among them decides for itself.
        arguments: the others.

    Raises:
        ValueError: for what Lightning refuses, or where ``srun`` started another number of tasks than the trainer has
            processes.
    """
    plugins = listed(plugins)
    chosen = any(isinstance(plugin, ClusterEnvironment) for plugin in plugins)
    if not chosen and "SLURM_NTASKS" in os.environ and not (started_by_srun() or TorchElasticEnvironment.detect()):
        plugins = [*plugins, LightningEnvironment()]
    try:
        trainer = L.Trainer(plugins=plugins, **arguments)
    except (MisconfigurationException, RuntimeError, TypeError) as error:
        raise ValueError(f"trainer: {' '.join(str(error).split())}") from error
    if not chosen and not TorchElasticEnvironment.detect():
        _check_tasks(trainer)
    return trainer


def listed(value: Any) -> list[Any]:
    """Arguments that may be one, several or None, as a new list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _check_tasks(trainer: L.Trainer) -> None:
    tasks, processes = number_of_tasks(), trainer.num_devices * trainer.num_nodes
    if started_by_srun() and tasks != processes:
        raise ValueError(
            f"srun started {tasks} tasks, but trainer.devices and trainer.num_nodes make {processes} processes: set "
            f"trainer.devices to the tasks of a node, or start {processes} with srun --ntasks-per-node"
        )
