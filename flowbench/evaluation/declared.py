"""The names of what will be measured, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import lightning as L

from flowbench.data import FlowDataModule
from flowbench.evaluation.auto_features import known_features
from flowbench.evaluation.evaluator import Evaluator
from flowbench.evaluation.measurement import SweptName
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.prospect import Prospect

__all__ = ["Declared", "declare"]


@dataclass(frozen=True)
class Declared:
    """Names of the metrics that somebody will have.

    Attributes:
        main: outside any sweep; None where a metric does not declare its names, which may then be any.
        swept: at the points of each sweep, by what is swept; what its sampler cannot choose is absent.
        beside: numbers that mean little without another one, and which, see :attr:`MetricInfo.beside`.
    """

    main: frozenset[str] | None
    swept: Mapping[SweptName, frozenset[str] | None]
    beside: Mapping[str, str] = field(default_factory=dict)


def declare(evaluator: Evaluator, data: FlowDataModule, module: L.LightningModule | None) -> dict[str, Declared]:
    """What an evaluator will measure.

    Args:
        evaluator: the evaluator.
        data: the data.
        module: trained or not, on any device, the meta device included; None leaves the reference rows.

    Returns:
        By name of the reference row; the module under the empty name.
    """
    metrics = [_named(metric, data) for metric in evaluator.metrics.values()]
    found = {
        name: Declared(_names(metrics, Prospect(data.spec, reference=reference)), {})
        for name, reference in evaluator.references.items()
    }
    infos = [info for metric in evaluator.metrics.values() for info in metric.declares]
    if module is not None:
        who = Prospect(data.spec, module)
        axes = {point.axis for point in evaluator.overrides(module)}
        swept = {axis: _names(metrics, replace(who, swept=axis)) for axis in sorted(axes)}
        beside = {info.name: info.beside for info in infos if info.beside}
        found[""] = Declared(_names(metrics, who), swept, beside)
    return found


def _named(metric: Metric, data: FlowDataModule) -> Metric | None:
    """A metric under the names of its extractors; None where one depends on weights that were not looked for yet."""
    names: dict[str, str] = {}
    for given in metric.extractors:
        if (found := known_features(given, data.dataset, data.spec)) is None:
            return None
        names[given] = found
    return metric.with_features(names)


def _names(metrics: Sequence[Metric | None], who: Prospect) -> frozenset[str] | None:
    wanted = [metric for metric in metrics if metric is None or metric.in_sweep or not who.swept]
    declared = [None if metric is None else metric.expected(who) for metric in wanted]
    if any(names is None for names in declared):
        return None
    return frozenset(name for names in declared for name in names or ())
