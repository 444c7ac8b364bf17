"""Names of earlier versions, which files and saved runs may still have.

A tree is read with today's names. Its fingerprint is computed with the earliest ones, so that a class that moves keeps
the results of those who use it.
"""

from __future__ import annotations

from typing import Any

__all__ = ["MOVED", "with_earliest_names", "with_present_names"]

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

_EARLIEST = {present: earlier for earlier, present in MOVED.items()}
_PAIRINGS = ("flowbench.families.StreamPairing", "flowbench.families.BatchPairing")


def with_present_names(node: Any) -> Any:
    """A copy of a tree in which classes and keys have the names of this version."""
    if isinstance(node, list):
        return [with_present_names(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {_present_key(key, value): _present_value(key, value) for key, value in node.items()}


def _present_value(key: Any, value: Any) -> Any:
    if key == "class_path" and isinstance(value, str):
        return MOVED.get(value, value)
    if key == "run" and isinstance(value, dict):
        return {"problem" if name == "task" else name: item for name, item in value.items()}
    return with_present_names(value)


def _present_key(key: Any, value: Any) -> Any:
    """A rule that makes pairs was once given as ``coupling``, by a key of its own or a dotted one."""
    is_rule = isinstance(value, dict) and value.get("class_path") in _PAIRINGS
    if is_rule and isinstance(key, str) and (key == "coupling" or key.endswith(".coupling")):
        return f"{key.removesuffix('coupling')}pairing"
    return key


def with_earliest_names(node: Any) -> Any:
    """A copy of a tree in which classes and keys have the names under which they were first known."""
    if isinstance(node, list):
        return [with_earliest_names(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {_earliest_key(key, value): with_earliest_names(value) for key, value in node.items()}
    if isinstance(name := found.get("class_path"), str):
        found["class_path"] = _EARLIEST.get(name, name)
    return found


def _earliest_key(key: Any, value: Any) -> Any:
    is_rule = isinstance(value, dict) and value.get("class_path") in _PAIRINGS
    return "coupling" if is_rule and key == "pairing" else key
