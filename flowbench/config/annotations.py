"""Annotations of constructors: what a value in a configuration may be."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import os
import types
import typing
from pathlib import PurePath
from typing import Any

__all__ = [
    "accepts_none",
    "accepts_number",
    "accepts_text",
    "accepts_truth",
    "arity_of",
    "choices_of",
    "constructor_hints",
    "element_of",
    "is_path",
    "options_of",
    "record_of",
    "takes_path",
]


def constructor_hints(cls: type) -> dict[str, Any]:
    """Annotations of the constructor, its parents' below it (for options a class forwards)."""
    hints: dict[str, Any] = {}
    for parent in reversed(cls.__mro__):
        init = vars(parent).get("__init__")
        try:
            hints.update(typing.get_type_hints(init) if inspect.isfunction(init) else {})
        except (NameError, TypeError):  # a name for type checkers only: jsonargparse resolves it itself
            continue
    return {k: v for k, v in hints.items() if k != "return"}


def takes_path(hint: Any) -> bool:
    """Whether an argument with this annotation can be a path."""
    return any(
        option is str or (isinstance(option, type) and issubclass(option, PurePath)) for option in options_of(hint)
    )


def is_path(hint: Any) -> bool:
    """Whether text for this annotation is a path."""
    return any(isinstance(option, type) and issubclass(option, (PurePath, os.PathLike)) for option in options_of(hint))


def options_of(hint: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def arity_of(hint: Any) -> int | None:
    """Number of arguments that a factory annotation passes; 0 for a class, None when the annotation leaves it open."""
    for option in options_of(hint):
        if typing.get_origin(option) is collections.abc.Callable:
            arguments = typing.get_args(option)[0]
            return len(arguments) if isinstance(arguments, list) else None
        if isinstance(option, type) and option not in (str, type(None)):
            return 0
    return None


def record_of(hint: Any) -> type | None:
    """The dataclass that an annotation names: its fields are written without class_path."""
    return next((o for o in options_of(hint) if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def element_of(hint: Any) -> Any:
    """The annotation of the items of a list or the values of a mapping; None when it has none."""
    for option in options_of(hint):
        arguments = [a for a in typing.get_args(option) if a is not Ellipsis]
        if arguments and typing.get_origin(option) is not collections.abc.Callable:
            return arguments[-1]
    return None


def choices_of(hint: Any) -> list[Any]:
    """The values that the annotation lists one by one."""
    literals = [o for o in options_of(hint) if typing.get_origin(o) is typing.Literal]
    return [choice for literal in literals for choice in typing.get_args(literal)]


def accepts_none(hint: Any) -> bool:
    """Whether null fits."""
    return _accepts(hint, (types.NoneType,)) or None in options_of(hint)


def accepts_number(hint: Any) -> bool:
    """Whether some number fits."""
    return _accepts(hint, (int, float, complex), but=bool)


def accepts_truth(hint: Any) -> bool:
    """Whether a truth value fits."""
    return _accepts(hint, (bool,))


def accepts_text(hint: Any) -> bool:
    """Whether some text fits."""
    return _accepts(hint, (str, PurePath, os.PathLike))


def _accepts(hint: Any, kinds: tuple[type, ...], but: type | None = None) -> bool:
    if any(isinstance(choice, kinds) and not (but and isinstance(choice, but)) for choice in choices_of(hint)):
        return True
    return any(_is_open(o) or (isinstance(o, type) and issubclass(o, kinds) and o is not but) for o in options_of(hint))


def _is_open(option: Any) -> bool:
    return option in (Any, object) or isinstance(option, typing.TypeVar)
