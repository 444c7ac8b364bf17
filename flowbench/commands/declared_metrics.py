"""Names of the metrics that an experiment will measure, before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowbench.commands.counting import meta_module
from flowbench.evaluation.declared import Declared, declare
from flowbench.evaluation.trainer_parts import can_be_measured

if TYPE_CHECKING:
    from flowbench.config import Experiment

__all__ = ["declared_metrics"]


def declared_metrics(experiment: Experiment) -> dict[str, Declared]:
    """The metrics of an experiment's flow, under the empty name, and of the reference rows, under theirs.

    The model is built on the meta device; data are read only where their shape is not known otherwise.

    Args:
        experiment: validated configuration.

    Returns:
        Empty without an evaluator.

    Raises:
        Exception: whatever keeps the model from being built.
    """
    evaluator = experiment.build_evaluator()
    if evaluator is None:
        return {}
    data = experiment.build_data()
    module = meta_module(experiment, data.spec)
    return declare(evaluator, data, module if can_be_measured(module) else None)
