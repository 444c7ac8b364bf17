"""Published values beside ours: what others reported of the same metric and data, and whether it may be compared."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from flowbench.bench.results import Results
from flowbench.bench.statistics import Summary, summarise
from flowbench.bench.tables import Entry, TextTable, format_summary
from flowbench.config.text import plain, read_yaml
from flowbench.core.rows import Row

__all__ = ["FILE", "Comparison", "PublishedResult", "comparisons", "load_published", "page_rows", "published_table"]

FILE = Path(__file__).parents[1] / "reference_results.yaml"
"""What ships: every value in it was read."""

NOT_STATED = "not stated"
SEEN_IN = {"paper": "", "repository": ", read in its repository", "transcription": ", read in a transcription"}
"""Where a value was read, and how that is told."""
_SOURCE = ("arxiv", "table", "line", "seen_in")
_ARXIV = re.compile(r"\d{4}\.\d{4,5}")

# The protocols of feature metrics and of likelihoods, in their metrics' order.
_FEATURES = re.compile(
    r"(?P<extractor>[^/]+)/(?P<resize>[^/]+(?:/bf16)?)/(?P<reference>[a-z]+-\w+)/(?P<samples>\d+)(?:/(?P<further>.+))?"
)
_LIKELIHOOD = re.compile(
    r"(?P<kind>exact|ode|bound|head)/(?P<split>\w+)/(?P<samples>\d+)(?:/(?P<condition>given-label))?"
    r"(?:/(?P<dequantisation>uniform-dequantisation-\d+-levels|bin-centres-\d+-levels))?"
    r"(?:/(?P<solver>[^/]+))?(?:/(?P<divergence>[^/]+))?(?:/(?P<further>.+))?"
)
_STEPS = re.compile(r"num_steps=\d+")


@dataclass(frozen=True)
class PublishedResult:
    """One published value with all that decides whether a row may be set beside it.

    Attributes:
        metric: as our rows name it.
        value: the number.
        unit: as in our rows, empty for pure numbers.
        dataset: name in the catalogue.
        family: class of :mod:`flowbench.families` that the published model is one of.
        protocol: words by name, as in our rows' protocols; ``not stated`` where the source is silent.
        sampler: as our rows write it; None for numbers of no samples.
        network_evaluations: per sample; None where there are none, or where they were not stated.
        guidance: scale, 1 = none; None for a flow without labels; ``not stated`` where the source is silent.
        source: ``arxiv``, ``table``, ``line`` of the table, and ``seen_in``: where the value was read.
        read: always true: a value that nobody read is refused.

    Raises:
        ValueError: one line, for a field of the wrong type, or a value that was not read.

    Example:
        >>> entry = load_published()[0]
        >>> entry.metric, entry.value, entry.source["arxiv"]
        ('fid', 6.35, '2210.02747')
    """

    metric: str
    value: float
    unit: str
    dataset: str
    family: str
    protocol: Mapping[str, str]
    sampler: str | None
    network_evaluations: float | None
    guidance: float | str | None
    source: Mapping[str, str]
    read: bool

    def __post_init__(self) -> None:
        if self.read is not True:
            raise ValueError(f"read is {self.read!r}; only values that were read may stand here: leave the entry out")
        for name in ("metric", "unit", "dataset", "family"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be text")
        if not _is_number(self.value):
            raise ValueError(f"value is {self.value!r}; it must be a finite number")
        for name in ("network_evaluations", "guidance"):
            silent = name == "guidance" and self.guidance == NOT_STATED
            if not (silent or getattr(self, name) is None or _is_number(getattr(self, name))):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a finite number or null")
        if not (self.sampler is None or isinstance(self.sampler, str)):
            raise ValueError(f"sampler is {self.sampler!r}; it must be text or null")
        if not isinstance(self.protocol, Mapping) or not self.protocol:
            raise ValueError(f"protocol is {self.protocol!r}; give its words by name, e.g. samples: 50000")
        object.__setattr__(self, "protocol", {name: str(word) for name, word in self.protocol.items()})
        self._check_source()

    def _check_source(self) -> None:
        source = self.source
        if not isinstance(source, Mapping) or set(source) != set(_SOURCE) or not all(source.values()):
            raise ValueError(f"source is {source!r}; give all of {', '.join(_SOURCE)}")
        if not _ARXIV.fullmatch(str(source["arxiv"])):
            raise ValueError(f"source.arxiv is {source['arxiv']!r}; give a quoted number such as '2210.02747'")
        if source["seen_in"] not in SEEN_IN:
            raise ValueError(f"source.seen_in is {source['seen_in']!r}; use one of {', '.join(SEEN_IN)}")
        object.__setattr__(self, "source", {name: str(word) for name, word in source.items()})

    @property
    def cited(self) -> str:
        """The source in words."""
        s = self.source
        table = f"Table {s['table']}" if s["table"].isdigit() else f"table {s['table']}"
        return f"arXiv {s['arxiv']}, {table} ({s['line']}){SEEN_IN[s['seen_in']]}"


@dataclass(frozen=True)
class Comparison:
    """A published value beside the row of a contender.

    Attributes:
        contender: its name.
        ours: mean over its seeds.
        published: what was reported.
        reasons: why the two may not be compared; empty where they may.
    """

    contender: str
    ours: Summary
    published: PublishedResult
    reasons: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """``yes``, or ``no, because ...``."""
        return f"no, because {'; '.join(self.reasons)}" if self.reasons else "yes"

    @property
    def sentence(self) -> str:
        """The comparison in one sentence, for a page of results."""
        theirs = self.published
        unit = f" {theirs.unit}" if theirs.unit else ""
        return (
            f"{self.contender}: {theirs.metric} {format_summary(self.ours)}{unit}; published for {theirs.family}: "
            f"{theirs.value:g}{unit} ({theirs.cited}); comparable: {self.verdict}."
        )


def load_published(path: Path = FILE) -> list[PublishedResult]:
    """The published values of a file.

    Raises:
        ValueError: one line that names the entry, where a field is missing, unknown or wrong.
    """
    tree = plain(read_yaml(path.read_text(encoding="utf-8"), str(path)))
    entries = tree.get("results") if isinstance(tree, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list 'results', got {type(entries).__name__}")
    return [_entry(entry, f"{path}, entry {number}") for number, entry in enumerate(entries, start=1)]


def _entry(entry: Any, where: str) -> PublishedResult:
    names = [field.name for field in fields(PublishedResult)]
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must hold 'key: value' lines, got {entry!r}")
    if missing := [name for name in names if name not in entry]:
        raise ValueError(f"{where}: without {', '.join(missing)}")
    if unknown := sorted(entry.keys() - set(names)):
        raise ValueError(f"{where}: with unknown {', '.join(unknown)}; known: {', '.join(names)}")
    try:
        return PublishedResult(**entry)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


@cache
def _shipped() -> tuple[PublishedResult, ...]:
    return tuple(load_published())


def comparisons(
    results: Results, problem: str, contenders: Sequence[str], published: Sequence[PublishedResult] | None = None
) -> list[Comparison]:
    """Published values of the metrics, data set and families of a problem, each beside our row.

    Args:
        results: the rows.
        problem: problem name.
        contenders: whose rows; those without a published value are passed over.
        published: the values; None takes those that ship.
    """
    entries = _shipped() if published is None else published
    return [found for name in contenders for entry in entries for found in _beside(results, problem, name, entry)]


def _beside(results: Results, problem: str, contender: str, entry: PublishedResult) -> Iterator[Comparison]:
    """At most one comparison: with the point of a sweep of as many evaluations, where the row itself had others."""
    metric, wanted = entry.metric, entry.network_evaluations
    rows = [row for row in results.main_rows(problem, contender, metric) if _is_about(row, entry)]
    values = results.values(problem, contender, metric) if rows else {}
    swept = results.sweep(problem, contender, metric).get(float(wanted), {}) if wanted is not None else {}
    if swept and all(row.network_evaluations != wanted for row in rows):
        at_point = (problem, contender, metric, "network_evaluations", wanted)
        named = (row for row in results.rows if (row.problem, row.contender, row.metric, row.axis, row.at) == at_point)
        rows, values = [row for row in named if _is_about(row, entry)], swept
    if rows and values:
        yield Comparison(contender, summarise(list(values.values())), entry, tuple(_differences(rows[0], entry)))


def _is_about(row: Row, entry: PublishedResult) -> bool:
    return (row.dataset, row.family) == (entry.dataset, entry.family)


def _differences(row: Row, entry: PublishedResult) -> Iterator[str]:
    """In what a row differs from a published value, and what the source does not state."""
    words = [(name, _words(row.protocol).get(name), entry.protocol.get(name)) for name in _names(row, entry)]
    words.insert(0, ("unit", row.unit, entry.unit))
    if entry.sampler is not None:  # else a number of no samples
        words.append(("sampler", _rule(row.sampler), _rule(entry.sampler)))
        if "num_steps" in entry.sampler:  # what an adaptive solver spends is an outcome
            words.append(("network evaluations", _amount(row.network_evaluations), _amount(entry.network_evaluations)))
        words.append(("guidance", _scale(row.guidance), _scale(entry.guidance)))
    for name, ours, theirs in words:
        if theirs not in (ours, NOT_STATED):
            yield f"{name} {ours or 'none'} here, {theirs or 'none'} there"
    if silent := [name for name, _, theirs in words if theirs == NOT_STATED]:
        yield f"not stated there: {', '.join(silent)}"


def _names(row: Row, entry: PublishedResult) -> list[str]:
    return list(dict.fromkeys([*entry.protocol, *_words(row.protocol)]))


def _words(protocol: str) -> dict[str, str]:
    """The words of a row's protocol by name."""
    for pattern in (_LIKELIHOOD, _FEATURES):
        if (found := pattern.fullmatch(protocol)) is not None:
            return {name: word for name, word in found.groupdict().items() if word is not None}
    return {"protocol": protocol}


