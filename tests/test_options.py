"""Every option of a class that YAML can choose is used by a shipped YAML or explained by a page."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .contract.range_cases import RESULTS

ROOT = Path(__file__).parents[1]
ROOMS = (
    "families",
    "flows",
    "networks",
    "training",
    "evaluation",
    "data",
    "tasks.generation",
    "tasks.anomaly.metrics",
    "tasks.anomaly.references",
)
# Made by the code, not by a file: records, and what the datamodule or the evaluator builds.
MADE = {name for names in RESULTS.values() for name in names} | {
    "AffineBlock", "Budget", "EndlessSampler", "GroupedSampler", "Identity", "ShardedSampler", "SpatialCondition",
    "Trajectory", "WeightResult",
}  # fmt: skip
# Abstract bases: what a class of theirs takes is looked at there.
BASES = {"MatrixSettings", "OptimizerSettings"}


def used() -> set[str]:
    """Keys of shipped YAML, and words that pages write as code."""
    keys, code = re.compile(r"([\w.]+):"), re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
    words: list[str] = []
    for file in ROOT.glob("experiments/**/*.yaml"):
        lines = [line.partition(" #")[0] for line in file.read_text(encoding="utf-8").splitlines()]
        words += keys.findall("\n".join(line for line in lines if not line.lstrip().startswith("#")))
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("flowbench/**/*.md")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        words += code.findall(text)
        words += [line for line in text.splitlines() if line.startswith("    ")]  # blocks of code
    return set(re.findall(r"\w+", " ".join(words)))


def options() -> Iterator[tuple[str, str]]:
    for room in ROOMS:
        module = importlib.import_module(f"flowbench.{room}")
        for name in getattr(module, "__all__", ()):
            cls = getattr(module, name)
            if inspect.isclass(cls) and name not in MADE | BASES and not issubclass(cls, Exception):
                for given in inspect.signature(cls).parameters.values():
                    if given.default is not given.empty and given.kind is not given.VAR_KEYWORD:
                        yield name, given.name


def test_every_option_is_used_by_a_yaml_or_explained_by_a_page():
    words = used()
    lost = [f"{name}.{option}" for name, option in options() if option not in words]
    assert not lost, "remove them, or use them in a shipped YAML or in a table of the docs"


@pytest.mark.parametrize("option", ["JacobiInverse.certify", "TARFlow.mlp_ratio", "Reflow.pair_seed"])
def test_options_are_found(option):
    assert tuple(option.split(".")) in set(options())
