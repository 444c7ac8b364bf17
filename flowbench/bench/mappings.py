"""Nested mappings as bench files write them: read, merged, and turned between nested and dotted form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

__all__ = ["flatten", "load_mapping", "merge", "nest"]


def load_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping; interpolations stay as they are written.

    Raises:
        ValueError: when the file is missing, is not YAML or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        container = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as YAML: {reason}") from None
    if not isinstance(container, dict):
        raise ValueError(f"{path} holds a {type(container).__name__}; it must hold a mapping of keys")
    return {str(key): value for key, value in container.items()}


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings: mappings merge, everything else in ``high`` replaces.

    A mapping with ``_replace_: true`` replaces, too, and keeps the mark for the composition of the experiment.
    """
    out = dict(low)
    for key, value in high.items():
        old = out.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping) and value.get("_replace_") is not True
        out[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return out


def nest(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` as ``{"a": {"b": 1}}``; nested mappings may be mixed with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in dotted.items():
        value = nest(value) if isinstance(value, Mapping) else value
        for part in reversed(str(key).split(".")):
            value = {part: value}
        out = merge(out, value)
    return out


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    out: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out
