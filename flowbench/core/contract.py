"""Checks of classes derived from flowbench's bases: their abstract parts, and the types that their methods return."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ContractError", "missing_parts", "returned", "shaped"]

Wanted = TypeVar("Wanted")


class ContractError(ValueError):
    """A method of a derived class returned something else than its base promises; one line that names both."""


def missing_parts(cls: type) -> list[str]:
    """Names of the methods and attributes that a class must define and does not; empty for one that can be built."""
    return sorted(getattr(cls, "__abstractmethods__", ()))


def returned(value: Any, wanted: type[Wanted], owner: object, method: str) -> Wanted:
    """The value that a method of `owner` returned.

    Raises:
        ContractError: when it is of another type.
    """
    if not isinstance(value, wanted):
        got = f"{type(value).__name__} {value!r}" if value is None or isinstance(value, str) else type(value).__name__
        raise ContractError(f"{type(owner).__name__}.{method} must return a {wanted.__name__}, got {got}")
    return value


def shaped(value: Any, shape: tuple[int, ...], owner: object, method: str) -> Tensor:
    """The tensor that a method of `owner` returned.

    Raises:
        ContractError: when it is none, or has another shape.
    """
    from torch import Tensor  # who only reads a configuration does without it

    tensor = returned(value, Tensor, owner, method)
    if tuple(tensor.shape) != tuple(shape):
        found = tuple(tensor.shape)
        raise ContractError(f"{type(owner).__name__}.{method} must return shape {tuple(shape)}, got {found}")
    return tensor
