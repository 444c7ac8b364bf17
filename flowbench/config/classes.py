"""Validation and construction of the objects a configuration names, through jsonargparse's public API.

jsonargparse decides what is valid. Its messages nest one block per level of ``class_path``, so the tree is
walked leaves first and every node is validated alone: the first complaint is then about one key of one class.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from flowbench.config.annotations import (
    accepts_none,
    arity_of,
    choices_of,
    constructor_hints,
    element_of,
    options_of,
    record_of,
)
from flowbench.config.errors import ConfigError, one_line
from flowbench.config.imports import import_class
from flowbench.core.contract import missing_parts
from flowbench.core.nearest import suggestion

__all__ = ["Arguments", "Object", "accepted_names"]

_SPEC_KEYS = frozenset({"class_path", "init_args"})


class Arguments:
    """Validated arguments of a class the configuration does not choose: ``data``, ``trainer``, ``evaluator``.

    Args:
        key: where the arguments stand, for errors.
        cls: the class they are for.
        arguments: plain containers; None is the empty mapping.

    Raises:
        ConfigError: an argument the class does not accept, a wrong type, a missing argument.
    """

    def __init__(self, key: str, cls: type, arguments: Any) -> None:
        self.key = key
        self.given = _mapping(key, arguments)
        _check_arguments(key, cls, self.given, 0)
        self._parser = _arguments_parser(cls)
        self._cls = cls
        self._config = _parse(self._parser, {"object": self.given}, key, cls)

    @property
    def parsed(self) -> dict[str, Any]:
        """The given arguments in their types, objects among them not built."""
        return self._as_given(self._config.object)

    def values(self) -> dict[str, Any]:
        """The given arguments, with the objects among them built; defaults are left to the class."""
        return self._as_given(self._parser.instantiate(self._config).object)

    def _as_given(self, found: Any) -> dict[str, Any]:
        """Keep whole numbers whole where an argument takes fractions too: to Lightning 1 is one batch and 1.0 is all.

        Which of the two jsonargparse tries first depends on what was imported before.
        """
        values = {name: getattr(found, name) for name in self.given}
        whole = {name: given for name, given in self.given.items() if type(given) is int and self._takes_whole(name)}
        return {**values, **whole}

    def _takes_whole(self, name: str) -> bool:
        return int in options_of(constructor_hints(self._cls).get(name))

    def build(self) -> Any:
        """Construct the class."""
        return self._cls(**self.values())


class Object:
    """A validated ``class_path`` / ``init_args`` mapping.

    Args:
        key: where it stands, for errors.
        hint: the base class of the object, or ``Callable[[A, B], Base]`` for a factory called with A and B.
        spec: the mapping.

    Raises:
        ConfigError: whatever is wrong with it, at any depth.
    """

    def __init__(self, key: str, hint: Any, spec: Any) -> None:
        if not isinstance(spec, Mapping) or "class_path" not in spec:
            raise ConfigError(f"{key} must be a mapping with class_path and init_args, got {_shown(spec)}")
        self.cls = _check_spec(key, spec, arity_of(hint))
        self._check_base(key, hint)
        self._parser = _object_parser(hint)
        self._config = _parse(self._parser, {"object": spec}, key, self.cls)

    def _check_base(self, key: str, hint: Any) -> None:
        base = typing.get_args(hint)[-1] if arity_of(hint) else hint
        if isinstance(base, type) and not issubclass(self.cls, base):
            raise ConfigError(f"{key}.class_path: {self.cls.__name__} is not a {base.__name__}")

    def build(self) -> Any:
        """The object, or the factory that makes it when called.

        Raises:
            ValueError: what a constructor refuses, in its own words.
        """
        try:
            return self._parser.instantiate(self._config).object
        except ValueError as error:
            reason = _inside_union(str(error))
            if reason is None:
                raise
            raise ConfigError(reason) from error


def accepted_names(cls: type) -> list[str]:
    """Names of the arguments that a class accepts, those it forwards to a parent included."""
    return _names_parser(cls, 0)[1]


# ---- parsers: made once, since reading a signature takes longer than all the rest; parsing leaves them as they are --


def _parser() -> ArgumentParser:
    return ArgumentParser(exit_on_error=False, add_help=False)


@functools.cache
def _names_parser(cls: type, skip: int) -> tuple[ArgumentParser, list[str]]:
    """A parser of a class's arguments but for the first ``skip``, and their names."""
    parser = _parser()
    return parser, parser.add_class_arguments(cls, fail_untyped=False, skip={skip} if skip else None)


