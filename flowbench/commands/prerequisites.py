"""Required experiments: trained once per machine, each in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from flowbench.config import Experiment, to_yaml
from flowbench.core.cache import ensure
from flowbench.core.endings import ProcessEnded
from flowbench.core.launch import without_launcher
from flowbench.core.places import cached
from flowbench.core.processes import exit_status, how_it_ended, run_child
from flowbench.core.storage import read_record, write_text
from flowbench.training.progress import is_trained

__all__ = ["required_checkpoints", "required_flops"]


def required_checkpoints(experiment: Experiment) -> dict[str, Path]:
    """Checkpoints of what an experiment requires, to any depth: trained models are built with what they required.

    Returns:
        Files by name; ``teacher.autoencoder`` is what the teacher requires.

    Raises:
        ValueError: an experiment of them is wrong.
        ProcessEnded: the training of one ended before it was finished; the same command goes on with it.
    """
    found: dict[str, Path] = {}
    for name, needed in experiment.requirements.items():
        found[name] = _required(name, needed)
        found |= {f"{name}.{inner}": path for inner, path in required_checkpoints(needed).items()}
    return found


def required_flops(checkpoints: Mapping[str, Path]) -> float | None:
    """Operations of the trainings of what an experiment requires; what is required twice is trained once.

    Args:
        checkpoints: as :func:`required_checkpoints` returns them.

    Returns:
        Their sum; None where nothing is required, or where one of them was trained by a version that did not note it.
    """
    folders = {path.parent.parent for path in checkpoints.values()}
    found = [read_record(folder / "progress.json").get("train_flops") for folder in sorted(folders)]
    known = [float(flops) for flops in found if flops is not None]
    return sum(known) if known and len(known) == len(found) else None


def _required(name: str, experiment: Experiment) -> Path:
    """Train a required experiment, once; the folder is named by its configuration."""
    folder = cached(f"{name}-{experiment.fingerprint}").resolve()
    checkpoint = folder / "checkpoints" / "last.ckpt"

    def is_finished() -> bool:
        return is_trained(folder / "progress.json") and checkpoint.is_file()

    def train() -> None:
        folder.mkdir(exist_ok=True)
        print(f"training the required {name} once, in {folder}", file=sys.stderr, flush=True)
        code = _train(folder, experiment)
        # The exit status alone proves nothing: what trains on a model must have all of it.
        if code != 0 or not is_finished():
            _refuse(name, folder, code)

    ensure(folder, train, is_finished)
    return checkpoint


def _train(folder: Path, experiment: Experiment) -> int:
    config = folder / "required.yaml"
    write_text(config, to_yaml(experiment.resolved))
    command = [sys.executable, "-m", "flowbench.cli", "fit", "-c", str(config), f"run.dir={folder}"]
    return run_child(command, folder / "log.txt", without_launcher(os.environ))


def _refuse(name: str, folder: Path, code: int) -> None:
    end = how_it_ended(code) if code else f"ended before it was finished ({_standing(folder)})"
    message = f"training the required {name} {end}: see {folder / 'log.txt'}"
    if code == 2:
        raise ValueError(message)
    raise ProcessEnded(f"{message}; the same command goes on with it", exit_status(code) or 1)


def _standing(folder: Path) -> str:
    fraction = read_record(folder / "progress.json").get("fraction")
    return "it noted no progress" if fraction is None else f"{fraction:.0%} of its budget"
