"""``key=value`` overrides from the command line."""

from __future__ import annotations

import re
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowbench.config.errors import ConfigError, one_line

__all__ = ["apply_override", "parse_override"]

_KEY = re.compile(r"[^.\[\]\s=]+(\.[^.\[\]\s=]+|\[\d+\])*")


def parse_override(text: str) -> tuple[str, Any]:
    """Split ``key=value`` (or ``--key=value``) and read the value as OmegaConf reads YAML.

    Args:
        text: e.g. ``trainer.max_steps=500``, ``optimizer.lr=1e-3``, ``blocks[0].width=64``, ``sweep=[1, 2]``.

    Returns:
        The key, and a number, bool, None, string, list or dict; an interpolation stays unresolved text.

    Raises:
        ConfigError: no ``=``, no valid key, or a value that is not YAML.
    """
    key, equals, value = text.removeprefix("--").partition("=")
    if not equals:
        raise ConfigError(f"override '{text}' has no value; write key=value")
    if not _KEY.fullmatch(key):
        raise ConfigError(f"override '{text}': '{key}' is not a key; write e.g. trainer.max_steps=500")
    try:
        parsed = OmegaConf.create(f"value: {value}" if "\n" not in value else {"value": value})
        return key, OmegaConf.to_container(parsed, resolve=False)["value"]  # type: ignore[index,call-overload]
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"override '{text}': '{value}' is not a YAML value: {one_line(reason)}") from error


def apply_override(tree: DictConfig, key: str, value: Any) -> None:
    """Set one key, in place; dicts and lists given as values replace what was there.

    Raises:
        ConfigError: an index out of a list's range, a name used on a list, a parent that is an interpolation.
    """
    _refuse_interpolated_parent(tree, key)
    try:
        OmegaConf.update(tree, key, value, merge=False, force_add=True)
    except (OmegaConfBaseException, ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"override '{key}' cannot be set: {str(error).splitlines()[0]}") from error


def _refuse_interpolated_parent(tree: DictConfig, key: str) -> None:
    # OmegaConf would follow the interpolation and change the key that it names.
    parts = re.findall(r"[^.\[\]]+", key)
    node: Any = tree
    for depth, part in enumerate(parts[:-1], start=1):
        if not isinstance(node, DictConfig) or part not in node:
            return
        if OmegaConf.is_interpolation(node, part):
            parent = ".".join(parts[:depth])
            raise ConfigError(f"override '{key}': {parent} is an interpolation; override what it names, or {parent}")
        node = node[part]