@functools.cache
def _arguments_parser(cls: type) -> ArgumentParser:
    """A parser of a class's arguments under the key ``object``."""
    parser = _parser()
    parser.add_class_arguments(cls, "object", instantiate=False, fail_untyped=False)
    return parser


@functools.cache
def _object_parser(hint: Any) -> ArgumentParser:
    """A parser of an object or a factory under the key ``object``."""
    parser = _parser()
    parser.add_argument("--object", type=hint, required=True)
    return parser


def _parse(parser: ArgumentParser, tree: dict[str, Any], key: str, cls: type) -> Namespace:
    try:
        return copy.deepcopy(_parsed(parser, _Tree(tree)))  # objects must not share what one of them may change
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(_condensed(str(error), key, cls)) from error


class _Tree:
    """Plain containers that compare by content and by the classes that they name.

    A class of one's own can be defined anew under the same name; 1, 1.0 and True stay apart.
    """

    def __init__(self, content: Any) -> None:
        self.content = content
        self._identity = repr(content), tuple(_named_classes(content))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tree) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)


def _named_classes(value: Any) -> Iterator[type]:
    for _, spec, _ in _specs("", value, None):
        yield import_class("", spec["class_path"])
        yield from _named_classes(spec.get("init_args"))


@functools.lru_cache(maxsize=1024)
def _parsed(parser: ArgumentParser, tree: _Tree) -> Namespace:
    """A tree as jsonargparse parses it, cached: parsing is slow, and the contenders of a bench share most of theirs."""
    return parser.parse_object(copy.deepcopy(tree.content))  # it turns mappings into namespaces in place


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} must hold 'name: value' lines, got {_shown(value)}")
    return dict(value)


# ---- the walk --------------------------------------------------------------------------------------------


def _check_spec(key: str, spec: Mapping[str, Any], arity: int | None) -> type:
    cls = import_class(key, spec["class_path"])
    for name in spec:
        if name not in _SPEC_KEYS:
            raise ConfigError(f"{key}: unknown key '{name}' beside class_path{_beside(str(name), key, cls)}")
    if inspect.isabstract(cls):
        lacks = ", ".join(missing_parts(cls))
        raise ConfigError(
            f"{key}.class_path: {cls.__name__} is abstract, it lacks {lacks}: define them, or choose a class derived "
            "from it that does"
        )
    arguments = _mapping(f"{key}.init_args", spec.get("init_args"))
    _check_arguments(f"{key}.init_args", cls, arguments, arity)
    _check_calls(key, cls, arity)
    return cls


def _beside(name: str, key: str, cls: type) -> str:
    """What to write in place of a key that stands beside ``class_path``."""
    return f"; write {key}.init_args.{name}" if name in accepted_names(cls) else suggestion(name, _SPEC_KEYS)


def _check_arguments(key: str, cls: type, arguments: dict[str, Any], arity: int | None) -> None:
    """Names, then the objects inside, then types.

    ``arity`` is how many leading arguments the caller passes, None when the annotation leaves it open.
    """
    parser, accepted = _names_parser(cls, arity or 0)
    for name in arguments:
        if name not in accepted:
            passed = name in accepted_names(cls)
            end = " here, flowbench passes it; remove it" if passed else suggestion(str(name), accepted)
            raise ConfigError(f"{key}: {cls.__name__} does not accept '{name}'{end}")
    hints = constructor_hints(cls)
    for name, value in arguments.items():
        hint = hints.get(name)
        for inner, spec, inner_arity in _specs(f"{key}.{name}", value, hint):
            _check_spec(inner, spec, inner_arity)
        record = record_of(hint)
        if record and isinstance(value, Mapping) and "class_path" not in value:
            _check_arguments(f"{key}.{name}", record, dict(value), 0)
        elif record and value is not None and not isinstance(value, Mapping) and _is_only(record, hint):
            raise ConfigError(_expected(f"{key}.{name}", cls, hint, value))
        if value is None and hint is not None and not accepts_none(hint):
            raise ConfigError(_expected(f"{key}.{name}", cls, hint, None))
    try:
        _parsed(parser, _Tree(arguments))
    except (ArgumentError, TypeError, ValueError) as error:
        if arity is None and "arguments are required" in str(error):
            return
        raise ConfigError(_type_error(str(error), key, cls, arguments, hints)) from error


