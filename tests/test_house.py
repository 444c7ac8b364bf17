"""A room imports only rooms below it, and no two files import each other, at run time or for types."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flowbench"

GROUND = ("data", "flows", "metrics", "networks")
BELOW: dict[str, tuple[str, ...]] = {
    "core": (),
    **dict.fromkeys(GROUND, ("core",)),
    "training": (*GROUND, "core"),
    "evaluation": ("training", *GROUND, "core"),
    "families": ("evaluation", "training", *GROUND, "core"),
    "tasks": ("families", "evaluation", "training", *GROUND, "core"),
    "config": ("tasks", "evaluation", "families", "training", *GROUND, "core"),
    "bench": ("config", "core"),
    "commands": ("bench", "config", "tasks", "evaluation", "families", "training", *GROUND, "core"),
    "cli": ("commands", "bench", "config", "tasks", "evaluation", "families", "training", *GROUND, "core"),
}
"""Room -> rooms that it may import, ``if TYPE_CHECKING:`` included. The ground floor's rooms do not know each other."""

EVERYONE = "core"
"""The package itself guards the import of torchvision, and imports nothing else."""


def modules(package: Path) -> dict[str, Path]:
    """Dotted names of a package's files; an ``__init__`` has the name of its folder."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: Iterable[str]) -> set[str]:
    """The files that a file imports, wherever in it the import stands."""
    found, known = set(), set(known)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                found |= {deeper if deeper in known else str(node.module)} & known
    return found


def graph(package: Path) -> dict[str, set[str]]:
    """Every file of a package with those of it that it imports."""
    files = modules(package)
    return {name: imported(path, files) - {name} for name, path in files.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def wrong_edges(files: Mapping[str, set[str]]) -> list[str]:
    """Imports that lead upwards, or to a neighbour."""
    found = []
    for name, others in sorted(files.items()):
        allowed = {room(name), *(BELOW[room(name)] if room(name) else (EVERYONE,))}
        found += [f"{name} imports {other}" for other in sorted(others) if room(other) not in allowed]
    return found


def circles(files: Mapping[str, set[str]]) -> set[frozenset[str]]:
    """Largest sets of files that reach each other."""
    reach = {name: reached(name, files) for name in files}
    found = set()
    for name in files:
        circle = frozenset({other for other in reach[name] if name in reach[other]})
        if circle:
            found.add(circle)
    return found


def reached(start: str, files: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [*files[start]]
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += files[name]
    return found


def test_a_room_imports_only_rooms_below_it():
    assert not wrong_edges(graph(PACKAGE))


def test_no_file_imports_itself_through_others():
    assert not circles(graph(PACKAGE))


def test_every_folder_is_a_room_and_nothing_is_loose():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    assert folders == set(BELOW)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py"}


@pytest.mark.parametrize(
    ("place", "line", "found"),
    [
        ("flows/a.py", "from flowbench.families import b", ["flowbench.flows.a imports flowbench.families.b"]),
        ("flows/a.py", "import flowbench.data", ["flowbench.flows.a imports flowbench.data"]),
        ("bench/a.py", "def f():\n    import flowbench.families.b", ["flowbench.bench.a imports flowbench.families.b"]),
        ("__init__.py", "from flowbench import data", ["flowbench imports flowbench.data"]),
        ("families/c.py", "from flowbench.data import x", []),
    ],
)
def test_a_planted_import_is_found(tmp_path, place, line, found):
    package = tmp_path / "flowbench"
    for name in ("", "flows", "data", "families", "bench", "core"):
        (package / name).mkdir(exist_ok=True)
        (package / name / "__init__.py").touch()
    (package / "families" / "b.py").touch()
    (package / place).write_text(f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\n{line}\n")
    assert wrong_edges(graph(package)) == found


def test_a_planted_circle_is_found_though_it_is_for_types_alone(tmp_path):
    package = tmp_path / "flowbench"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.py").write_text("import typing\nif typing.TYPE_CHECKING:\n    from flowbench.b import B\n")
    (package / "b.py").write_text("def late():\n    from flowbench.c import C\n")
    (package / "c.py").write_text("from flowbench.a import A\n")
    (package / "d.py").write_text("from flowbench.a import A\n")
    assert circles(graph(package)) == {frozenset({"flowbench.a", "flowbench.b", "flowbench.c"})}
