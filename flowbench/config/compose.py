"""Composition: experiment files, their ``base:`` lists and the overrides become one tree.

Order, later wins: the first ``-c`` file's bases, that file, the next ``-c`` file's bases, that file, ..., the
overrides. Mappings merge, lists and values replace (``merge.py``). Three rules are the experiments' own:

* A budget is a choice among exclusive alternatives, so the last layer that names one (``budget:`` or
  ``trainer.max_steps``) replaces the earlier ones; two in the same layer are an error (see ``budget.py``).
* In ``callbacks``, ``loggers``, ``requires``, ``evaluator.metrics`` and ``evaluator.references``, null removes an
  inherited entry.
* A required experiment file is trained on the data of the experiment that requires it (``followed_data.py``).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowbench.config.earlier_names import with_earliest_names, with_present_names
from flowbench.config.errors import ConfigError, one_line
from flowbench.config.files import identify_files, names_files, with_contents
from flowbench.config.followed_data import with_data_of
from flowbench.config.interpolation import escape, resolve
from flowbench.config.merge import Layer, merge, set_key, split_key, without_marks
from flowbench.config.overrides import parse_override
from flowbench.config.text import Tree, kind, plain, read_yaml, shown, write_yaml
from flowbench.core.nearest import suggestion
from flowbench.core.places import expand
from flowbench.core.resources import PREFIX, find_experiment, shipped_like

__all__ = ["Composed", "compose", "compose_tree", "fingerprint", "read_mapping", "significant", "to_yaml"]

NAMED = (("callbacks",), ("loggers",), ("requires",), ("evaluator", "metrics"), ("evaluator", "references"))
# Keys that move files, threads or lines on a screen, but no number.
NEUTRAL: dict[str, tuple[str, ...]] = {
    "trainer": (
        "default_root_dir",
        "enable_model_summary",
        "enable_progress_bar",
        "log_every_n_steps",
        "profiler",
    ),
    "data": ("num_workers",),
}
NEUTRAL_SECTIONS = ("run", "loggers", "threads", "progress")

Chain = tuple[Path, ...]


@dataclass(frozen=True)
class Composed:
    """One configuration, before and after interpolation.

    Attributes:
        source: the merged tree with its interpolations; ``requires`` holds absolute paths and names of shipped files.
        resolved: plain containers; ``requires`` holds the required experiments' resolved configurations, ``files`` what
            the user's own files hold.
        files: the ``-c`` files, absolute.

    Example:
        >>> composed = compose(["flowbench:toy/cfm.yaml"], ["data.batch_size=64"])
        >>> composed.resolved["data"]["dataset"], composed.resolved["data"]["batch_size"]
        ('eight_gaussians', 64)
        >>> len(fingerprint(composed.resolved))
        12
    """

    source: Tree
    resolved: Tree
    files: tuple[Path, ...]

    @property
    def source_yaml(self) -> str:
        """The unresolved configuration as YAML text."""
        return write_yaml(self.source)


def compose(files: Sequence[str | Path], overrides: Iterable[str] = (), *, identify: bool = True) -> Composed:
    """Merge files and overrides into one configuration.

    Args:
        files: YAML files, later ones win. Relative paths inside a file start at that file; ``flowbench:`` before a name
            means a file that ships.
        overrides: ``key=value`` texts, applied in order after the files.
        identify: record what the user's own files hold, which reads them; False leaves the section ``files`` out.

    Returns:
        The configuration, unresolved and resolved.

    Raises:
        ConfigError: no file, a missing or malformed file, a cycle, a malformed override, an interpolation
            that cannot be resolved. One line.
    """
    return _compose([Path(f) if str(f) else None for f in files], list(overrides), (), {} if identify else None)


def compose_tree(tree: Mapping[str, Any], name: str, directory: Path) -> Composed:
    """The configuration of a file that has this content; nothing is read but its bases and what it requires.

    Args:
        tree: the content; its relative paths start at the directory.
        name: of the text, for errors.
        directory: where the file would lie.

    Raises:
        ConfigError: as :func:`compose`.
    """
    source = _expand(with_present_names(copy.deepcopy(dict(tree))), name, directory, ()).tree
    return Composed(source, _finish(resolve(source), (), {}), ())


def fingerprint(resolved: Mapping[str, Any]) -> str:
    """Twelve hex digits that name the result a configuration leads to.

    Run directory, loggers, worker processes and progress display are left out; a required experiment enters
    by its own fingerprint, a file by what it holds.
    """
    resolved = plain(resolved)
    files = resolved.get("files") or {}
    kept = {k: v if k == "requires" else with_contents(v, files) for k, v in resolved.items() if k != "files"}
    kept = with_earliest_names(significant(kept))
    if isinstance(kept.get("requires"), Mapping):
        kept["requires"] = {k: fingerprint(v) for k, v in kept["requires"].items()}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def significant(resolved: Mapping[str, Any]) -> Tree:
    """A copy of a configuration without what changes no number."""
    kept = {k: v for k, v in resolved.items() if k not in NEUTRAL_SECTIONS}
    for section, keys in NEUTRAL.items():
        if isinstance(kept.get(section), Mapping):
            kept[section] = {k: v for k, v in kept[section].items() if k not in keys}
    return kept


def to_yaml(resolved: Mapping[str, Any]) -> str:
    """A resolved configuration as YAML text that composes to an equal configuration."""
    return write_yaml(escape(dict(resolved)))


def read_mapping(path: Path) -> Tree:
    """Read a YAML file whose top level is a mapping; interpolations stay as they are written.

    Raises:
        ConfigError: one line with the path: it cannot be read, is not YAML, is empty or holds something else.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {_reason(error)}") from error
    node = read_yaml(text, str(path))
    if node is None or node == {}:
        raise ConfigError(f"{path} is empty; write 'key: value' lines")
    if not isinstance(node, dict):
        raise ConfigError(f"{path} must hold 'key: value' lines, not {kind(node)}")
    return dict(with_present_names(node))


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8 text"
    return one_line((isinstance(error, OSError) and error.strerror) or error)


