"""The references that stand in a bench whose evaluator names none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flowbench.config.errors import ConfigError
from flowbench.config.imports import import_class

if TYPE_CHECKING:
    from flowbench.evaluation import Reference

__all__ = ["DEFAULT_REFERENCES", "default_references", "given_references", "reference_names"]

DEFAULT_REFERENCES = {
    "floor": "flowbench.tasks.generation.Floor",
    "noise": "flowbench.tasks.generation.Noise",
    "gaussian": "flowbench.tasks.generation.Gaussian",
    "gmm": "flowbench.tasks.generation.Mixture",
}
"""Class paths by the names of the rows. No experiment file names them: files and results of all versions mean these."""


def reference_names(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the reference rows of an experiment; nothing is imported.

    Args:
        content: the composed experiment.

    Example:
        >>> reference_names({"evaluator": {}})
        ('floor', 'noise', 'gaussian', 'gmm')
        >>> reference_names({"evaluator": {"references": {"nearest": {"class_path": "mine.Nearest"}}}})
        ('nearest',)
    """
    return tuple(given_references(content.get("evaluator") or {}))


def given_references(evaluator: Mapping[str, Any]) -> Mapping[str, Any]:
    """The references of a section ``evaluator`` by name, as class paths with their arguments.

    Raises:
        ConfigError: when there are none left.
    """
    given = evaluator.get("references")
    if given is None:
        return {name: {"class_path": path} for name, path in DEFAULT_REFERENCES.items()}
    if not given:
        raise ConfigError(
            "evaluator.references names nobody: name one or more; without this key they are "
            f"{', '.join(DEFAULT_REFERENCES)}"
        )
    return given if isinstance(given, Mapping) else {}


def default_references() -> dict[str, Reference]:
    """The references of generation by the names of their rows.

    Example:
        >>> list(default_references())
        ['floor', 'noise', 'gaussian', 'gmm']
    """
    return {name: import_class("references", path)() for name, path in DEFAULT_REFERENCES.items()}
