"""Lists come without torch, fit the terminal, and say what the imported classes say."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from flowbench.cli import main
from flowbench.commands import listing
from flowbench.core.class_reader import ClassReader
from flowbench.core.rows import Row, write_rows
from flowbench.data import DENSITIES, list_datasets
from flowbench.evaluation import Metric
from flowbench.families import FlowModule
from flowbench.networks import VelocityNetwork
from flowbench.training import TrainingModule

ROOT = Path(__file__).parents[2]
KINDS = ("families", "datasets", "metrics", "networks", "experiments")
TRUTH = {
    "families": (("families",), lambda c: issubclass(c, TrainingModule) and c not in (TrainingModule, FlowModule)),
    "networks": (("networks",), lambda c: issubclass(c, nn.Module) and c is not VelocityNetwork),
    "metrics": (("evaluation", "tasks.anomaly.metrics", "tasks.generation"), lambda c: issubclass(c, Metric)),
}


@pytest.mark.parametrize("kind", TRUTH)
def test_the_list_is_what_importing_would_tell(kind):
    rooms, keep = TRUTH[kind]
    modules = [importlib.import_module(f"flowbench.{room}") for room in rooms]
    wanted = [
        (f"{module.__name__}.{name}", inspect.getdoc(item).splitlines()[0])
        for module in modules
        for name, item in ((name, getattr(module, name)) for name in sorted(module.__all__))
        if isinstance(item, type) and not inspect.isabstract(item) and keep(item)
    ]
    assert listing._TABLES[kind]() == wanted
    assert len(wanted) > 5


@pytest.mark.parametrize("room", ["families", "networks", "evaluation", "flows", "data", "metrics"])
def test_the_source_says_of_every_class_what_importing_it_says(room):
    reader, name = ClassReader("flowbench", ROOT / "flowbench"), f"flowbench.{room}"
    module = importlib.import_module(name)
    classes = {n: getattr(module, n) for n in module.__all__ if inspect.isclass(getattr(module, n))}
    assert set(reader.exported(name)) == set(classes)
    for own, item in classes.items():
        dotted = f"{name}.{own}"
        assert reader.is_abstract(dotted) == inspect.isabstract(item), dotted
        assert reader.summary(dotted) == inspect.getdoc(item).splitlines()[0]
        for base in item.__mro__[1:]:
            if base.__module__.startswith("flowbench."):
                assert reader.is_subclass(dotted, f"{base.__module__}.{base.__qualname__}"), (dotted, base)
        for other in classes.values():
            wanted = other in item.__mro__
            assert reader.is_subclass(dotted, f"{other.__module__}.{other.__qualname__}") == wanted, (dotted, other)


BASE = """
from abc import ABC, abstractmethod
class Base(ABC):
    @abstractmethod
    def a(self): ...
    @property
    @abstractmethod
    def b(self): ...
class Half(Base):
    '''Half.

    More.'''
    a = 3
class Mixin:
    b: int = 1
class Plain(dict[str, int]):
    def method(self): ...
"""
ROOM = """
from pack.base import Half, Mixin
from pack.base import Plain as Other
from elsewhere import Stranger
VALUE = 3
class Whole(Mixin, Half):
    'Whole.'
__all__ = ['Half', 'Other', 'Stranger', 'VALUE', 'Whole']
"""


def test_a_source_is_read_in_any_form(tmp_path):
    (tmp_path / "room").mkdir()
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "base.py").write_text(BASE)
    (tmp_path / "room" / "__init__.py").write_text(ROOM)
    reader = ClassReader("pack", tmp_path)
    assert reader.exported("pack.room") == ["Half", "Other", "Whole"]
    assert [reader.is_abstract(f"pack.room.{n}") for n in ("Half", "Other", "Whole")] == [True, False, False]
    assert [reader.summary(f"pack.room.{n}") for n in ("Half", "Other", "Whole")] == ["Half.", "", "Whole."]
    assert reader.is_subclass("pack.room.Whole", "pack.base.Base")
    assert reader.is_subclass("pack.room.Other", "dict")
    assert not reader.is_subclass("pack.room.Other", "pack.base.Base")


def test_a_density_is_described_by_its_own_first_line():
    for name, density in DENSITIES.items():
        (entry,) = [entry for entry in list_datasets() if entry.name == name]
        assert entry.description == f"2-D: {density.summary}"
        assert inspect.getdoc(type(density)).startswith(f"{density.summary}. Version {density.version}.")


@pytest.mark.parametrize("columns", [60, 80, 120, 300])
@pytest.mark.parametrize("words", [*(["list", kind] for kind in KINDS), ["list"], ["data", "list"]], ids=" ".join)
def test_every_line_fits_the_terminal(words, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(ROOT)
    assert main(words) == 0
    for line in capsys.readouterr().out.splitlines():
        # A path or a dotted name is not broken, and the catalogue is a table.
        fits = len(line) <= columns or len(line.split()) == 1
        assert fits or (words == ["data", "list"] and columns < 80), line


def test_eighty_columns_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.chdir(ROOT)
    assert main(["list", "experiments"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 60 < max(map(len, lines)) <= 80


@pytest.fixture
def bench(tmp_path) -> Path:
    """A finished run and a bench of one cell, enough to compare and to report on."""
    given = {"bench": "b", "problem": "", "contender": "cfm", "family": "F", "dataset": "moons", "seed": 0, "unit": ""}
    row = Row(**given, metric="w2", value=0.5, n=10, protocol="test/10", network_evaluations=4.0, weights="ema")
    folder = tmp_path / "b"
    for place in (folder / "cells" / "cfm" / "seed-0", tmp_path / "run"):
        write_rows(place / "rows.jsonl", [row])
    write_rows(folder / "results.jsonl", [row])
    plan = {
        "name": "b", "question": "Which?", "contenders": ["cfm"], "seeds": [0], "budget": {"steps": 1}, "sweep": {},
        "claims": [], "tasks": {"": ["cfm"]}, "reasons": {}, "policy": "one at a time", "jobs": 1, "threads": 1,
        "cells": [],
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan))
    return tmp_path


WITHOUT_TORCH = [
    *(["list", kind] for kind in KINDS), ["list"], ["data", "list"], ["--help"], ["--version"], ["fit", "--help"],
    ["report", "b"], ["compare", "run", "b"], ["data", "get", "moons"],
    ["fit", "-c", "{root}/experiments/digits/starflow.yaml", "--print-config"],
    ["fit", "-c", "missing.yaml"], ["bench", "-c", "missing.yaml"],
]  # fmt: skip
CODE = """
import json, sys
from flowbench.cli import main
from flowbench.bench.plan import make_plan
heavy = ("torch", "lightning", "torchmetrics", "numba", "sklearn")
for words in json.loads(sys.argv[1]):
    main(words)
    loaded = [name for name in heavy if name in sys.modules]
    assert not loaded, (words, loaded)
make_plan(sys.argv[2] + "/experiments/toy_2d.yaml")
assert "torch" not in sys.modules, "the plan of a bench"
"""


def test_torch_is_not_imported_where_nothing_computes(bench):
    """In one process, one after the other: what one imported would show at the next."""
    words = [[word.format(root=ROOT) for word in command] for command in WITHOUT_TORCH]
    command = [sys.executable, "-c", CODE, json.dumps(words), str(ROOT)]
    done = subprocess.run(command, cwd=bench, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "flowbench.families.STARFlow" in done.stdout
    assert "cifar10" in done.stdout
