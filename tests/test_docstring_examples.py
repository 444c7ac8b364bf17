"""The example in the docstring of every public class runs and prints what it shows.

An example may use ``torch`` and the public names of its room without importing them; it imports everything else. The
bench is used through its commands, so that its rooms here are the modules whose classes a script would use.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from types import ModuleType

import pytest
import torch

ROOMS = (
    "flows", "networks", "metrics", "training", "families", "data", "config", "bench.benchfile", "bench.claims",
    "bench.correction", "bench.hypotheses", "bench.machine", "bench.matched", "bench.plan", "bench.results",
    "bench.sides", "bench.statistics", "bench.status", "bench.verdicts",
)  # fmt: skip
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS

# Classes without an example: shorten this list; a class that has one, or is gone, must not be in it.
REMAINING = {
    # Their weights are downloaded.
    "families.DiffusersAutoencoder",
    "families.TAEF2",
    "metrics.EfficientNetFeatures",
    "metrics.FidelityFeatures",
    "metrics.InceptionFeatures",
    "metrics.InceptionLogits",
}


def room(name: str) -> ModuleType:
    return importlib.import_module(f"flowbench.{name}")


def public_classes() -> dict[str, type]:
    """Every class in the ``__all__`` of the rooms, by room and name."""
    names = [(name, own) for name in ROOMS for own in room(name).__all__]
    return {f"{name}.{own}": item for name, own in names if inspect.isclass(item := getattr(room(name), own))}


CLASSES = public_classes()


def example(item: type) -> str:
    """The last section of a class's own docstring where that is an example, else the empty string."""
    text = inspect.cleandoc(vars(item).get("__doc__") or "")
    found = re.search(r"\n\nExample:\n((?:(?: {4}.*)?(?:\n|$))+)\Z", text)
    return found[1] if found and ">>> " in found[1] else ""


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in REMAINING])
def test_the_example_of_a_class_runs(name):
    text = example(CLASSES[name])
    assert text, f"{name}: the docstring must end with a section `Example:` that has a >>> line"
    assert "+SKIP" not in text
    names = room(name.rpartition(".")[0])
    known = {"torch": torch, **{own: getattr(names, own) for own in names.__all__}}
    test = doctest.DocTestParser().get_doctest(text, known, name, None, 0)
    assert any(line.want for line in test.examples), f"{name}: the example must show what comes out"
    report: list[str] = []
    failed, _ = doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(test, out=report.append)
    assert not failed, "".join(report)


def test_the_remaining_classes_exist_and_lack_an_example():
    assert sorted(REMAINING - set(CLASSES)) == []
    assert [name for name in sorted(REMAINING) if example(CLASSES[name])] == []