def _compose(
    files: Sequence[Path | None],
    overrides: list[str],
    chain: Chain,
    known: Mapping[str, str] | None = None,
    required_by: Mapping[str, Any] | None = None,
) -> Composed:
    """Merge files; ``required_by`` is the resolved experiment that requires this one, whose data it is trained on."""
    if not files:
        raise ConfigError("no configuration given; add -c FILE.yaml")
    layer = Layer({})
    paths: list[Path] = []
    identified = True
    for file in files:
        if file is None:
            raise ConfigError("-c got an empty file name; write -c FILE.yaml")
        paths.append(_locate(file, Path.cwd(), None))
        loaded = _load(paths[-1], chain)
        identified = identified and not _is_older_run(paths[-1], loaded.tree)
        layer = _merge(layer, loaded)
    source = with_present_names(_override(layer.tree, [parse_override(text) for text in overrides], chain))
    if required_by is not None and ("data" in source or "data" in required_by):
        source["data"] = with_data_of(source.get("data"), escape(required_by.get("data")))
    resolved = _finish(resolve(source), chain + tuple(paths), known if identified else None)
    return Composed(source, resolved, tuple(paths))


def _is_older_run(path: Path, tree: Tree) -> bool:
    """Whether a file was saved by a run before contents were recorded: its fingerprint must stay what it was."""
    saved = path.name == "config.yaml" and path.with_name("config.source.yaml").is_file()
    return saved and "files" not in tree and names_files(tree)


def _locate(file: Path, directory: Path, named_in: str | None) -> Path:
    where = f" (named in {named_in})" if named_in else ""
    try:
        path = find_experiment(str(file)) or directory / expand(file)
    except ValueError as error:
        raise ConfigError(f"{error}{where}") from error
    try:
        path = path.resolve()
        if path.is_file():
            return path
        fault = "is a directory, not a YAML file" if path.is_dir() else "is no regular file"
        if not path.exists():
            beside = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
            fault = f"does not exist{shipped_like(file) or (suggestion(path.name, beside) if beside else '')}"
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, links in a circle, a null byte
        fault = f"cannot be read: {_reason(error)}"
    fault, semicolon, hint = fault.partition(";")
    raise ConfigError(f"file {one_line(file)} {fault}{where}{semicolon}{hint}")


def _load(path: Path, chain: Chain) -> Layer:
    """Read one file and fold its bases under it."""
    if path in chain:
        names = " -> ".join(str(p) for p in (*chain[chain.index(path) :], path))
        raise ConfigError(f"configuration files name each other in a cycle: {names}")
    return _expand(read_mapping(path), str(path), path.parent, (*chain, path))


def _expand(node: Tree, name: str, directory: Path, chain: Chain) -> Layer:
    """Fold ``base:`` under the content of a text and make its ``requires`` paths absolute."""
    given = node.pop("base", None) or []
    bases = [given] if isinstance(given, str) else given
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        raise ConfigError(f"{name}: base must be a list of files, got {plain(given)!r}")
    if isinstance(node.get("requires"), dict):
        required = node["requires"].items()
        node["requires"] = {k: _anchor(v, name, directory, chain) for k, v in required}
    layer = Layer({})
    for base in bases:
        layer = _merge(layer, _load(_locate(Path(base), directory, name), chain))
    return _merge(layer, Layer.of(node, name))


def _anchor(value: Any, name: str, directory: Path, chain: Chain) -> Any:
    if isinstance(value, str) and not value.startswith(("${", PREFIX)):
        return str(directory / expand(value))
    return _expand(value, name, directory, chain).tree if isinstance(value, dict) else value


