"""YAML text to plain containers and back: the one reader and writer of what a user writes.

Scalars mean what they mean to OmegaConf: YAML 1.1 without dates, and with floats such as 1e-3. Keys are always text. A
number or a truth value that was written in a form of its own, such as 1e3, 007 or yes, carries that text: it may turn
out to be a name (see ``fitting.py``), and it is written back as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import yaml

from flowbench.config.errors import ConfigError, one_line

__all__ = ["MAX_DEPTH", "Tree", "Word", "check_text", "kind", "plain", "read_yaml", "shown", "text_of", "write_yaml"]

Tree: TypeAlias = dict[str, Any]

MAX_DEPTH = 64
MAX_VALUES = 100_000
MAX_SHOWN = 120

_CORE = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT = (f"{_CORE}{name}" for name in ("null", "bool", "int", "float"))
_MERGE, _EQUALS, _TEXT = f"{_CORE}merge", f"{_CORE}value", f"{_CORE}str"
_SCALARS = frozenset({_NULL, _BOOL, _INT, _FLOAT, _EQUALS, _TEXT})
# OmegaConf's, so that 1e-3 is a number.
_FLOAT_FORM = re.compile(
    r"""^(?:[-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)
    |\.[0-9]+(?:_[0-9]+)*(?:[eE][-+][0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*(?::[0-5]?[0-9])+\.[0-9_]*
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_RARE_BREAK = re.compile("[\r\x85\u2028\u2029]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Whole(int):
    """A whole number that was written in a form of its own, such as 007 or 1_000."""

    text: str


class _Real(float):
    """A number that was written in a form of its own, such as 1e3 or 2.50."""

    text: str


class Word(str):
    """A truth value that was written as yes, no, on, off, True or the like.

    It is this text where a name is wanted, and ``truth`` where a truth value is.
    """

    truth: bool

    @property
    def text(self) -> str:
        """The word as plain text."""
        return str.__str__(self)


def plain(value: Any) -> Any:
    """The same value in which numbers and truth values carry no text."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, Word):
        return value.truth
    if isinstance(value, _Whole):
        return int(value)
    return float(value) if isinstance(value, _Real) else value


def text_of(value: Any) -> str:
    """A scalar as it was written."""
    if isinstance(value, (_Whole, _Real, Word)):
        return value.text
    return str(value).lower() if isinstance(value, bool) else str(value)


def kind(value: Any) -> str:
    """The kind of a value, in a user's words."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list) else f"the value {shown(text_of(value))}"


def shown(value: Any) -> str:
    """A value as messages quote it: on one line, the end of a long one left out."""
    text = one_line(repr(plain(value)))
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


# ---- reading --------------------------------------------------------------------------------------------------------


def _implicit_resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Which plain scalars are numbers, truth values and null; the same for reading and writing."""
    found = yaml.resolver.Resolver.yaml_implicit_resolvers
    kept = {first: [pair for pair in pairs if pair[0] != f"{_CORE}timestamp"] for first, pairs in found.items()}
    for first in "-+0123456789.":
        kept.setdefault(first, []).append((_FLOAT, _FLOAT_FORM))
    return kept


class _Loader(yaml.SafeLoader):
    # The parser in C would be faster, but a file of brackets overflows its stack and ends the process.
    yaml_implicit_resolvers = _implicit_resolvers()
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} levels deep", problem_mark=mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_yaml(text: str, where: str) -> Any:
    """Read one YAML document.

    Args:
        text: the document.
        where: what it is, for errors: a path, or an override.

    Returns:
        Dicts with text keys, lists, numbers, truth values, text and None; None for an empty document.

    Raises:
        ConfigError: one line with the number of the line, for text that is not YAML, several documents, duplicate
            keys, keys that are lists or mappings, tags that are no plain values, values that contain themselves, more
            than 64 levels or 100,000 values.
    """
    check_text(text, where)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _Builder(loader).build(node)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        since = f", {error.context} from line {error.context_mark.line + 1}" if error.context_mark else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {one_line(error.problem)}{since}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {one_line(error)}") from error


def check_text(text: str, where: str) -> None:
    """Refuse text that no file could hold.

    Raises:
        ConfigError: Python holds a surrogate for every byte of the command line that is not UTF-8.
    """
    if _SURROGATE.search(text):
        raise ConfigError(f"{where}: not valid text: it holds bytes that are not UTF-8")


class _Builder:
    """From YAML's nodes to containers; what an alias names is built again."""

    def __init__(self, loader: _Loader) -> None:
        self._loader = loader
        self._values = 0
        self._open: list[yaml.Node] = []

    def build(self, node: yaml.Node) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            raise _problem(node, f"aliases expand it to more than {MAX_VALUES:,} values")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if any(node is other for other in self._open):
            raise _problem(node, "a value contains itself")
        if len(self._open) >= MAX_DEPTH:
            raise _problem(node, f"aliases nest it more than {MAX_DEPTH} levels deep")
        if node.tag not in (f"{_CORE}map", f"{_CORE}seq"):
            raise _unread(node)
        self._open.append(node)
        built = self._mapping(node) if isinstance(node, yaml.MappingNode) else [self.build(n) for n in node.value]
        self._open.pop()
        return built

    def _mapping(self, node: yaml.MappingNode) -> Tree:
        own: Tree = {}
        merged: Tree = {}
        for key, value in node.value:
            if key.tag == _MERGE:
                for source in reversed(value.value if isinstance(value, yaml.SequenceNode) else [value]):
                    if not isinstance(source, yaml.MappingNode):
                        raise _problem(source, "what '<<' names must be a mapping")
                    merged.update(self.build(source))
                continue
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _SCALARS:
                raise _problem(key, "a key must be plain text")
            if key.value in own:
                raise _problem(key, f"found duplicate key {key.value}")
            own[_checked(key)] = self.build(value)
        return {**merged, **own}

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text = _checked(node)
        if node.tag == _NULL:
            return None
        if node.tag in (_TEXT, _EQUALS):
            return text
        if node.tag == _BOOL:
            return self._truth(node, text)
        if node.tag not in (_INT, _FLOAT):
            raise _unread(node)
        return self._number(node, text)

    def _truth(self, node: yaml.ScalarNode, text: str) -> bool | Word:
        if text.lower() not in self._loader.bool_values:
            raise _problem(node, f"{text!r} is not a truth value")
        truth = self._loader.bool_values[text.lower()]
        if text in ("true", "false"):
            return truth
        word = Word(text)
        word.truth = truth
        return word

    def _number(self, node: yaml.ScalarNode, text: str) -> int | float | str:
        """The number, or the text where it is none: 0x_, 12e4567, or more digits than a float can hold."""
        try:
            whole = node.tag == _INT
            number = self._loader.construct_yaml_int(node) if whole else self._loader.construct_yaml_float(node)
            if float(number) in (float("inf"), float("-inf")) and "inf" not in text.lower():
                return text
        except (ValueError, OverflowError, IndexError):
            return text
        if repr(number) == text:
            return number
        written = _Whole(number) if whole else _Real(number)
        written.text = text
        return written


def _checked(node: yaml.ScalarNode) -> str:
    if _SURROGATE.search(node.value):
        raise _problem(node, "half of a surrogate pair is not text")
    return str(node.value)


def _unread(node: yaml.Node) -> yaml.MarkedYAMLError:
    tag = node.tag.replace(_CORE, "!!")
    return _problem(node, f"the tag {tag} is not read here; write plain values, lists and mappings")


def _problem(node: yaml.Node, text: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark)


# ---- writing --------------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _implicit_resolvers()

    def ignore_aliases(self, data: Any) -> bool:
        """Write a container that occurs twice two times."""
        return True


def _represent(tag: str) -> Callable[[_Dumper, Any], yaml.ScalarNode]:
    return lambda dumper, value: dumper.represent_scalar(tag, value.text)


def _represent_text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    # In single quotes, PyYAML writes these breaks as they are and reads them as blanks.
    style = '"' if _RARE_BREAK.search(value) else None
    return dumper.represent_scalar(_TEXT, value, style=style)


_Dumper.add_representer(str, _represent_text)
for _type, _tag in ((_Whole, _INT), (_Real, _FLOAT), (Word, _BOOL)):
    _Dumper.add_representer(_type, _represent(_tag))


def write_yaml(tree: Mapping[str, Any]) -> str:
    """Plain containers as YAML text; ``read_yaml`` reads the same back."""
    text: str = yaml.dump(dict(tree), Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
    return text
