"""The user's own files that an experiment names: known by what they hold, not by their names or dates.

A result depends on the data at ``data.path``, on statistics that a metric compares with, on weights that somebody else
trained, on a mask. Composition records the content of each in the section ``files``; a fingerprint takes the content in
place of the name; and a configuration that was saved is refused where a file holds something else by now.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowbench.config.errors import ConfigError
from flowbench.core.contents import content_of
from flowbench.core.folders import CLASS_FOLDERS, IMAGE_SUFFIXES
from flowbench.core.places import expand

__all__ = ["check_files", "identify_files", "names_files", "with_contents"]

# Keys that name a file or folder wherever it lies; under other keys only a text that looks like a path does.
_FILE_KEYS = ("path", "weights", "statistics", "mask", "checkpoint")
_SECTIONS = ("model", "evaluator")


@dataclass(frozen=True)
class _NamedFile:
    """A file or folder as an experiment names it.

    Attributes:
        text: the name.
        path: where that is.
        suffixes: of a folder, the files that count; None is all.
        depth: of a folder, the levels that count; None is all.
    """

    text: str
    path: Path
    suffixes: Collection[str] | None = None
    depth: int | None = None

    def content(self) -> str:
        try:
            return content_of(self.path, self.suffixes, self.depth)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def identify_files(tree: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, str]:
    """Content of the files of an experiment and of all that it requires.

    Args:
        tree: a resolved configuration; files that do not exist are left to the classes that want them.
        known: contents that were recorded before, by name; they stand, whatever the files hold by now.

    Returns:
        Content by name.

    Raises:
        ConfigError: one line: a file or folder that cannot be read.
    """
    return {file.text: known.get(file.text) or file.content() for file in _named_files(tree)}


def names_files(tree: Mapping[str, Any]) -> bool:
    """Whether an experiment names any file of the user's."""
    return next(_named_files(tree), None) is not None


def with_contents(value: Any, files: Mapping[str, str]) -> Any:
    """A configuration with the contents of files in place of their names."""
    if isinstance(value, str):
        return files.get(value, value)
    if isinstance(value, Mapping):
        return {key: with_contents(item, files) for key, item in value.items()}
    return [with_contents(item, files) for item in value] if isinstance(value, list) else value


def check_files(tree: Mapping[str, Any]) -> None:
    """Refuse an experiment whose files hold something else than when it was configured.

    Args:
        tree: a resolved configuration with its section ``files``.

    Raises:
        ConfigError: one line with the file, both contents and the remedy.
    """
    recorded = tree.get("files") or {}
    for file in _named_files(tree):
        known = recorded.get(file.text)
        if known is not None and (now := file.content()) != known:
            raise ConfigError(
                f"{file.text}: holds something else than when this run was configured ({known}, now {now}): restore "
                "it, or start another run with the override files=null"
            )


def _named_files(tree: Mapping[str, Any]) -> Iterator[_NamedFile]:
    data = tree.get("data")
    own = data.get("path") if isinstance(data, Mapping) else None
    if isinstance(own, str) and (path := _existing(own)):
        yield _NamedFile(own, path, IMAGE_SUFFIXES, CLASS_FOLDERS)
    for section in _SECTIONS:
        for text, path in _paths(section, tree.get(section)):
            if text != own:
                yield _NamedFile(text, path)
    requires = tree.get("requires")
    for required in requires.values() if isinstance(requires, Mapping) else ():
        if isinstance(required, Mapping):
            yield from _named_files(required)


def _paths(key: str, value: Any) -> Iterator[tuple[str, Path]]:
    """The texts below a key that name existing files or folders."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _paths(str(name), item)
    elif isinstance(value, list):
        for item in value:
            yield from _paths(key, item)
    elif isinstance(value, str) and key != "class_path":
        is_path = key in _FILE_KEYS or "/" in value
        # A bare word with an ending may be a file; a folder of that name is there by chance.
        if is_path or Path(value).suffix:
            path = _existing(value)
            if path and (is_path or path.is_file()):
                yield value, path


def _existing(text: str) -> Path | None:
    """The file or folder of a name; None where there is none, or a pipe."""
    try:
        path = expand(text)
        return path if path.is_file() or path.is_dir() else None
    except (OSError, ValueError):  # too long, no such user, a zero byte
        return None
