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
    "Budget", "EndlessSampler", "Identity", "ShardedSampler", "SpatialCondition",
}  # fmt: skip
# Abstract bases: what a class of theirs takes is looked at there.
BASES = {"MatrixSettings", "OptimizerSettings"}


def written() -> str:
    """All shipped YAML and all pages."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("flowbench/**/*.md")]
    return "\n".join(file.read_text(encoding="utf-8") for file in [*files, *ROOT.glob("experiments/**/*.yaml")])


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
    words = set(re.findall(r"\w+", written()))
    lost = [f"{name}.{option}" for name, option in options() if option not in words]
    assert not lost, "remove them, or use them in a shipped YAML or in a table of the docs"


@pytest.mark.parametrize("option", ["JacobiInverse.certify", "TARFlow.mlp_ratio", "Reflow.pair_seed"])
def test_options_are_found(option):
    assert tuple(option.split(".")) in set(options())