def _is_only(record: type, hint: Any) -> bool:
    return set(options_of(hint)) <= {record, type(None)}


def _check_calls(key: str, cls: type, arity: int | None) -> None:
    try:
        inspect.signature(cls).bind_partial(*[None] * (arity or 0))
    except TypeError as error:
        reason = f"it does not take the {arity} arguments that are passed to it"
        raise ConfigError(f"{key}.class_path: {cls.__name__} cannot stand here, {reason}") from error


def _specs(key: str, value: Any, hint: Any) -> Iterator[tuple[str, Mapping[str, Any], int | None]]:
    """The class_path mappings directly inside a value, with the number of arguments each is called with."""
    if isinstance(value, Mapping) and "class_path" in value:
        yield key, value, arity_of(hint)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _specs(f"{key}.{name}", item, element_of(hint))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _specs(f"{key}[{index}]", item, element_of(hint))


# ---- messages --------------------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = one_line(repr(value))
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _type_name(hint: Any) -> str:
    if hint is None or hint is type(None):
        return "null"
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    choices = choices_of(hint)
    if choices:
        others = [o for o in options_of(hint) if typing.get_origin(o) is not typing.Literal]
        return " or ".join(["one of " + ", ".join(map(repr, choices)), *map(_type_name, others)])
    if len(options_of(hint)) > 1:
        return " or ".join(_type_name(o) for o in options_of(hint))
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", str(hint))


def _expected(key: str, cls: type, hint: Any, value: Any) -> str:
    choices = [str(choice) for choice in choices_of(hint)]
    end = suggestion(value, choices, otherwise="") if isinstance(value, str) else ""
    return f"{key}: {cls.__name__} expects {_type_name(hint)}, got {_shown(value)}{end}"


def _type_error(message: str, key: str, cls: type, arguments: dict[str, Any], hints: dict[str, Any]) -> str:
    named = re.match(r'Parser key "([^"]+)"', message)
    name = named.group(1).split(".")[0] if named else ""
    subclass = re.findall(r"Import path (\S+) does not correspond to a subclass of (\w+)", message)
    if name not in arguments or "required" in message:
        return _condensed(message, key, cls)
    if subclass:
        given, base = subclass[-1]  # of a union: the class that may be written without class_path comes first
        return f"{key}.{name}.class_path: {given} is not a {base}"
    if name in hints and "class_path" not in str(arguments[name]):
        return _expected(f"{key}.{name}", cls, hints[name], arguments[name])
    return _condensed(message, key, cls)


_OTHER_TYPE = re.compile(r"Expected a|Does not|Import path \S+ does not correspond to a subclass")


def _inside_union(message: str) -> str | None:
    """The constructor's own message, which jsonargparse wraps for an argument of several types; None without one."""
    if "Does not validate against any of the Union subtypes" not in message:
        return None
    bullets = re.split(r"\n\s*- ", message.split("Errors:", 1)[-1].split("Given value type:")[0])[1:]
    # The other bullets only state that the object is not null, a number or another class.
    own = [one_line(bullet) for bullet in bullets if not _OTHER_TYPE.match(bullet.lstrip())]
    return own[-1] if own else None


def _condensed(message: str, key: str, cls: type) -> str:
    """One line of a jsonargparse message: the path of its innermost key and the reason given there."""
    path = [n.removeprefix("object").lstrip(".") for n in re.findall(r'Parser key "([^"]+)"', message)]
    where = ".".join([key, *(f"{'init_args.' if i else ''}{n}" for i, n in enumerate(p for p in path if p))])
    missing = re.search(r"the following arguments are required: ([\w., ]+?)(?:\.\s|\.?$)", message)
    if missing:
        who = cls.__name__ if where == key else "the class there"
        return f"{where}: {who} needs {missing.group(1).replace('object.', '')}"
    untyped = re.search(r"Parameter '(\w+)' from '([\w.]+)\.__init__' does not specify a type", message)
    if untyped:
        return f"{where}: {untyped.group(2)} does not annotate its argument '{untyped.group(1)}'; give it a type"
    reason = re.split(r'Parser key "[^"]+":', message)[-1].split(". Got value")[0]
    return f"{where}: {one_line(reason)}"
