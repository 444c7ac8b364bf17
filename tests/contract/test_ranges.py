"""Every number that a public constructor or function takes has a range, and is refused outside of it in one line."""

from __future__ import annotations

import collections.abc
import importlib
import inspect
import math
import re
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowbench.core.checks import check_count, check_counts, check_interval, check_number, check_numbers, check_scale

from .range_cases import (
    ALIASES,
    CONTEXT,
    EXTRA,
    MAKERS,
    NEGATIVE,
    RESULTS,
    RESULTS_GIVEN,
    UNBOUNDED,
    VALID,
    ZERO,
)

ROOMS = ("flows", "networks", "metrics", "data", "training", "families", "evaluation", "tasks.generation", "config")
# What an abstract class asks of a derived one before it looks at its arguments.
MEMBERS = {"density": "exact"}
BAD = (math.nan, math.inf, -math.inf, -1, -1e-3, 0, 1e300, 2**70, True)


@dataclass(frozen=True)
class Parameter:
    """An argument that takes numbers: whose, its name, and where in its value the numbers stand."""

    key: str
    owner: Any
    name: str
    places: tuple[str, ...]

    @property
    def full(self) -> str:
        return f"{self.key}.{self.name}"


def annotations(target: Any) -> dict[str, Any]:
    """Annotations by name; those that only type checkers can read are left out."""
    function = target if inspect.isfunction(target) else target.__init__
    found = {}
    for name, text in inspect.get_annotations(function).items():
        try:
            found[name] = eval(text, vars(inspect.getmodule(target))) if isinstance(text, str) else text
        except NameError:
            assert not re.search(r"\b(int|float)\b", str(text)), f"{target}: {text}"
    return found


def places(hint: Any) -> Iterator[str]:
    """Where numbers stand in a value of this annotation: ``x`` itself, in a list, or in a mapping."""
    if hint in (int, float):
        yield "x"
    origin, arguments = typing.get_origin(hint), [a for a in typing.get_args(hint) if a is not Ellipsis]
    if origin in (typing.Literal, collections.abc.Callable, type) or not arguments:
        return
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            yield from places(option)
    elif origin is not None and issubclass(origin, collections.abc.Mapping):
        yield from (f"{{}}{inner}" for inner in places(arguments[-1]))
    else:
        yield from dict.fromkeys(f"[]{inner}" for option in arguments for inner in places(option))


def public() -> dict[str, Any]:
    """Classes and functions of the rooms by name; with the room where the name is not unique."""
    found = [(room, name, getattr(importlib.import_module(f"flowbench.{room}"), name))
             for room in ROOMS for name in importlib.import_module(f"flowbench.{room}").__all__]  # fmt: skip
    objects = [(room, name, o) for room, name, o in found if inspect.isclass(o) or inspect.isfunction(o)]
    count = Counter(name for _, name, _ in objects)
    listed = {
        f"{room}.{name}" if count[name] > 1 else name: o
        for room, name, o in objects
        if name not in RESULTS.get(room, ()) and not getattr(o, "_is_protocol", False)
    }
    return {**listed, **EXTRA}


def parameters() -> Iterator[Parameter]:
    for key, owner in public().items():
        hints = annotations(owner)
        for name, hint in hints.items():
            where = tuple(dict.fromkeys(places(hint)))
            if where and name != "return" and f"{key}.{name}" not in RESULTS_GIVEN:
                yield Parameter(key, owner, name, where)


PARAMETERS = list(parameters())


def valid(parameter_key: str, name: str, tmp: Path) -> dict[str, Any]:
    given = VALID.get(parameter_key, {})
    given = given(tmp) if callable(given) else dict(given)
    return {**given, **CONTEXT.get(f"{parameter_key}.{name}", lambda tmp: {})(tmp)}


def maker(key: str, owner: Any) -> Callable[..., Any]:
    """What makes an object; of an abstract class the least class that derives from it."""
    if key in MAKERS:
        return MAKERS[key]
    if inspect.isabstract(owner) or getattr(owner, "__abstractmethods__", ()):
        missing = {name: MEMBERS.get(name) for name in owner.__abstractmethods__}
        return type(f"Least{owner.__name__}", (owner,), missing)
    return owner


def with_bad(value: Any, place: str, bad: Any) -> Iterator[Any]:
    """The value with a bad number at each of its places."""
    if place == "x":
        yield bad
    elif place.startswith("[]"):
        items = list(value) if isinstance(value, collections.abc.Sequence) and not isinstance(value, str) else []
        for index, item in enumerate(items or [None]):
            for changed in with_bad(item, place[2:], bad):
                yield type(value)((*items[:index], changed, *items[index + 1 :])) if items else [changed]
    else:
        for name, item in dict(value).items():
            for changed in with_bad(item, place[2:], bad):
                yield {**value, name: changed}


