"""From a ``class_path`` to the class, with different errors for a wrong module and a wrong name."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from flowbench.config.earlier_names import MOVED
from flowbench.config.errors import ConfigError, one_line
from flowbench.core.nearest import suggestion

__all__ = ["ROOMS", "import_class"]

ROOMS = ("families", "training", "networks", "flows", "metrics", "evaluation", "data")


def import_class(key: str, class_path: Any) -> type:
    """Import the class that a configuration names.

    Args:
        key: where the name stands, for the error.
        class_path: e.g. ``flowbench.networks.DiT``.

    Raises:
        ConfigError: not a dotted name, no such module, a module that fails to import, no such class in it.
    """
    if not isinstance(class_path, str):
        raise ConfigError(f"{key}.class_path must be a dotted name such as flowbench.networks.DiT, got {class_path!r}")
    module_name, _, name = MOVED.get(class_path, class_path).rpartition(".")
    if not module_name or not name:
        raise ConfigError(f"{key}.class_path: '{class_path}' names no module{_full_name(name)}")
    module = _import_module(key, class_path, module_name)
    found = getattr(module, name, None)
    if found is None:
        hint = suggestion(name, _public_names(module))
        raise ConfigError(f"{key}.class_path: module '{module_name}' has no class '{name}'{hint}")
    if not isinstance(found, type):
        raise ConfigError(f"{key}.class_path: '{class_path}' is a {type(found).__name__}, not a class")
    return found


def _import_module(key: str, class_path: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            hint = suggestion(missing.rpartition(".")[2], _siblings(missing))
            raise ConfigError(f"{key}.class_path: no module '{missing}' (in '{class_path}'){hint}") from error
        raise ConfigError(
            f"{key}.class_path: module '{module_name}' needs '{missing}', which is not installed"
        ) from error
    except Exception as error:  # the module's own code failed: any exception is possible
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"{key}.class_path: module '{module_name}' cannot be imported: {reason}") from error


def _public_names(module: ModuleType) -> list[str]:
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    return [n for n in names if isinstance(getattr(module, n, None), type)]


def _siblings(module_name: str) -> list[str]:
    parent, _, name = module_name.rpartition(".")
    if not parent:
        top = [m.name for m in pkgutil.iter_modules() if not m.name.startswith("_")]
        return [m for m in ("flowbench", "torch", "lightning", *top) if m[:1] == name[:1]] or ["flowbench"]
    package = importlib.import_module(parent)
    return [m.name for m in pkgutil.iter_modules(getattr(package, "__path__", []))]


def _full_name(name: str) -> str:
    for room in ROOMS:
        try:
            module = importlib.import_module(f"flowbench.{room}")
        except ImportError:
            continue
        if name in getattr(module, "__all__", ()):
            return f"; did you mean 'flowbench.{room}.{name}'?"
    return "; write the full name, e.g. flowbench.networks.DiT"