def _merge(low: Layer, high: Layer) -> Layer:
    if _names_budget(high.tree):
        low = Layer(_without_budget(low.tree), low.texts)
    merged = merge(low, high)
    return Layer(without_marks(merged.tree), merged.texts)


def _is_budget(value: Any) -> bool:
    return value is not None and value != -1


def _names_budget(layer: Tree) -> bool:
    budget, trainer = layer.get("budget"), layer.get("trainer")
    named = any(_is_budget(v) for v in budget.values()) if isinstance(budget, dict) else bool(budget)
    return named or (isinstance(trainer, dict) and _is_budget(trainer.get("max_steps")))


def _without_budget(tree: Tree) -> Tree:
    out = {k: v for k, v in tree.items() if k != "budget"}
    if isinstance(out.get("trainer"), dict):
        out["trainer"] = {k: v for k, v in out["trainer"].items() if k != "max_steps"}
    return out


def _override(tree: Tree, pairs: list[tuple[str, Any]], chain: Chain) -> Tree:
    layer: Tree = {}
    for key, value in pairs:
        if key.startswith(("budget", "trainer")):
            set_key(layer, key, copy.deepcopy(value))
    if _names_budget(layer):
        tree = _without_budget(tree)
    inner = {key for key, _ in pairs if split_key(key)[:1] == ("requires",)}
    for key, value in pairs:
        if key not in inner:
            set_key(tree, key, without_marks(value))
    _inline(tree, {split_key(key)[1] for key in inner if len(split_key(key)) > 2}, chain)
    for key in inner:
        _cut_required_budget(tree, split_key(key))
    for key, value in pairs:
        if key in inner:
            set_key(tree, key, without_marks(value))
    return tree


def _inline(tree: Tree, names: Iterable[str], chain: Chain) -> None:
    """Replace the names of required files by what the files hold, so that overrides can reach into it."""
    required = tree.get("requires")
    for name in names:
        if isinstance(required, dict) and isinstance(required.get(name), str):
            file = _locate(Path(required[name]), Path.cwd(), None)
            outer = resolve({key: value for key, value in tree.items() if key != "requires"})
            required[name] = _compose([file], [], chain, None, outer).resolved


def _cut_required_budget(tree: Tree, key: tuple[str, ...]) -> None:
    """An override that names the budget of a required experiment replaces it, as it does at the top."""
    node: Any = tree
    while len(key) > 2 and key[0] == "requires" and isinstance(node, dict):
        required = node.get("requires")
        node, key = required.get(key[1]) if isinstance(required, dict) else None, key[2:]
    if node is not tree and isinstance(node, dict) and (key[0] == "budget" or key[:2] == ("trainer", "max_steps")):
        node.pop("budget", None)
        if isinstance(node.get("trainer"), dict):
            node["trainer"].pop("max_steps", None)


def _drop_nulls(tree: Tree, names: tuple[str, ...]) -> None:
    parent: Any = tree
    for name in names[:-1]:
        parent = parent.get(name) if isinstance(parent, dict) else None
    if isinstance(parent, dict) and isinstance(parent.get(names[-1]), dict):
        parent[names[-1]] = {k: v for k, v in parent[names[-1]].items() if v is not None}


def _finish(tree: Tree, chain: Chain, known: Mapping[str, str] | None) -> Tree:
    """Drop removed entries, inline the required experiments, to any depth, and record what files hold.

    ``known`` are contents that an outer experiment recorded; None leaves files as they are.
    """
    for names in NAMED:
        _drop_nulls(tree, names)
    recorded = _recorded(tree, known)
    requires = tree.get("requires") or {}
    if not isinstance(requires, dict):
        raise ConfigError(f"requires must be 'name: experiment.yaml' lines, got {plain(requires)!r}")
    for name, value in requires.items():
        if isinstance(value, str):
            file = _locate(Path(value), Path.cwd(), None)
            requires[name] = _compose([file], [], chain, recorded, tree).resolved
        elif isinstance(value, dict):
            requires[name] = _finish(value, chain, recorded)
        else:
            raise ConfigError(f"requires.{name} must be an experiment file or a mapping, got {plain(value)!r}")
        requires[name].pop("evaluator", None)  # it is trained here, not measured: its metrics name no other result
    if recorded is not None:
        inner = {text: content for value in requires.values() for text, content in (value.get("files") or {}).items()}
        if files := identify_files(tree, {**inner, **recorded}):
            tree["files"] = files
    return tree


def _recorded(tree: Tree, known: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """Contents that were recorded before, those of the outer experiment first; None where none shall be."""
    own = tree.pop("files", None) or {}
    if not isinstance(own, dict) or not all(isinstance(v, str) for pair in own.items() for v in pair):
        raise ConfigError(f"files must hold 'name: content' lines, as runs save them, got {shown(own)}")
    return None if known is None else {**own, **known}
