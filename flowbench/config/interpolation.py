"""``${...}`` resolved by OmegaConf, in plain containers."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowbench.config.errors import ConfigError, one_line
from flowbench.config.text import Tree, plain

__all__ = ["MISSING", "REFERENCE", "escape", "find", "resolve"]

MISSING = "???"
"""OmegaConf's mark of a value that another layer gives."""

REFERENCE = re.compile(r"\$\{([^${}:,.\[\]\s]+(?:\.[^${}:,.\[\]\s]+)*)\}")
"""An interpolation of one dotted key and nothing else."""


def resolve(tree: Tree, late: Collection[str] = ()) -> Tree:
    """The tree with every ``${...}`` replaced by what it names.

    Args:
        tree: plain containers.
        late: keys of the top whose values stay as they are written; others may name what is in them.

    Raises:
        ConfigError: an interpolation that is malformed, names nothing, or names itself; a missing value ``???``.
    """
    if not _has_work([value for key, value in tree.items() if key not in late]):
        return copy.deepcopy(tree)
    source = {key: escape(value) if key in late else value for key, value in tree.items()}
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(plain(source)), resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", "") or ""
        reason = one_line(str(error).split("\n", 1)[0]) or "it names itself"
        raise ConfigError(f"key '{key}' cannot be resolved: {reason}") from error
    found = cast(Tree, _with_texts(resolved, source, source))
    return {key: copy.deepcopy(tree[key]) if key in late else value for key, value in found.items()}


def find(tree: Tree, reference: str) -> Any:
    """What an interpolation of one dotted key names in the tree; None for other text or where nothing is."""
    match = REFERENCE.fullmatch(reference)
    node: Any = tree if match else None
    for key in match.group(1).split(".") if match else ():
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def escape(value: Any) -> Any:
    """The same value with text that OmegaConf would resolve marked as literal."""
    if isinstance(value, Mapping):
        return {key: escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escape(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"\\*\?\?\?", value):
        return f"\\{value}"
    if isinstance(value, str) and "${" in value:
        # A backslash before an interpolation escapes it, and two are one backslash before it.
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _has_work(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_work, value.values()))
    if isinstance(value, list):
        return any(map(_has_work, value))
    return isinstance(value, str) and ("${" in value or MISSING in value)


def _with_texts(resolved: Any, source: Any, root: Tree) -> Any:
    """Give numbers and truth values the text back that they were written with."""
    if isinstance(source, Mapping):
        return {key: _with_texts(resolved[key], item, root) for key, item in source.items()}
    if isinstance(source, list):
        return [_with_texts(*pair, root) for pair in zip(resolved, source, strict=True)]
    written = find(root, source) if type(source) is str else source
    scalar = isinstance(written, (str, int, float)) and not isinstance(resolved, (dict, list))
    return written if scalar and plain(written) == resolved and type(plain(written)) is type(resolved) else resolved
