"""Imports that wait until they are needed: torch alone takes seconds, and a list of data sets does not need it."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["lazy_exports", "lazy_module"]


class _LazyModule(ModuleType):
    """A module that is imported when one of its names is used."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


def lazy_module(name: str) -> ModuleType:
    """A module in place of ``import name``: imported at the first use of one of its names.

    Args:
        name: dotted name, e.g. ``torch``.
    """
    return _LazyModule(name)


def lazy_exports(package: str) -> Callable[[str], Any]:
    """A package's ``__getattr__`` (PEP 562) for the names that it imports under ``if TYPE_CHECKING:``.

    Type checkers read those imports as they stand; at run time each is made when its name is used.

    Args:
        package: the package's ``__name__``; its ``__init__.py`` is read.
    """
    module = sys.modules[package]
    homes = _guarded_imports(Path(str(module.__file__)).read_text(encoding="utf-8"))

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        home, original = homes[name]
        value = getattr(importlib.import_module(home), original)
        setattr(module, name, value)  # the next use finds it without this function
        return value

    return find


def _guarded_imports(source: str) -> dict[str, tuple[str, str]]:
    """Name -> module and name there, of the imports under ``if TYPE_CHECKING:``."""
    found: dict[str, tuple[str, str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for line in node.body:
                if isinstance(line, ast.ImportFrom) and line.module:
                    found |= {alias.asname or alias.name: (line.module, alias.name) for alias in line.names}
    return found
