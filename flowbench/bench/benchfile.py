"""The bench file: parsed, checked, and nothing silently ignored."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowbench.bench.claims import Claim, Matched, parse_claim
from flowbench.bench.equality import EQUAL
from flowbench.bench.mappings import flatten, nest
from flowbench.bench.seed_axes import Seeds, read_bench_seeds
from flowbench.bench.tuned import check_best
from flowbench.config.compose import read_mapping
from flowbench.config.errors import ConfigError
from flowbench.config.interpolation import resolve
from flowbench.config.merge import merge, set_key, value_at
from flowbench.config.overrides import parse_override
from flowbench.config.text import plain, shown, text_of
from flowbench.core.budget import BUDGET_KINDS, read_budgets
from flowbench.core.checks import check_number, named
from flowbench.core.nearest import suggestion
from flowbench.core.places import expand
from flowbench.core.remarks import say_once
from flowbench.core.resources import find_experiment, shipped_like
from flowbench.core.sweep import BENCH_AXES, SweepAxis, read_sweep

__all__ = ["BenchFile", "Contender", "Problem", "load_bench_file"]

_EARLIER = "tasks"
_KEYS = (
    "question",
    "contenders",
    "seeds",
    "budget",
    "sweep",
    "best_by",
    "problems",
    "claims",
    "equal",
    "jobs",
    "name",
    "run_dir",
)
_RESERVED = ("base", "seed", "seeds", "budget", "run")
_NAME = re.compile(r"[A-Za-z0-9][\w-]*")


@dataclass(frozen=True)
class Contender:
    """One family with one configuration: an experiment file and what the bench changes in it.

    Attributes:
        name: name in the bench.
        experiment: its experiment file.
        overrides: what the bench changes.
        trained: the contender whose trained weights it takes, sampled or measured in another way; empty when it is
            trained itself.
        budget_share: share of the bench's budget for its own training, in (0, 1]; the rest is for what it requires.

    Example:
        >>> bench = load_bench_file("flowbench:nfm.yaml")
        >>> [contender.name for contender in bench.contenders]
        ['teacher', 'nfm', 'cfm', 'ot_cfm']
    """

    name: str
    experiment: Path
    overrides: Mapping[str, Any] = field(default_factory=dict)
    trained: str = ""
    budget_share: float = 1.0


@dataclass(frozen=True)
class Problem:
    """A problem given to all contenders, or to those in ``only``; ``reason`` is why the rest is left out.

    Example:
        >>> points = Problem("moons", {"data": {"dataset": "moons"}}, only=("cfm",), reason="the other is for images")
        >>> points.has("cfm"), points.has("starflow")
        (True, False)
    """

    name: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] | None = None
    reason: str = ""

    def has(self, contender: str) -> bool:
        """Whether the contender takes part."""
        return self.only is None or contender in self.only


@dataclass(frozen=True)
class BenchFile:
    """A checked bench file; paths are absolute.

    Example:
        >>> bench = load_bench_file("flowbench:families_mnist.yaml", ["seeds=[0]", "budget.steps=100"])
        >>> bench.name, bench.seeds, bench.budget, bench.problems[0].name
        ('families_mnist', (0,), {'steps': 100}, 'mnist')
    """

    path: Path
    name: str
    question: str
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    budget: Mapping[str, float]
    sweep: Mapping[SweepAxis, list[float]]
    problems: tuple[Problem, ...]
    claims: tuple[Claim, ...]
    jobs: int | str
    run_dir: Path | None
    equal: tuple[str, ...] = ()
    best_by: str = ""
    seed_axes: Seeds = field(default_factory=lambda: Seeds((0,)))

    @property
    def budget_shares(self) -> dict[str, float]:
        """Share of the budget of every contender that is trained on a part of it."""
        return {c.name: c.budget_share for c in self.contenders if c.budget_share != 1.0 and not c.trained}


def load_bench_file(path: str | Path, overrides: Sequence[str] = ()) -> BenchFile:
    """Read and check a bench file.

    Args:
        path: YAML file; experiment files are named relative to it, those that ship by the prefix ``flowbench:``, and
            so may the bench file itself be.
        overrides: ``key=value`` changes; an override of the budget replaces the file's budget.

    Raises:
        ConfigError: one line that names the key, the value and what to write instead.
    """
    try:
        return _load(path, overrides)
    except ValueError as error:  # on one line, whatever the user's text holds
        raise ConfigError(error) from error


def _load(path: str | Path, overrides: Sequence[str]) -> BenchFile:
    where = str(path)
    path = find_experiment(where) or expand(path)
    content = _override(_with_problems(_read(path), where), [_of_problems(text) for text in overrides])
    _known(content, _KEYS, where)
    contenders = _contenders(content.get("contenders"), path.resolve().parent, where)
    names = [contender.name for contender in contenders]
    problems = _problems(content.get("problems"), contenders, where)
    seeds = read_bench_seeds(f"{where}: seeds", content.get("seeds", [0]))
    sweep = read_sweep(f"{where}: sweep", plain(content.get("sweep")), BENCH_AXES)
    best_by = _text(content, "best_by", where)
    name = _text(content, "name", where) or path.stem
    if not _NAME.fullmatch(name):
        raise ValueError(f"{where}: name is {name!r}; use letters, digits, - and _")
    run_dir = _text(content, "run_dir", where)
    return BenchFile(
        path=path.resolve(),
        name=name,
        question=" ".join(_text(content, "question", where).split()),
        contenders=contenders,
        seeds=seeds.numbers,
        seed_axes=seeds,
        best_by=best_by,
        budget=_budget(content.get("budget"), where),
        sweep=sweep,
        problems=problems,
        claims=_claims(content.get("claims"), names, [problem.name for problem in problems], sweep, best_by, where),
        jobs=plain(content.get("jobs", "auto")),
        run_dir=expand(run_dir) if run_dir else None,
        equal=_equal(content.get("equal"), where),
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        fault = "is no regular file" if path.exists() else f"does not exist{shipped_like(path)}"
        raise ValueError(f"{path} {fault}")
    return read_mapping(path)


def _with_problems(content: dict[str, Any], where: str) -> dict[str, Any]:
    """Content in which what was called ``tasks`` in earlier versions is called ``problems``."""
    if _EARLIER not in content:
        return content
    if "problems" in content:
        raise ValueError(f"{where}: tasks is the earlier name of problems; give one of the two")
    say_once(f"{where}: tasks is read as problems, its name since rows of schema 3")
    return {"problems" if key == _EARLIER else key: value for key, value in content.items()}


def _of_problems(override: str) -> str:
    is_earlier = override.startswith((f"{_EARLIER}.", f"{_EARLIER}="))
    return f"problems{override.removeprefix(_EARLIER)}" if is_earlier else override


def _text(mapping: Mapping[str, Any], key: str, where: str) -> str:
    """A name as it was written, even where it reads as a number; empty when there is none."""
    value = mapping.get(key)
    if isinstance(value, (Mapping, list)):
        raise ValueError(f"{where}: {key} is {shown(value)}; write text")
    return "" if value is None else text_of(value)


def _override(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The file's content with the overrides; a mapping merges into the file's."""
    pairs = [parse_override(text) for text in overrides]
    if any(key.split(".")[0] == "budget" for key, _ in pairs):
        content.pop("budget", None)
    for key, value in pairs:
        there = value_at(content, key)
        both = isinstance(there, dict) and isinstance(value, dict)
        set_key(content, key, merge(there, value).tree if both else value)
    # What contenders and problems override belongs to the experiments, whose keys it may name.
    return resolve(content, late=("contenders", "problems"))


