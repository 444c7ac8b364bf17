"""Composition: experiment files, their ``base:`` lists and the overrides become one tree.

Order, later wins: the first ``-c`` file's bases, that file, the next ``-c`` file's bases, that file, ..., the
overrides. Mappings merge, lists and values replace. Three rules go beyond OmegaConf's merge:

* A budget is a choice among exclusive alternatives, so the last layer that names one (``budget:`` or
  ``trainer.max_steps``) replaces the earlier ones; two in the same layer are an error (see ``budget.py``).
* ``_replace_: true`` inside a mapping replaces the inherited mapping instead of merging into it, for instance
  to choose another network with other options.
* In ``callbacks``, ``loggers``, ``requires`` and ``evaluator.metrics``, null removes an inherited entry.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowbench.config.errors import ConfigError, one_line, suggestion
from flowbench.config.files import identify_files, names_files, with_contents
from flowbench.config.overrides import apply_override, parse_override
from flowbench.core.places import expand
from flowbench.core.resources import PREFIX, find_experiment, shipped_like

__all__ = ["Composed", "compose", "fingerprint", "significant", "to_yaml"]

REPLACE = "_replace_"
NAMED = (("callbacks",), ("loggers",), ("requires",), ("evaluator", "metrics"))
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

Tree = dict[str, Any]
Chain = tuple[Path, ...]


@dataclass(frozen=True)
class Composed:
    """One configuration, before and after interpolation.

    Attributes:
        source: the merged tree with its interpolations; ``requires`` holds absolute paths and names of shipped files.
        resolved: plain containers; ``requires`` holds the required experiments' resolved configurations, ``files`` what
            the user's own files hold.
        files: the ``-c`` files, absolute.
    """

    source: DictConfig
    resolved: Tree
    files: tuple[Path, ...]

    @property
    def source_yaml(self) -> str:
        """The unresolved configuration as YAML text."""
        return OmegaConf.to_yaml(self.source)


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


def fingerprint(resolved: Mapping[str, Any]) -> str:
    """Twelve hex digits that name the result a configuration leads to.

    Run directory, loggers, worker processes and progress display are left out; a required experiment enters
    by its own fingerprint, a file by what it holds.
    """
    files = resolved.get("files") or {}
    kept = {k: v if k == "requires" else with_contents(v, files) for k, v in resolved.items() if k != "files"}
    kept = significant(kept)
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
    return OmegaConf.to_yaml(OmegaConf.create(_escape(dict(resolved))))


def _escape(value: Any) -> Any:
    # A literal "${" in a resolved string would be read as an interpolation when the text is loaded again.
    if isinstance(value, str):
        return value.replace("${", "\\${")
    if isinstance(value, Mapping):
        return {k: _escape(v) for k, v in value.items()}
    return [_escape(v) for v in value] if isinstance(value, list) else value


def _compose(
    files: Sequence[Path | None], overrides: list[str], chain: Chain, known: Mapping[str, str] | None = None
) -> Composed:
    if not files:
        raise ConfigError("no configuration given; add -c FILE.yaml")
    tree: Tree = {}
    paths: list[Path] = []
    identified = True
    for file in files:
        if file is None:
            raise ConfigError("-c got an empty file name; write -c FILE.yaml")
        paths.append(_locate(file, Path.cwd(), None))
        layer = _load(paths[-1], chain)
        identified = identified and not _is_older_run(paths[-1], layer)
        tree = _merge(tree, layer)
    source = _override(tree, [parse_override(text) for text in overrides], chain)
    return Composed(source, _resolve(source, chain + tuple(paths), known if identified else None), tuple(paths))


def _is_older_run(path: Path, tree: Tree) -> bool:
    """Whether a file was saved by a run before contents were recorded: its fingerprint must stay what it was."""
    saved = path.name == "config.yaml" and path.with_name("config.source.yaml").is_file()
    return saved and "files" not in tree and names_files(tree)


def _locate(file: Path, directory: Path, named_in: Path | None) -> Path:
    where = f" (named in {named_in})" if named_in else ""
    try:
        path = (find_experiment(str(file)) or directory / expand(file)).resolve()
    except ValueError as error:
        raise ConfigError(f"{error}{where}") from error
    if path.is_dir():
        raise ConfigError(f"{file} is a directory, not a YAML file{where}")
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = shipped_like(file) or (suggestion(path.name, beside) if beside else "")
        raise ConfigError(f"file {file} does not exist{where}{hint}")
    return path


def _load(path: Path, chain: Chain) -> Tree:
    """Read one file and fold its bases under it."""
    if path in chain:
        names = " -> ".join(str(p) for p in (*chain[chain.index(path) :], path))
        raise ConfigError(f"configuration files name each other in a cycle: {names}")
    return _expand(_read(path), path, (*chain, path))


def _read(path: Path) -> Tree:
    try:
        node = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        since = f", {error.context} from line {error.context_mark.line + 1}" if error.context_mark else ""
        raise ConfigError(f"{path}, line {line}: not valid YAML: {error.problem}{since}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}, key '{error.full_key}': {str(error).splitlines()[0]}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {one_line(error)}") from error
    if not node:
        raise ConfigError(f"{path} is empty; an experiment file holds data, model and trainer")
    if not isinstance(node, dict):
        raise ConfigError(f"{path} must hold 'key: value' lines, not a list or a text")
    return cast(Tree, node)


def _expand(node: Tree, path: Path, chain: Chain) -> Tree:
    """Fold ``base:`` under a node and make its ``requires`` paths absolute."""
    bases = node.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        raise ConfigError(f"{path}: base must be a list of files, got {bases!r}")
    if isinstance(node.get("requires"), dict):
        node["requires"] = {k: _anchor(v, path, chain) for k, v in node["requires"].items()}
    tree: Tree = {}
    for base in bases:
        tree = _merge(tree, _load(_locate(Path(base), path.parent, path), chain))
    return _merge(tree, node)


def _anchor(value: Any, path: Path, chain: Chain) -> Any:
    if isinstance(value, str) and not value.startswith(("${", PREFIX)):
        return str(path.parent / Path(value).expanduser())
    return _expand(value, path, chain) if isinstance(value, dict) else value


def _merge(tree: Tree, layer: Tree) -> Tree:
    tree = _cut_replaced(tree, layer)
    if _names_budget(layer):
        tree = _without_budget(tree)
    merged = OmegaConf.merge(OmegaConf.create(tree), OmegaConf.create(_unmarked(layer)))
    return cast(Tree, OmegaConf.to_container(merged, resolve=False))


def _cut_replaced(tree: Tree, layer: Tree) -> Tree:
    if layer.get(REPLACE):
        return {}
    out = dict(tree)
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = _cut_replaced(out[key], value)
    return out


def _unmarked(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _unmarked(v) for k, v in value.items() if k != REPLACE}
    return value


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


def _override(tree: Tree, pairs: list[tuple[str, Any]], chain: Chain) -> DictConfig:
    layer = OmegaConf.create({})
    for key, value in pairs:
        if key.startswith(("budget", "trainer")):
            apply_override(layer, key, value)
    if _names_budget(cast(Tree, OmegaConf.to_container(layer, resolve=False))):
        tree = _without_budget(tree)
    for name in {key.split(".")[1] for key, _ in pairs if key.startswith("requires.") and key.count(".") > 1}:
        required = tree.get("requires", {}).get(name)
        if isinstance(required, str):  # an override reaches into the required file: inline it first
            tree["requires"][name] = _compose([_locate(Path(required), Path.cwd(), None)], [], chain, None).resolved
    for key, _ in pairs:
        _cut_required_budget(tree, key.split("."))
    config = OmegaConf.create(tree)
    for key, value in pairs:
        apply_override(config, key, value)
    return config


def _cut_required_budget(tree: Tree, key: list[str]) -> None:
    """An override that names the budget of a required experiment replaces it, as it does at the top."""
    node: Any = tree
    while len(key) > 2 and key[0] == "requires" and isinstance(node, dict):
        node, key = (node.get("requires") or {}).get(key[1]), key[2:]
    if node is not tree and isinstance(node, dict) and (key[0] == "budget" or key[:2] == ["trainer", "max_steps"]):
        node.pop("budget", None)
        if isinstance(node.get("trainer"), dict):
            node["trainer"].pop("max_steps", None)


def _resolve(source: DictConfig, chain: Chain, known: Mapping[str, str] | None) -> Tree:
    try:
        tree = cast(Tree, OmegaConf.to_container(source, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"key '{error.full_key}' cannot be resolved: {one_line(reason)}") from error
    return _finish(tree, chain, known)


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
        raise ConfigError(f"requires must be 'name: experiment.yaml' lines, got {requires!r}")
    for name, value in requires.items():
        if isinstance(value, str):
            requires[name] = _compose([_locate(Path(value), Path.cwd(), None)], [], chain, recorded).resolved
        elif isinstance(value, dict):
            requires[name] = _finish(value, chain, recorded)
        else:
            raise ConfigError(f"requires.{name} must be an experiment file or a mapping, got {value!r}")
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
        raise ConfigError(f"files must hold 'name: content' lines, as runs save them, got {own!r}")
    return None if known is None else {**own, **known}