def is_right(parameter: Parameter, value: Any) -> bool:
    """Whether an odd value is declared to be right for this argument."""
    declared = {
        "zero": any(parameter.full in names for names in ZERO.values()),
        "negative": any(parameter.full in names for names in NEGATIVE.values()),
        "large": any(parameter.full in names for names in UNBOUNDED.values()),
    }
    if isinstance(value, bool) or not math.isfinite(value):
        return False
    if value == 0:
        return declared["zero"] or declared["negative"]
    if value < 0:
        return declared["negative"]
    return declared["large"] and value < 1e30


def said(value: Any, message: str) -> bool:
    short = f"{value:g}" if not isinstance(value, bool) else str(value)
    return repr(value) in message or short in message


@pytest.fixture(scope="module")
def tmp(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranges")


@pytest.mark.parametrize("parameter", PARAMETERS, ids=lambda p: p.full)
def test_a_number_outside_its_range_is_refused_with_name_and_value(parameter: Parameter, tmp: Path) -> None:
    make, default = maker(parameter.key, parameter.owner), inspect.signature(parameter.owner).parameters
    kept = valid(parameter.key, parameter.name, tmp).get(parameter.name, default[parameter.name].default)
    for bad in BAD:
        accepted = 0
        for value in (value for place in parameter.places for value in with_bad(kept, place, bad)):
            try:
                make(**{**valid(parameter.key, parameter.name, tmp), parameter.name: value})
                accepted += 1
                assert is_right(parameter, bad), f"{parameter.full} = {value!r} is accepted"
            except ValueError as error:
                message = str(error)
                assert "\n" not in message, message
                assert ALIASES.get(parameter.full, parameter.name).replace("_", "-") in message.replace("_", "-")
                assert said(bad, message), f"{bad!r} is not named: {message}"
        # What is declared to be right has to be, at one of its places; counts have no fractions.
        assert accepted or not is_right(parameter, bad) or isinstance(bad, float), f"{bad!r} is refused"


@pytest.mark.parametrize("key", sorted({p.key for p in PARAMETERS}))
def test_the_valid_arguments_and_defaults_are_accepted(key: str, tmp: Path) -> None:
    owner = public()[key]
    assert maker(key, owner)(**valid(key, "", tmp)) is not None or inspect.isfunction(owner)


def test_declared_exceptions_name_arguments_that_exist() -> None:
    known = {p.full for p in PARAMETERS}
    for table in (ZERO, NEGATIVE, UNBOUNDED):
        for reason, names in table.items():
            assert names <= known, (reason, sorted(names - known))
    assert set(VALID) - set(public()) == set()
    assert {name.rpartition(".")[0] for name in CONTEXT} <= set(public())


def test_checks_take_the_numbers_of_numpy_and_refuse_texts_and_tensors() -> None:
    for value in (np.float32(0.5), np.float64(0.5), 0.5, 1, np.int64(1)):
        check_number("x", value, above=0, at_most=1)
    for value in (np.int32(3), np.uint8(3), 3):
        check_count("x", value)
    for value in ("1", None, torch.tensor(1.0), [1], np.bool_(True), np.float64("nan"), 1 + 0j):
        with pytest.raises(ValueError, match=r"^x must be a number in \(0, 1\], got "):
            check_number("x", value, above=0, at_most=1)
    for value in ("1", None, 1.0, np.float64(2.0), np.bool_(True)):
        with pytest.raises(ValueError, match=r"^x must be a whole number in \[1, 1e\+09\], got "):
            check_count("x", value)


def test_messages_hold_name_range_value_and_remedy() -> None:
    cases: list[tuple[Callable[[], None], str]] = [
        (lambda: check_number("lr", -1, above=0, hint="try it"), "lr must be a number in (0, 1e+12], got -1: try it"),
        (lambda: check_number("x", np.float64("nan")), "x must be a number in [-1e+12, 1e+12], got nan"),
        (lambda: check_number("x", 1, below=1, at_least=0.25), "x must be a number in [0.25, 1), got 1"),
        (lambda: check_number("x", "a\nb", or_none=True), "x must be a number in [-1e+12, 1e+12] or None, got 'a\\nb'"),
        (lambda: check_scale("x", 0), "x must be a number in [1e-12, 1e+12], got 0"),
        (lambda: check_count("n", 0, at_most=65536), "n must be a whole number in [1, 65536], got 0"),
        (lambda: check_counts("n", [1, 0]), "n[1] must be a whole number in [1, 1e+09], got 0"),
        (lambda: check_counts("n", ()), "n must be a list of whole numbers, got ()"),
        (lambda: check_numbers("b", [1], length=2), "b must be a list of 2 numbers, got [1]"),
        (lambda: check_interval("t", (1, 0)),
         "t must be two numbers in [0, 1], the first below the second, got (1, 0)"),
    ]  # fmt: skip
    for call, expected in cases:
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            call()