def _rule(sampler: str) -> str:
    """A sampler without its number of steps, which the network evaluations count."""
    return _STEPS.sub("", sampler)


def _scale(guidance: float | str | None) -> str:
    if isinstance(guidance, str):
        return guidance
    return "without labels" if guidance is None else f"{guidance:g} with labels"


def _amount(number: float | None) -> str:
    return "none" if number is None else f"{number:g}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def published_table(results: Results, problem: str, contenders: Sequence[str]) -> TextTable | None:
    """Published values beside our rows; None where nothing was published of what was measured."""
    found = comparisons(results, problem, contenders)
    if not found:
        return None
    title = "Published beside ours" + (f": {problem}" if problem else "")
    table = TextTable(title, ["contender", "metric", "ours", "published", "comparable", "source"])
    for one in found:
        unit = f" ({one.published.unit})" if one.published.unit else ""
        texts = [one.contender, one.published.metric + unit, format_summary(one.ours), f"{one.published.value:g}"]
        table.rows.append([*map(Entry, texts), Entry(one.verdict, bold=not one.reasons), Entry(one.published.cited)])
    table.notes = [
        "Comparable: both numbers were measured in the same way. What was trained, and for how long, is another matter."
    ]
    return table


def page_rows(entries: Sequence[PublishedResult]) -> dict[str, list[tuple[str, str, str]]]:
    """The page of published values, ``docs/results/published.md``, without what is said of ours.

    Args:
        entries: the values.

    Returns:
        By family, in order: what was measured (metric, unit, data set, sampler, evaluations), the value, the source.

    Example:
        >>> page_rows(load_published())["FlowMatching"][1]
        ('nll, bits/dim, cifar10', '3.11', 'arXiv 2210.02747, Table 4 (FM w/ OT, K = 1), read in a transcription')
    """
    rows: dict[str, list[tuple[str, str, str]]] = {}
    for entry in entries:
        rows.setdefault(entry.family, []).append((_measured(entry), f"{entry.value:g}", entry.cited))
    return rows


def _measured(entry: PublishedResult) -> str:
    """What a published value is of; a number of steps in the sampler stands for the evaluations."""
    sampler = "" if entry.sampler in (None, NOT_STATED) else f"`{entry.sampler}`"
    number = None if "num_steps" in sampler else entry.network_evaluations
    spent = "" if number is None else f"{number:g} evaluation{'' if number == 1 else 's'}"
    return ", ".join(word for word in (entry.metric, entry.unit, entry.dataset, sampler, spent) if word)
