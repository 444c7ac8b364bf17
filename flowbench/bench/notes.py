"""Lines below the tables that keep a reader from claiming too much: copies, samples off the data, too few of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from flowbench.bench.frechet import is_frechet
from flowbench.bench.results import Results
from flowbench.core.rows import Row
from flowbench.core.sample_size import sample_size_warning

__all__ = ["reading_notes"]

INCEPTION_FEATURES = 2048
AUTHENTIC = 1 / 6
"""Half of the lowest authenticity that fresh samples have, 1/3 in one dimension; copies have 0."""
COPYING = -3.0
"""Three standard deviations of ``data_copying`` where samples are as far from the training data as held-out data."""
NEAR, FAR = 0.5, 2.0
"""Half and twice the distance to the training data that held-out data have; fresh samples have a ratio near 1."""
SUPPORT = 0.05
"""Precision and density below this: next to no sample has real data around it."""
BELOW_FLOOR = 0.8
"""Frechet distances below this share of the floor's: two held-out splits of digits differ by a ninth."""
FEW = 100
"""Samples from which on a share is known to 0.05, its standard error."""


def reading_notes(results: Results, problem: str) -> list[str]:
    """Notes below the tables of one problem, one line each."""
    references = results.references(problem)
    names = [name for name in results.contenders(problem) if name not in references]
    where = f"{problem}: " if problem else ""
    lines = [
        line for name in names for line in (*_copies(results, problem, name), *_off_the_data(results, problem, name))
    ]
    lines += [
        *_probes(results, problem, names),
        *_duplicates(results, problem),
        *_sample_sizes(results, problem, names),
    ]
    return [f"{where}{line}." for line in lines]


def _copies(results: Results, problem: str, name: str) -> Iterator[str]:
    """Whether samples are copies of training data, or close to being that."""
    for features in _features(results, problem, name, "authenticity", "data_copying", "neighbour_distance_ratio"):
        share = results.mean(problem, name, f"authenticity{features}")
        z = results.mean(problem, name, f"data_copying{features}")
        ratio = results.mean(problem, name, f"neighbour_distance_ratio{features}")
        copied = share is not None and share < AUTHENTIC
        near = (z is not None and z < COPYING) or (ratio is not None and ratio < NEAR)
        if not (copied or near):
            continue
        what = "looks like copies of the" if copied else "is closer than held-out data to the"
        numbers = [
            ("authenticity", share, "1/3 to 1/2"),
            ("data_copying", z, "within 3 of 0"),
            ("neighbour_distance_ratio", ratio, "about 1"),
        ]
        known = [f"{base}{features} {x:.3g} (fresh samples: {fresh})" for base, x, fresh in numbers if x is not None]
        yield f"{name} {what} training data: {', '.join(known)}"
    for metric in filter(is_frechet, results.metrics(problem, name)):
        value, floor = (results.mean(problem, who, metric) for who in (name, "floor"))
        alike = results.protocol(problem, name, metric) == results.protocol(problem, "floor", metric)
        if alike and value is not None and floor is not None and value < BELOW_FLOOR * floor:
            yield (
                f"{name} is better than held-out data ({metric} {value:.3g}, floor {floor:.3g}): it may copy the "
                "training data, which the metric Memorization tells"
            )


def _off_the_data(results: Results, problem: str, name: str) -> Iterator[str]:
    """Whether samples are where no data are."""
    found = []
    for base in ("precision", "density"):
        for features in _features(results, problem, name, base):
            value = results.mean(problem, name, base + features)
            if value is not None and value < SUPPORT:
                found.append(f"{base}{features} {value:.3g}")
    for features in _features(results, problem, name, "neighbour_distance_ratio"):
        ratio = results.mean(problem, name, f"neighbour_distance_ratio{features}")
        if ratio is not None and ratio > FAR:
            found.append(f"neighbour_distance_ratio{features} {ratio:.3g} (fresh samples: about 1)")
    for metric in results.metrics(problem, name):
        if (results.group(metric), results.goal(metric)) != ("quality", "down"):
            continue
        value, noise = results.mean(problem, name, metric), results.mean(problem, "noise", metric)
        if value is not None and noise is not None and value > noise:
            found.append(f"{metric} {value:.3g} is worse than that of noise, {noise:.3g}")
    if found:
        yield f"{name} is off the data: {', '.join(found)}"


def _probes(results: Results, problem: str, names: Sequence[str]) -> Iterator[str]:
    """What the random probes of estimated divergences leave open in likelihoods."""
    found = []
    for name in names:
        rows = results.main_rows(problem, name, "nll")
        errors = [row.provenance["probe_standard_error"] for row in rows if "probe_standard_error" in row.provenance]
        if errors:
            found.append(f"{name} {max(errors):.1g} {rows[0].unit}")
    if found:
        yield f"nll: standard error over the probes of Hutchinson's estimate, of the seed with most: {', '.join(found)}"


def _duplicates(results: Results, problem: str) -> Iterator[str]:
    """Whether held-out data repeat the training data."""
    for features in _features(results, problem, "floor", "authenticity"):
        share = results.mean(problem, "floor", f"authenticity{features}")
        if share is not None and share < AUTHENTIC:
            yield (
                f"held-out data look like copies of the training data (floor.authenticity{features} {share:.3g}): "
                "where a split repeats another one, neither copies nor overfitting can be seen"
            )


def _sample_sizes(results: Results, problem: str, names: Sequence[str]) -> Iterator[str]:
    """Numbers of samples that are small for their claim, or another one than the floor's."""
    rows = [row for row in results.rows if row.problem == problem and row.n is not None and row.value is not None]
    for count in sorted({row.n for row in rows if row.metric == "fid" and row.n is not None}):
        if (warning := sample_size_warning(count, INCEPTION_FEATURES)) is not None:
            yield f"fid: {warning}"
    for count, metrics in _by_count(row for row in rows if row.contender in names and row.n and row.n < FEW):
        yield (
            f"{', '.join(metrics)}: N={count} samples are few: a share is uncertain by 0.05 or more, a mean by a tenth "
            "of its spread, and much of a distance is its bias"
        )
    for metric in results.metrics(problem):
        floor = {row.n for row in results.main_rows(problem, "floor", metric)}
        others = {row.n for name in names for row in results.main_rows(problem, name, metric)} - floor
        if floor and others and is_frechet(metric):
            yield (
                f"{metric}: the floor stands at N={_join(floor)}, others at N={_join(others)}, and the distance "
                "depends on N"
            )


def _by_count(rows: Iterable[Row]) -> list[tuple[int, list[str]]]:
    found: dict[int, dict[str, None]] = {}
    for row in rows:
        # FID has a note of its own, and the points of a check are as few as they need be.
        if row.group == "quality" and row.metric not in ("fid", "nll_error") and row.n is not None:
            found.setdefault(row.n, {})[row.metric] = None
    return [(count, list(metrics)) for count, metrics in sorted(found.items())]


def _features(results: Results, problem: str, name: str, *bases: str) -> list[str]:
    """The extractors of metrics of these names, as they stand in brackets in the table's heading."""
    found = (metric.partition("[") for metric in results.metrics(problem, name))
    return list(dict.fromkeys(f"[{rest}" if bracket else "" for base, bracket, rest in found if base in bases))


def _join(counts: Iterable[int | None]) -> str:
    return ", ".join(str(count) for count in sorted(count for count in counts if count is not None))
