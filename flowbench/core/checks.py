"""Checks of numbers that a user gives: one line with the name, the range, the value that came and what to do.

Every range is closed on top: without a bound of its own a number is at most 1e12 and a count at most 1e9. NaN, infinity
and booleans are refused everywhere, unless a bound is itself infinite.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = [
    "LARGEST",
    "LARGEST_BUDGET",
    "LARGEST_SEED",
    "MOST",
    "SMALLEST",
    "check_count",
    "check_counts",
    "check_interval",
    "check_number",
    "check_numbers",
    "check_scale",
    "check_seed",
    "named",
]

# Squares of both, inverted or summed over a billion values, are finite and not zero in float32.
LARGEST, SMALLEST = 1e12, 1e-12
# More samples, steps or channels than any machine holds, and every product of two still fits into 64 bits.
MOST = 10**9
LARGEST_SEED = 2**63 - 1
# Operations of the largest trainings, times a thousand.
LARGEST_BUDGET = 1e30


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    hint: str = "",
    or_none: bool = False,
) -> None:
    """Refuse what is no real number between two bounds.

    Args:
        name: what the user calls it.
        value: what came.
        above: open lower bound, in place of `at_least`.
        at_least: closed lower bound; without either it is -1e12.
        below: open upper bound, in place of `at_most`.
        at_most: closed upper bound; without either it is 1e12.
        hint: what to do, or what the values mean.
        or_none: None will do.

    Raises:
        ValueError: one line with name, range, value and hint.
    """
    if value is None and or_none:
        return
    low, high = (-LARGEST if at_least is None else at_least), (LARGEST if at_most is None else at_most)
    inside = _is_real(value) and (value >= low if above is None else value > above)  # type: ignore[operator]
    if not (inside and (value <= high if below is None else value < below)):  # type: ignore[operator]
        start = f"[{_bound(low)}" if above is None else f"({_bound(above)}"
        end = f"{_bound(high)}]" if below is None else f"{_bound(below)})"
        raise ValueError(_message(name, f"a number in {start}, {end}", value, hint, or_none))


def check_scale(name: str, value: object, *, hint: str = "", or_none: bool = False) -> None:
    """Refuse what cannot be multiplied with, divided by and squared: a number in [1e-12, 1e12] will do.

    Raises:
        ValueError: one line with name, range, value and hint.
    """
    check_number(name, value, at_least=SMALLEST, at_most=LARGEST, hint=hint, or_none=or_none)


def check_count(
    name: str, value: object, *, at_least: int = 1, at_most: float = MOST, hint: str = "", or_none: bool = False
) -> None:
    """Refuse what is no whole number between two bounds, both included; NumPy's integers will do.

    Args:
        name: what the user calls it.
        value: what came.
        at_least: smallest value.
        at_most: largest value.
        hint: what to do, or what the values mean.
        or_none: None will do.

    Raises:
        ValueError: one line with name, range, value and hint.
    """
    if value is None and or_none:
        return
    if not (_is_whole(value) and at_least <= value <= at_most):  # type: ignore[operator]
        wanted = f"a whole number in [{_bound(at_least)}, {_bound(at_most)}]"
        raise ValueError(_message(name, wanted, value, hint, or_none))


def check_seed(name: str, value: object, *, or_none: bool = False) -> None:
    """Refuse what is no seed: a whole number of at least 0 that fits into 64 bits.

    Raises:
        ValueError: one line with name, range and value.
    """
    check_count(name, value, at_least=0, at_most=LARGEST_SEED, or_none=or_none)


def check_numbers(name: str, values: object, *, length: int | None = None, hint: str = "", **bounds: Any) -> None:
    """Refuse what is no list of numbers between two bounds; a wrong entry is named by its place.

    Args:
        name: what the user calls the list.
        values: what came: a list, a tuple or another sequence.
        length: how many; None takes any number but none.
        hint: what to do, or what the values mean.
        bounds: of each, as :func:`check_number` takes them.

    Raises:
        ValueError: one line with name, range, value and hint.
    """
    for index, value in enumerate(_sequence(name, values, length, "numbers", hint)):
        check_number(f"{name}[{index}]", value, hint=hint, **bounds)


def check_counts(
    name: str, values: object, *, length: int | None = None, or_empty: bool = False, hint: str = "", **bounds: Any
) -> None:
    """Refuse what is no list of whole numbers between two bounds; a wrong entry is named by its place.

    Args:
        name: what the user calls the list.
        values: what came: a list, a tuple or another sequence.
        length: how many; None takes any number but none.
        or_empty: none will do.
        hint: what to do, or what the values mean.
        bounds: of each, as :func:`check_count` takes them.

    Raises:
        ValueError: one line with name, range, value and hint.
    """
    if or_empty and isinstance(values, Sequence) and not values:
        return
    for index, value in enumerate(_sequence(name, values, length, "whole numbers", hint)):
        check_count(f"{name}[{index}]", value, hint=hint, **bounds)


def check_interval(name: str, value: object, *, low: float = 0.0, high: float = 1.0, hint: str = "") -> None:
    """Refuse what is no pair of numbers with ``low <= first < second <= high``.

    Raises:
        ValueError: one line with name, range, value and hint.
    """
    check_numbers(name, value, length=2, at_least=low, at_most=high, hint=hint)
    assert isinstance(value, Sequence)  # as the line above has seen
    if not value[0] < value[1]:
        raise ValueError(
            _message(
                name, f"two numbers in [{_bound(low)}, {_bound(high)}], the first below the second", value, hint, False
            )
        )


@contextmanager
def named(key: str) -> Iterator[None]:
    """Say of whose argument a refusal inside of the block is: ``key: message``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _sequence(name: str, values: object, length: int | None, what: str, hint: str) -> Sequence[object]:
    listed = isinstance(values, Sequence) and not isinstance(values, str | bytes)
    if not listed or not values or length not in (None, len(values)):  # type: ignore[arg-type]
        wanted = f"a list of {what}" if length is None else f"a list of {length} {what}"
        raise ValueError(_message(name, wanted, values, hint, False))
    return values  # type: ignore[return-value]


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _bound(number: float) -> str:
    """The short form of a number where it is exact: 1e+12, 65536, 0.5."""
    short = f"{number:g}"
    return short if float(short) == number else str(number)


def _message(name: str, wanted: str, value: object, hint: str, or_none: bool) -> str:
    plain = value.item() if hasattr(value, "item") and _is_real(value) else value  # NumPy writes np.float64(nan)
    shown = " ".join(repr(plain).split())
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return f"{name} must be {wanted}{' or None' if or_none else ''}, got {shown}{f': {hint}' if hint else ''}"
