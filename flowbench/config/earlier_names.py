"""Names of earlier versions, which files, command lines and saved runs may still have.

A tree is read with today's names. Its fingerprint is computed with the earliest ones, so that a class or a key that
moves keeps the results of those who use it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

from flowbench.config.errors import ConfigError

__all__ = ["MOVED", "TRAINING", "with_earliest_names", "with_present_names", "without_training"]

MOVED = {
    "flowbench.families.FullyShardedStrategy": "flowbench.training.FullyShardedStrategy",
    "flowbench.families.OptimizerConfig": "flowbench.training.OptimizerConfig",
    **{
        f"flowbench.evaluation.{name}": f"flowbench.tasks.generation.{name}"
        for name in (
            "ConditionAgreement",
            "LatentBound",
            "NegativeLogLikelihood",
            "PathStraightness",
            "Reconstruction",
            "TrainingPairs",
        )
    },
}
"""Class paths of earlier versions, and where the classes are now."""

TRAINING = {"optimizer": ("optimizer",), "ema_decay": ("ema", "decay"), "compile": ("compile",)}
"""Arguments that every module once had, and where they are in its argument ``training``."""

_EARLIEST = {present: earlier for earlier, present in MOVED.items()}
_PAIRINGS = ("flowbench.families.StreamPairing", "flowbench.families.BatchPairing")
_ARGUMENTS = "model.init_args"
_ARGUMENT = re.compile(rf"((?:^|[.{{:]){re.escape(_ARGUMENTS)}\.)({'|'.join(TRAINING)})(?!\w)")


# ---- today's names ------------------------------------------------------------------------------------


def with_present_names(node: Any) -> Any:
    """A copy of a tree in which classes and keys have the names of this version.

    Raises:
        ConfigError: a setting is given by its earlier and by its present name.
    """
    if isinstance(node, list):
        return [with_present_names(item) for item in node]
    if isinstance(node, str):
        return _present_interpolation(node)
    if not isinstance(node, dict):
        return node
    out: dict[Any, Any] = {}
    for key, value in node.items():
        name = _present_key(key, value)
        if name != key and name in node:
            raise _given_twice(str(key), str(name))
        out[name] = _present_value(name, value)
    return out


def _present_value(key: Any, value: Any) -> Any:
    if key == "class_path" and isinstance(value, str):
        return MOVED.get(value, value)
    if key == "run" and isinstance(value, dict):
        return {"problem" if name == "task" else name: item for name, item in value.items()}
    value = with_present_names(value)
    if _ends_with(key, _ARGUMENTS) and isinstance(value, dict):
        return _with_training(value)
    if _ends_with(key, "model") and isinstance(value, dict) and isinstance(value.get("init_args"), dict):
        return {**value, "init_args": _with_training(value["init_args"])}
    return value


def _present_key(key: Any, value: Any) -> Any:
    """A dotted key of a module's training, and a rule that makes pairs, which was once given as ``coupling``."""
    if not isinstance(key, str):
        return key
    if isinstance(value, dict) and value.get("class_path") in _PAIRINGS and _ends_with(key, "coupling"):
        return f"{key.removesuffix('coupling')}pairing"
    return _ARGUMENT.sub(_present_argument, key)


def _present_interpolation(text: str) -> str:
    return _ARGUMENT.sub(_present_argument, text) if "${" in text and _ARGUMENTS in text else text


def _present_argument(found: re.Match[str]) -> str:
    return f"{found[1]}{'.'.join(('training', *TRAINING[found[2]]))}"


def _with_training(arguments: dict[str, Any]) -> dict[str, Any]:
    """A module's arguments with those of its training under ``training``."""
    given = {name: arguments[name] for name in TRAINING if name in arguments}
    if not given:
        return arguments
    training = arguments.get("training", {})
    for name, value in given.items():
        training = _with_value(training, TRAINING[name], value, name)
    return {key: value for key, value in arguments.items() if key not in TRAINING} | {"training": training}


def _with_value(node: Any, keys: tuple[str, ...], value: Any, earlier: str) -> dict[str, Any]:
    """A copy of nested mappings with one more value."""
    first, *rest = keys
    if not isinstance(node, dict) or (first in node and not rest):
        raise _given_twice(f"{_ARGUMENTS}.{earlier}", f"{_ARGUMENTS}.{'.'.join(('training', *TRAINING[earlier]))}")
    return {**node, first: _with_value(node.get(first, {}), tuple(rest), value, earlier) if rest else value}


def _given_twice(earlier: str, present: str) -> ConfigError:
    return ConfigError(f"{earlier} is the earlier name of {present}, and both are given; leave out {earlier}")


def _ends_with(key: Any, name: str) -> bool:
    return isinstance(key, str) and (key == name or key.endswith(f".{name}"))


# ---- the earliest names -------------------------------------------------------------------------------


def with_earliest_names(node: Any) -> Any:
    """A copy of a tree in which classes and keys have the names under which they were first known."""
    if isinstance(node, list):
        return [with_earliest_names(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {_earliest_key(key, value): with_earliest_names(value) for key, value in node.items()}
    if isinstance(name := found.get("class_path"), str):
        found["class_path"] = _EARLIEST.get(name, name)
    model = found.get("model")
    if isinstance(model, dict) and isinstance(model.get("init_args"), dict):
        found["model"] = {**model, "init_args": without_training(model["init_args"], TRAINING)}
    return found


def _earliest_key(key: Any, value: Any) -> Any:
    is_rule = isinstance(value, dict) and value.get("class_path") in _PAIRINGS
    return "coupling" if is_rule and key == "pairing" else key


def without_training(arguments: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A module's arguments with some of its training under their earlier names.

    Args:
        arguments: by name.
        names: which of :data:`TRAINING` become arguments again.
    """
    if not isinstance(arguments.get("training"), Mapping):
        return dict(arguments)
    out, training = dict(arguments), copy.deepcopy(dict(arguments["training"]))
    for name in names:
        node, (*parents, last) = training, TRAINING[name]
        for parent in parents:
            node = node[parent] if isinstance(node.get(parent), dict) else {}
        if last in node:
            out[name] = node.pop(last)
    del out["training"]
    left = {key: value for key, value in training.items() if value != {}}
    return out | ({"training": left} if left else {})
