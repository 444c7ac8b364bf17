"""Dotted keys of bench files and their nested form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowbench.config.errors import ConfigError
from flowbench.config.merge import merge
from flowbench.config.text import MAX_DEPTH

__all__ = ["flatten", "nest"]


def nest(dotted: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """``{"a.b": 1}`` as ``{"a": {"b": 1}}``; nested mappings may be mixed with dotted keys.

    Args:
        dotted: text keys to values.
        depth: levels above it.

    Raises:
        ConfigError: one line: more levels than a file may have, or a list and a mapping for the same key.
    """
    out: dict[str, Any] = {}
    for key, value in dotted.items():
        parts = key.split(".")
        if depth + len(parts) > MAX_DEPTH:
            raise ConfigError(f"key '{key[:40]}' lies more than {MAX_DEPTH} levels deep")
        value = nest(value, depth + len(parts)) if isinstance(value, Mapping) else value
        for part in reversed(parts):
            value = {part: value}
        out = merge(out, value).tree
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
