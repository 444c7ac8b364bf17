"""The one merge of everything a user writes: files over their bases, bench files, contenders, overrides.

Mappings merge key by key; lists and single values replace. ``_replace_: true`` inside a mapping makes it replace what
it would have merged into. A list over a mapping, or a mapping over a list, is refused: one of the two is a slip.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowbench.config.errors import ConfigError
from flowbench.config.interpolation import MISSING, find
from flowbench.config.text import MAX_DEPTH, Tree, Word, kind

__all__ = ["REPLACE", "Layer", "merge", "set_key", "split_key", "value_at", "without_marks"]

REPLACE = "_replace_"

_ABSENT = object()


@dataclass(frozen=True)
class Layer:
    """A tree with the texts that it was merged from, which messages name.

    Attributes:
        tree: plain containers.
        texts: name and content of each text, later ones win.
    """

    tree: Tree
    texts: tuple[tuple[str, Tree], ...] = ()

    @classmethod
    def of(cls, tree: Tree, name: str) -> Layer:
        """The layer of one text."""
        return cls(tree, ((name, tree),))

    def origin(self, keys: tuple[str, ...]) -> str:
        """`` of NAME`` for the last text that has something at the keys; empty when none is known."""
        for name, tree in reversed(self.texts):
            node: Any = tree
            for key in keys:
                node = node.get(key, _ABSENT) if isinstance(node, Mapping) else _ABSENT
            if node is not _ABSENT:
                return f" of {name}"
        return ""


def merge(low: Layer | Mapping[str, Any], high: Layer | Mapping[str, Any]) -> Layer:
    """Merge two layers; ``high`` wins.

    The marks ``_replace_`` of ``high`` stay, for what the result is merged over; see :func:`without_marks`.

    Raises:
        ConfigError: a list over a mapping or a mapping over a list, or a mark that is neither true nor false. One line
            with the key, both kinds, the texts' names and what to write.
    """
    low, high = (layer if isinstance(layer, Layer) else Layer(dict(layer)) for layer in (low, high))
    return Layer(_Merge(low, high).run(), (*low.texts, *high.texts))


def without_marks(value: Any) -> Any:
    """The same tree without ``_replace_``."""
    if isinstance(value, Mapping):
        return {key: without_marks(item) for key, item in value.items() if key != REPLACE}
    return [without_marks(item) for item in value] if isinstance(value, list) else value


class _Merge:
    def __init__(self, low: Layer, high: Layer) -> None:
        self.low, self.high = low, high

    def run(self) -> Tree:
        return self._mappings(self.low.tree, self.high.tree, ())

    def _mappings(self, low: Mapping[str, Any], high: Mapping[str, Any], keys: tuple[str, ...]) -> Tree:
        out = {} if self._replaces(high, keys) else dict(low)
        for key, value in high.items():
            if value == MISSING and key in out:
                continue
            out[key] = self._value(out.get(key), value, (*keys, key))
        return out

    def _value(self, low: Any, high: Any, keys: tuple[str, ...]) -> Any:
        if not isinstance(high, Mapping):
            if isinstance(high, list) and isinstance(low, Mapping):
                raise self._clash(low, high, keys)
            return high
        replaces = self._replaces(high, keys)
        if isinstance(low, list) and not replaces:
            raise self._clash(low, high, keys)
        # A mapping changes what an interpolation names, here only.
        target = find(self.low.tree, low) if isinstance(low, str) else low
        return self._mappings(target if isinstance(target, Mapping) else {}, high, keys)

    def _replaces(self, high: Mapping[str, Any], keys: tuple[str, ...]) -> bool:
        mark = high.get(REPLACE, False)
        if isinstance(mark, Word):
            return mark.truth
        if isinstance(mark, bool):
            return mark
        key = ".".join((*keys, REPLACE))
        raise ConfigError(f"{key} is {kind(mark)}{self.high.origin((*keys, REPLACE))}; write true or false")

    def _clash(self, low: Any, high: Any, keys: tuple[str, ...]) -> ConfigError:
        wanted = "write 'name: value' lines, or null to take it out"
        if isinstance(high, Mapping):
            wanted = f"write a list, or {REPLACE}: true in the mapping to replace the list"
        there, here = self.low.origin(keys), self.high.origin(keys)
        return ConfigError(f"{'.'.join(keys)}: {kind(high)}{here} cannot be merged into {kind(low)}{there}; {wanted}")


# ---- single keys ----------------------------------------------------------------------------------------------------


def split_key(key: str) -> tuple[str, ...]:
    """The parts of a dotted key, ``a.b[0].c``; indices as text.

    Raises:
        ConfigError: more parts than a file may have levels.
    """
    parts = tuple(re.findall(r"[^.\[\]]+", key))
    if len(parts) > MAX_DEPTH:
        raise ConfigError(f"key '{key[:40]}...' has {len(parts)} parts; at most {MAX_DEPTH} are read")
    return parts


def value_at(tree: Tree, key: str) -> Any:
    """The value at a dotted key; None without one."""
    node: Any = tree
    for part in split_key(key):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def set_key(tree: Tree, key: str, value: Any) -> None:
    """Set one key of plain containers in place; missing mappings are made, single values on the way are replaced.

    Raises:
        ConfigError: an index that a list does not have, a name used on a list, a parent that is an interpolation.
    """
    parts = split_key(key)
    node: Any = tree
    for depth, part in enumerate(parts[:-1], start=1):
        place = _place(node, part, key)
        inner = node[place] if isinstance(node, list) else node.get(place)
        if isinstance(inner, str) and "${" in inner:
            # It would change what the interpolation names, wherever else that is used.
            parent = ".".join(parts[:depth])
            raise ConfigError(f"override '{key}': {parent} is an interpolation; override what it names, or {parent}")
        if not isinstance(inner, (dict, list)):
            inner = node[place] = {}
        node = inner
    node[_place(node, parts[-1], key)] = value


def _place(node: Any, part: str, key: str) -> Any:
    if not isinstance(node, list):
        return part
    if not (part.isascii() and part.isdigit()):
        raise ConfigError(f"override '{key}' cannot be set: '{part}' is no index of a list; write e.g. [0]")
    if len(part) > 9 or int(part) >= len(node):
        raise ConfigError(f"override '{key}' cannot be set: list index out of range, it has {len(node)} entries")
    return int(part)
