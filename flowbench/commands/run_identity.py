"""Whether a folder's run, or a checkpoint's weights, are those of a configuration."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from flowbench.config import Experiment, compose, fingerprint
from flowbench.config.differences import Difference, describe, differences, of_budget, of_weights
from flowbench.config.fitting import fit_experiment

__all__ = ["check_folder", "check_weights", "own_folder"]


def own_folder(experiment: Experiment) -> Experiment:
    """The experiment in the folder of the run whose ``config.yaml`` it was read from, unless it names a folder.

    Changed overrides would give a run another folder; what only measures one stays with it.
    """
    run = experiment.resolved.get("run") or {}
    if experiment.home is None or run.get("dir") or run.get("name"):
        return experiment
    return experiment.at(experiment.home)


def check_folder(experiment: Experiment, remedy: str, measuring: bool = False) -> None:
    """A folder holds the run of one configuration, else resuming would mix two, and rows would replace others'.

    Args:
        experiment: what is to be done in its folder.
        remedy: which option names another place.
        measuring: settings of sampling and evaluation may differ; else the budget alone, which can be raised.

    Raises:
        ValueError: names the keys that differ.
    """
    found = _differences(experiment.run_dir / "config.yaml", experiment)
    wrong = [d for d in found if (_is_of_weights(d, experiment) if measuring else not of_budget(d))]
    if wrong:
        raise ValueError(
            f"{experiment.run_dir} holds a run of another configuration ({describe(wrong)}): {remedy}, or remove the "
            "folder"
        )


def check_weights(experiment: Experiment, path: Path, but: Iterable[str] = ()) -> None:
    """A checkpoint's weights were trained with this configuration, as far as they depend on it.

    Args:
        experiment: what is to be done with the weights.
        path: the checkpoint; one without a configuration beside it is identified by its content alone.
        but: keys that may differ too.

    Raises:
        ValueError: names the keys that differ.
    """
    for folder in (path.parent.parent, path.parent):
        config = folder / "config.yaml"
        wrong = [d for d in _differences(config, experiment) if _is_of_weights(d, experiment) and d.key not in but]
        if wrong:
            raise ValueError(
                f"the weights of {path} were trained with another configuration ({describe(wrong)}): pass -c {config}, "
                "or train this one"
            )


def _is_of_weights(difference: Difference, experiment: Experiment) -> bool:
    return of_weights(difference, getattr(experiment.model_class, "sampling_arguments", ()))


def _differences(config: Path, experiment: Experiment) -> list[Difference]:
    """Keys in which a run's saved configuration and this one differ; empty without a saved one."""
    if not config.is_file() or not config.with_name("config.source.yaml").is_file():
        return []
    saved = fit_experiment(compose([config]).resolved)
    if fingerprint(saved) == experiment.fingerprint:
        return []
    return differences(saved, experiment.resolved) or [
        Difference("fingerprint", fingerprint(saved), experiment.fingerprint)
    ]