def _known(mapping: Mapping[str, Any], allowed: Iterable[str], where: str) -> None:
    for key in mapping:
        if key not in allowed:
            raise ValueError(f"{where}: unknown key {key!r}{suggestion(str(key), allowed)}")


def _check_overrides(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: overrides is {shown(value)}; write a mapping of dotted keys to values")
    nested = nest(value)
    for key in nested:
        if key in _RESERVED:
            raise ValueError(f"{where}: overrides may not set {key!r}; the bench sets it for every cell")
    return nested


def _contenders(value: Any, folder: Path, where: str) -> tuple[Contender, ...]:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(
            f"{where}: contenders is {shown(value)}; name at least one, e.g. contenders: {{cfm: cfm.yaml}}"
        )
    found: dict[str, Contender] = {}
    for name, entry in value.items():
        found[str(name)] = _contender(str(name), entry, folder, f"{where}: contender {str(name)!r}", found)
    return tuple(found.values())


def _contender(name: str, entry: Any, folder: Path, where: str, before: Mapping[str, Contender]) -> Contender:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{where}: use letters, digits, - and _")
    if name == "reference":
        raise ValueError(f"{where}: the name belongs to the reference rows; choose another")
    if isinstance(entry, str):
        entry = {"experiment": entry}
    if not isinstance(entry, Mapping) or ("experiment" in entry) == ("trained" in entry):
        raise ValueError(
            f"{where}: write a path, {{experiment: path, overrides: {{key: value}}}}, "
            "or {trained: contender, overrides: {key: value}}"
        )
    _known(entry, ("experiment", "trained", "overrides", "budget_share"), where)
    overrides = _check_overrides(entry.get("overrides"), where)
    share = entry.get("budget_share", 1.0)
    with named(where):
        check_number("budget_share", share, above=0, at_most=1, hint="1 is the bench's whole budget")
    if "trained" in entry:
        if share != 1.0:
            raise ValueError(f"{where}: trained and budget_share exclude each other: nothing is trained")
        return _retested(name, _text(entry, "trained", where), overrides, where, before)
    return Contender(name, _experiment(_text(entry, "experiment", where), folder, where), overrides, budget_share=share)


def _experiment(text: str, folder: Path, where: str) -> Path:
    """The experiment file that a bench file names."""
    try:
        path = find_experiment(text) or folder / expand(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.yaml")]
        hint = suggestion(path.name, beside, otherwise="") or shipped_like(Path(text))
        raise ValueError(f"{where}: {path} does not exist{hint}")
    return path.resolve()


def _retested(
    name: str, trained: str, overrides: Mapping[str, Any], where: str, before: Mapping[str, Contender]
) -> Contender:
    """A contender that measures another one's weights again, with other settings of its sampler."""
    if trained not in before:
        hint = suggestion(trained, before) if before else ""
        raise ValueError(f"{where}: trained names {trained!r}, which is no contender above it{hint}")
    source = before[trained]
    if source.trained:
        raise ValueError(f"{where}: trained names {trained!r}, which is not trained itself; name {source.trained!r}")
    if not overrides:
        raise ValueError(f"{where}: it would repeat {trained!r}; give overrides of what is measured in another way")
    changed = merge(source.overrides, overrides).tree
    return Contender(name, source.experiment, changed, trained, budget_share=source.budget_share)


def _budget(value: Any, where: str) -> dict[str, float]:
    with named(where):
        given = read_budgets(plain(value)) if isinstance(value, Mapping) else {}
    if len(given) != 1:
        raise ValueError(f"{where}: budget is {shown(value)}; give exactly one of {', '.join(BUDGET_KINDS)}")
    return given


def _equal(value: Any, where: str) -> tuple[str, ...]:
    names = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if name not in EQUAL:
            raise ValueError(f"{where}: equal is {shown(value)}; contenders can be held equal in {', '.join(EQUAL)}")
    return tuple(dict.fromkeys(names))


def _problems(value: Any, contenders: tuple[Contender, ...], where: str) -> tuple[Problem, ...]:
    if value is None:
        return (Problem(),)
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{where}: problems is {shown(value)}; write {{name: {{overrides: {{data.dataset: moons}}}}}}")
    problems = tuple(_problem(str(name), entry, contenders, where) for name, entry in value.items())
    for problem in problems:
        for contender in contenders:
            if contender.trained and problem.has(contender.name) and not problem.has(contender.trained):
                raise ValueError(
                    f"{where}: problem {problem.name!r} has {contender.name!r}, but not {contender.trained!r}, whose "
                    f"it takes; put both into `only`"
                )
    unused = [c.name for c in contenders if not any(problem.has(c.name) for problem in problems)]
    if unused:
        raise ValueError(f"{where}: contender {unused[0]!r} takes part in no problem; add it to one or remove it")
    return problems


def _problem(name: str, entry: Any, contenders: tuple[Contender, ...], where: str) -> Problem:
    where = f"{where}: problem {name!r}"
    if not _NAME.fullmatch(name):
        raise ValueError(f"{where}: use letters, digits, - and _")
    if entry is not None and not isinstance(entry, Mapping):
        raise ValueError(f"{where}: write {{overrides: {{key: value}}, only: [contender]}}")
    entry = entry or {}
    _known(entry, ("overrides", "only", "reason"), where)
    overrides = _check_overrides(entry.get("overrides"), where)
    for contender in contenders:
        both = flatten(overrides).keys() & flatten(contender.overrides).keys()
        if both:
            raise ValueError(f"{where}: {min(both)} is also set by contender {contender.name!r}; set it in one place")
    only = entry.get("only")
    if only is None:
        if entry.get("reason"):
            raise ValueError(f"{where}: reason explains who is left out by `only`; there is no `only` here")
        return Problem(name, overrides)
    if not isinstance(only, list) or not only:
        raise ValueError(f"{where}: only is {shown(only)}; write a list of contenders")
    names = tuple(shown(item) if isinstance(item, (Mapping, list)) else text_of(item) for item in only)
    for contender_name in names:
        _known({contender_name: None}, [c.name for c in contenders], f"{where}: only")
    reason = " ".join(_text(entry, "reason", where).split())
    return Problem(name, overrides, names, reason or "left out by the bench file")


def _claims(
    value: Any,
    contenders: list[str],
    problems: list[str],
    sweep: Mapping[SweepAxis, list[float]],
    best_by: str,
    where: str,
) -> tuple[Claim, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError(f"{where}: claims is {shown(value)}; write a list of lines")
    claims = tuple(parse_claim(text if isinstance(text, str) else shown(text)) for text in value)
    for claim in claims:
        for side in claim.quantities:
            name = f"{where}: claim {claim.text!r}"
            with named(name):
                check_best(side.axis, sweep, best_by)
            if side.problem is not None and side.problem not in problems:
                known = [known for known in problems if known]
                hint = suggestion(side.problem, known) if known else "; the bench file has no problems"
                raise ValueError(f"{name}: unknown problem {side.problem!r}{hint}")
            if side.at is not None and side.at not in sweep.get(side.axis, []):
                raise ValueError(f"{name}: {side.at:g} is not swept; sweep.{side.axis} is {sweep.get(side.axis, [])}")
        if claim.matched is not None:
            _check_matched(claim.matched, sweep, f"{where}: claim {claim.text!r}")
    return claims


def _check_matched(matched: Matched, sweep: Mapping[SweepAxis, list[float]], where: str) -> None:
    """Check that there is one sweep along which two contenders can have one value of a metric."""
    axes = [matched.axis] if matched.axis is not None else list(sweep)
    if len(axes) > 1:
        forms = " or ".join(f"'at {matched.metric} along {axis}'" for axis in axes)
        raise ValueError(f"{where}: the bench sweeps {' and '.join(axes)}; write {forms}")
    points = sweep.get(axes[0], []) if axes else []
    if len(points) < 2:
        swept = f"sweep.{axes[0]} is {points}" if axes else "the bench sweeps nothing"
        raise ValueError(f"{where}: at {matched.metric} needs a sweep of two points or more; {swept}")
