"""Classes of a package read from its source: names, docstrings and bases, without importing what the source imports.

A list of the families would otherwise import torch, which takes seconds; and ``python -OO`` has no docstrings.
"""

from __future__ import annotations

import ast
import inspect
from abc import ABC, ABCMeta, abstractmethod
from functools import cache, cached_property
from pathlib import Path
from typing import Any

__all__ = ["ClassReader"]

_ABSTRACT = {"abstractmethod", "abstractproperty"}


class ClassReader:
    """Reads the classes of one package.

    Args:
        package: its name.
        folder: where its ``__init__.py`` lies.
    """

    def __init__(self, package: str, folder: Path) -> None:
        self.package = package
        self.folder = folder
        self._modules: dict[str, _Module | None] = {}
        self._skeletons: dict[str, type] = {"abc.ABC": ABC, "typing.Protocol": ABC}

    def exported(self, module: str) -> list[str]:
        """The names in a module's ``__all__`` that are classes of the package."""
        read = self._module(module)
        names = read.exported if read else []
        return [name for name in names if self._home(f"{module}.{name}") is not None]

    def summary(self, name: str) -> str:
        """The first line of a class's docstring; empty where it has none.

        Args:
            name: dotted name, as it is defined or exported.
        """
        found = self._home(name)
        text = ast.get_docstring(found[1]) if found else None
        return next(iter((text or "").splitlines()), "")

    def is_subclass(self, name: str, base: str) -> bool:
        """Whether a class is derived from another one, or is it; dotted names, the base's of any package."""
        return issubclass(self._skeleton(name), self._skeleton(base))

    def is_abstract(self, name: str) -> bool:
        """Whether a class has abstract methods; those of bases in other packages are not found."""
        return inspect.isabstract(self._skeleton(name))

    def _module(self, name: str) -> _Module | None:
        if name not in self._modules:
            path = self.folder.joinpath(*name.split(".")[1:])
            files = [path / "__init__.py", path.with_suffix(".py")] if name.split(".")[0] == self.package else []
            file = next((file for file in files if file.is_file()), None)
            self._modules[name] = _Module(name, file.read_text(encoding="utf-8")) if file else None
        return self._modules[name]

    def _home(self, name: str) -> tuple[_Module, ast.ClassDef] | None:
        """Module and definition of a class; None outside of the package, and for what is no class."""
        module_name, _, own = name.rpartition(".")
        module = self._module(module_name)
        if module is None:
            return None
        if own in module.classes:
            return module, module.classes[own]
        return self._home(module.imports[own]) if own in module.imports else None

    def _skeleton(self, name: str) -> type:
        """A class with the same bases and methods that do nothing, so that `inspect` and `issubclass` work on it."""
        found = self._home(name)
        key = f"{found[0].name}.{found[1].name}" if found else name
        if key not in self._skeletons:
            self._skeletons[key] = self._make(*found) if found else type(name.rpartition(".")[2], (), {})
        return self._skeletons[key]

    def _make(self, module: _Module, node: ast.ClassDef) -> type:
        bases = tuple(dict.fromkeys(self._skeleton(module.qualified(base)) for base in node.bases))
        abstracts = any(isinstance(base, ABCMeta) for base in bases) or bool(node.keywords)
        body = {name: _method(abstracts and is_abstract) for name, is_abstract in _members(node)}
        return (ABCMeta if abstracts else type)(node.name, bases, body)


class _Module:
    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.tree = ast.parse(source)
        self.classes = {node.name: node for node in self.tree.body if isinstance(node, ast.ClassDef)}

    @cached_property
    def imports(self) -> dict[str, str]:
        """Name here -> dotted name of what it stands for."""
        found: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        return found

    @cached_property
    def exported(self) -> list[str]:
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
                return [str(name) for name in ast.literal_eval(node.value)]
        return []

    def qualified(self, base: ast.expr) -> str:
        """The dotted name of a base class."""
        if isinstance(base, ast.Subscript):
            base = base.value
        first, dot, rest = ast.unparse(base).partition(".")
        if first in self.classes:
            return f"{self.name}.{first}"
        return f"{self.imports.get(first, first)}{dot}{rest}"


def _members(node: ast.ClassDef) -> list[tuple[str, bool]]:
    """Names that a class defines, and whether each is abstract."""
    found: list[tuple[str, bool]] = []
    for item in node.body:
        if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
            marks = {ast.unparse(decorator).rpartition(".")[2] for decorator in item.decorator_list}
            found.append((item.name, bool(marks & _ABSTRACT)))
        elif isinstance(item, ast.Assign):
            found += [(target.id, False) for target in item.targets if isinstance(target, ast.Name)]
        elif isinstance(item, ast.AnnAssign) and item.value is not None and isinstance(item.target, ast.Name):
            found.append((item.target.id, False))
    return [(name, is_abstract) for name, is_abstract in found if not name.startswith("__") or is_abstract]


@cache
def _method(is_abstract: bool) -> Any:
    def nothing(self: object) -> None:
        """Stand for a method."""

    return abstractmethod(nothing) if is_abstract else nothing
