"""Tables of what is available: families, datasets, metrics, networks and experiment files."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flowbench.core.resources import PREFIX, experiment_names, resource

__all__ = ["data_table", "listing"]

Rows = list[tuple[str, str]]


def listing(kind: str | None = None) -> str:
    """One table, or all of them.

    Args:
        kind: ``families``, ``datasets``, ``metrics``, ``networks`` or ``experiments``; None is everything.

    Returns:
        Text, one line per item: its name (as ``class_path`` takes it) and what it is.

    Raises:
        ValueError: an unknown kind.
    """
    if kind is not None and kind not in _TABLES:
        raise ValueError(f"there is no list of '{kind}'; there are {', '.join(_TABLES)}")
    kinds = [kind] if kind else list(_TABLES)
    return "\n\n".join(_table(name, _TABLES[name]()) for name in kinds)


def _table(title: str, rows: Rows) -> str:
    width = max((len(name) for name, _ in rows), default=0)
    lines = [f"  {name:<{width}}  {text}".rstrip() for name, text in rows] or ["  none found"]
    return "\n".join([title, *lines])


def data_table() -> str:
    """The catalogue with shape, classes, sizes, licence, and whether and where each dataset is here, as text."""
    from flowbench.core.places import data_root
    from flowbench.data.inventory import inventory

    header = ("name", "shape", "classes", "train + val + test", "download", "present", "licence")
    lines = [header]
    rows = inventory()
    for row in rows:
        sizes = " + ".join(f"{n:,}" for n in row.num_samples.values()) or "-"
        download = f"{row.download_mb:.0f} MB" if row.download_mb else "none"
        shape = "x".join(map(str, row.shape))
        classes = str(row.num_classes or "-")
        lines.append((row.name, shape, classes, sizes, download, "yes" if row.present else "no", row.licence))
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    table = ["  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    places = [f"here: {row.folder}" for row in rows if row.folder]
    return "\n".join([*table, *places, f"downloads go to {data_root()} (FLOWBENCH_DATA names another folder)"])


def _classes(room: str, keep: Callable[[type], bool]) -> Rows:
    module = importlib.import_module(f"flowbench.{room}")
    found = [(name, getattr(module, name)) for name in sorted(module.__all__)]
    return [
        (f"flowbench.{room}.{name}", _first_line(item))
        for name, item in found
        if isinstance(item, type) and not inspect.isabstract(item) and keep(item)
    ]


def _first_line(item: Any) -> str:
    return next(iter((inspect.getdoc(item) or "").splitlines()), "")


def _families() -> Rows:
    from flowbench.families import FlowModule, TrainingModule

    return _classes("families", lambda c: issubclass(c, TrainingModule) and c not in (TrainingModule, FlowModule))


def _networks() -> Rows:
    from torch import nn

    from flowbench.networks import VelocityNetwork

    return _classes("networks", lambda c: issubclass(c, nn.Module) and c is not VelocityNetwork)


def _metrics() -> Rows:
    from flowbench.evaluation import Metric

    return _classes("evaluation", lambda c: issubclass(c, Metric))


def _datasets() -> Rows:
    from flowbench.data import USER_FORMATS, list_datasets

    rows = [(entry.name, f"{entry.description} [{entry.licence}]") for entry in list_datasets()]
    return rows + [(name, f"your own data: a {form}") for name, form in USER_FORMATS.items()]


def _experiments() -> Rows:
    return [(name, _comment(path)) for name, path in _yaml_files() if not _is_part(name)]


def _is_part(name: str) -> bool:
    """Whether an experiment file lies in a folder of what others are based on."""
    return "base" in Path(name.removeprefix(PREFIX)).parts


def _yaml_files() -> Iterable[tuple[str, Path]]:
    """Experiment files of the working directory, then those that ship, by the names that ``-c`` takes."""
    here, shipped = Path("experiments"), resource("experiments")
    yield from ((str(path), path) for path in sorted(here.rglob("*.yaml")))
    if here.resolve() != shipped:
        yield from ((f"{PREFIX}{name}", shipped / name) for name in experiment_names())


def _comment(path: Path) -> str:
    """What a file says about itself: ``question:`` of a bench, else its first comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith("question:"):
            return line.removeprefix("question:").strip()
    return next((line.lstrip("# ").strip() for line in lines if line.startswith("#")), "")


_TABLES: dict[str, Callable[[], Rows]] = {
    "families": _families,
    "datasets": _datasets,
    "metrics": _metrics,
    "networks": _networks,
    "experiments": _experiments,
}
