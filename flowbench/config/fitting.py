"""Numbers and truth values that are names: the text as it was written, where a class or a section wants text.

``run.name=1e3`` names the folder 1e3, and an argument that is annotated as text receives "007", not 7. Everything else
becomes a plain number or truth value. In a path for another package's class, such as a logger's folder, ~ is replaced;
flowbench's own classes do that themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowbench.config.annotations import (
    accepts_number,
    accepts_text,
    accepts_truth,
    choices_of,
    constructor_hints,
    element_of,
    is_path,
    record_of,
)
from flowbench.config.classes import accepted_names
from flowbench.config.earlier_names import TRAINING, without_training
from flowbench.config.errors import ConfigError
from flowbench.config.imports import import_class
from flowbench.config.text import Tree, Word, plain, text_of
from flowbench.core.places import expand

__all__ = ["fit_experiment"]


def fit_experiment(resolved: Mapping[str, Any]) -> Tree:
    """A resolved configuration with text where text is wanted.

    What does not fit its section or class stays for the validation to refuse.

    Args:
        resolved: as composed; numbers may carry the text that they were written with.

    Returns:
        The same tree of plain values.
    """
    from lightning import Trainer

    from flowbench.data import FlowDataModule
    from flowbench.evaluation import Evaluator

    classes = {"data": FlowDataModule, "trainer": Trainer, "evaluator": Evaluator}
    out: Tree = {}
    for key, value in resolved.items():
        if key in classes and isinstance(value, Mapping):
            out[key] = _fit_arguments(value, classes[key])
        elif key == "requires" and isinstance(value, Mapping):
            out[key] = {k: fit_experiment(v) if isinstance(v, Mapping) else plain(v) for k, v in value.items()}
        elif key == "run" and isinstance(value, Mapping):
            out[key] = {k: _fit(v, str) for k, v in value.items()}
        elif key == "model" and isinstance(value, Mapping):
            out[key] = _fit(_with_own_arguments(value), None)
        elif key == "files" and isinstance(value, Mapping):  # under the names that the classes' paths have now
            out[key] = {**value, **{str(expand(name)): content for name, content in value.items()}}
        else:
            out[key] = _fit(value, None)
    return out


def _with_own_arguments(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments that another package's class has itself, by a name that every module's training once had."""
    arguments, cls = model.get("init_args"), _imported(model.get("class_path"))
    if cls is None or not isinstance(arguments, Mapping) or "training" in (accepted := accepted_names(cls)):
        return model
    return {**model, "init_args": without_training(arguments, [name for name in TRAINING if name in accepted])}


def _fit_arguments(arguments: Mapping[str, Any], cls: type) -> Tree:
    hints = constructor_hints(cls)
    return {key: _fit(value, hints.get(key)) for key, value in arguments.items()}


def _fit(value: Any, hint: Any) -> Any:
    if isinstance(value, Mapping):
        return _fit_mapping(value, hint)
    if isinstance(value, list):
        return [_fit(item, element_of(hint)) for item in value]
    if isinstance(value, (bool, Word)):
        open_to_it = hint is None or accepts_truth(hint) or not (accepts_text(hint) or isinstance(value, Word))
        return plain(value) if open_to_it else text_of(value)
    if isinstance(value, (int, float)):
        return _fit_number(value, hint)
    return str(expand(value)) if isinstance(value, str) and is_path(hint) else value


def _fit_mapping(value: Mapping[str, Any], hint: Any) -> Tree:
    record = record_of(hint)
    if "class_path" in value:
        arguments = value.get("init_args")
        fitted = {key: _fit(item, None) for key, item in value.items()}
        cls = _imported(fitted["class_path"])
        if cls is not None and isinstance(arguments, Mapping):
            fitted["init_args"] = _fit_arguments(arguments, cls)
        return fitted
    if record is not None:
        return _fit_arguments(value, record)
    return {key: _fit(item, element_of(hint)) for key, item in value.items()}


def _fit_number(value: float, hint: Any) -> Any:
    text = text_of(value)
    if hint is None or plain(value) in choices_of(hint):
        return plain(value)
    if text in choices_of(hint) or (accepts_text(hint) and not accepts_number(hint)):
        return text
    return plain(value)


def _imported(class_path: Any) -> type | None:
    try:
        return import_class("", class_path)
    except ConfigError:  # the validation reports it, with its key
        return None
