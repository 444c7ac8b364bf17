"""Tables of what is available: families, datasets, metrics, networks and experiment files.

Nothing here imports torch: the classes are read from their source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from flowbench.core.class_reader import ClassReader
from flowbench.core.resources import PREFIX, experiment_names, resource
from flowbench.core.terminal import terminal_width, wrapped

__all__ = ["data_table", "listing"]

Rows = list[tuple[str, str]]

_LEAST_TEXT = 36
"""Columns that a text needs beside its name; with less it goes below."""


def listing(kind: str | None = None) -> str:
    """One table, or all of them.

    Args:
        kind: ``families``, ``datasets``, ``metrics``, ``networks`` or ``experiments``; None is everything.

    Returns:
        Text that fits the terminal: each item's name (as ``class_path`` takes it) and what it is.

    Raises:
        ValueError: an unknown kind.
    """
    if kind is not None and kind not in _TABLES:
        raise ValueError(f"there is no list of '{kind}'; there are {', '.join(_TABLES)}")
    kinds = [kind] if kind else list(_TABLES)
    return "\n\n".join(_table(name, _TABLES[name]()) for name in kinds)


def _table(title: str, rows: Rows) -> str:
    if not rows:
        return f"{title}\n  none found"
    first = max(len(name) for name, _ in rows) + 4
    beside = terminal_width() - first >= _LEAST_TEXT
    lines = [_beside(*row, first) if beside else _below(*row) for row in rows]
    return "\n".join([title, *lines])


def _beside(name: str, text: str, first: int) -> str:
    return wrapped(text, f"  {name:<{first - 2}}", " " * first)


def _below(name: str, text: str) -> str:
    return "\n".join([f"  {name}", wrapped(text, " " * 6, " " * 6)]).rstrip()


def data_table() -> str:
    """The catalogue with shape, classes, sizes, download, whether and where each dataset is here, and licence."""
    from flowbench.core.places import data_root
    from flowbench.data.inventory import inventory

    rows = inventory()
    lines = [("name", "shape", "classes", "train + val + test", "download", "present")]
    for row in rows:
        sizes = " + ".join(f"{n:,}" for n in row.num_samples.values()) or "-"
        download = f"{row.download_mb:.0f} MB" if row.download_mb else "none"
        shape = "x".join(map(str, row.shape))
        lines.append((row.name, shape, str(row.num_classes or "-"), sizes, download, "yes" if row.present else "no"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = ["  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    licences: dict[str, list[str]] = {}
    for row in rows:
        licences.setdefault(row.licence, []).append(row.name)
    notes = [wrapped(f"{', '.join(names)}: {licence}", further="  ") for licence, names in licences.items()]
    places = [wrapped(f"here: {row.folder}", further="  ") for row in rows if row.folder]
    places.append(wrapped(f"downloads go to {data_root()} (FLOWBENCH_DATA names another folder)", further="  "))
    return "\n".join([*table, "", "licences", *notes, "", *places])


@cache
def _reader() -> ClassReader:
    return ClassReader("flowbench", Path(__file__).resolve().parents[1])


def _classes(room: str, keep: Callable[[str], bool]) -> Rows:
    """The classes that a room exports and that can be built, with the first lines of their docstrings."""
    reader, module = _reader(), f"flowbench.{room}"
    names = [f"{module}.{name}" for name in sorted(reader.exported(module))]
    return [(name, reader.summary(name)) for name in names if not reader.is_abstract(name) and keep(name)]


def _derived(base: str, *without: str) -> Callable[[str], bool]:
    return lambda name: _reader().is_subclass(name, base) and name not in (base, *without)


def _families() -> Rows:
    return _classes("families", _derived("flowbench.training.TrainingModule", "flowbench.families.FlowModule"))


def _networks() -> Rows:
    return _classes("networks", _derived("torch.nn.Module", "flowbench.networks.VelocityNetwork"))


def _metrics() -> Rows:
    is_metric, tasks = _derived("flowbench.evaluation.Metric"), Path(__file__).resolve().parents[1] / "tasks"
    files = sorted([*tasks.glob("*/__init__.py"), *tasks.glob("*/metrics.py")])
    rooms = [f"tasks.{path.parent.name}" + (".metrics" if path.stem == "metrics" else "") for path in files]
    return [row for room in ("evaluation", *rooms) for row in _classes(room, is_metric)]


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
    """One line about a file: ``question:`` of a bench, else its first comment."""
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
