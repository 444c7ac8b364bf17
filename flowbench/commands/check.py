"""`flowbench check`: the contract test of every family, run on a family of the user's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flowbench.config import Experiment
from flowbench.config.compose import Composed, compose_tree
from flowbench.config.merge import set_key
from flowbench.config.overrides import parse_override
from flowbench.core.terminal import wrapped
from flowbench.families.base import FlowModule
from flowbench.families.family_contract import Case, Outcome, check_family, perturb

__all__ = ["check", "report"]

DATA = "eight_gaussians"
"""Points in the plane, where a density can be integrated."""


def check(class_path: str, overrides: Sequence[str] = (), dataset: str = DATA) -> list[Outcome]:
    """Run the contract on a family.

    Args:
        class_path: e.g. ``my_package.MyFamily``.
        overrides: ``key=value`` texts, arguments of its constructor.
        dataset: name in the catalogue; what the family is built for. No data are read.

    Returns:
        The outcome of every check, in their order.

    Raises:
        ValueError: one line: there is no such class, it is no family, or it cannot be built with these arguments.
    """
    arguments: dict[str, Any] = {}
    for text in overrides:
        set_key(arguments, *parse_override(text))
    model = {"class_path": class_path, "init_args": arguments}
    tree = {"data": {"dataset": dataset}, "model": model, "trainer": {"accelerator": "cpu"}, "budget": {"steps": 1}}
    composed = compose_tree(tree, class_path, Path.cwd())
    experiment = Experiment.from_composed(Composed(composed.source, composed.resolved, (Path.cwd() / "check.yaml",)))
    data = experiment.build_data()
    first = _built(experiment, class_path)
    conditional = first.num_classes is not None
    return list(check_family(Case(_maker(first), data.spec, conditional)))


def _built(experiment: Experiment, class_path: str) -> FlowModule:
    torch.manual_seed(0)
    module = experiment.build({}).model
    if not isinstance(module, FlowModule):
        raise ValueError(f"{class_path} is a {type(module).__name__}, no family: derive it from FlowModule")
    perturb(module)
    return module


def _maker(module: FlowModule) -> Callable[[], FlowModule]:
    return lambda: copy.deepcopy(module)


def report(outcomes: Sequence[Outcome]) -> str:
    """The outcomes in lines, one each."""
    marks = {"ok": "ok", "failed": "FAILED", "inapplicable": "-"}
    width = max(len(outcome.name) for outcome in outcomes)
    lines = []
    for outcome in outcomes:
        first = f"{outcome.name:{width}}  {marks[outcome.status]}"
        lines.append(wrapped(outcome.reason, f"{first}  ", " " * (width + 4)) if outcome.reason else first)
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    lines.append(f"{failed} of {len(outcomes)} checks failed" if failed else "keeps the contract")
    return "\n".join(lines)
