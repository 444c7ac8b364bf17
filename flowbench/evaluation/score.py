"""From answers to measurements: every metric once, and none at the cost of another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from flowbench.core.contract import returned
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.failures import Failure, Failures
from flowbench.evaluation.measurement import Measurement, unmeasured
from flowbench.evaluation.metric import Metric

__all__ = ["score"]


def score(
    answers: Answers,
    metrics: Mapping[str, Metric],
    failures: Failures,
    begin: Callable[[str], None] = lambda name: None,
) -> Iterator[Measurement]:
    """All measurements; at a point of a sweep, those of the metrics that are swept.

    One that cannot be made says why, and costs no other.

    Args:
        answers: to the probes of these metrics.
        metrics: by name.
        failures: keeps the mistakes of the code among the failures.
        begin: is called with the name of each metric before it is computed.
    """
    for name, metric in metrics.items():
        begin(name)
        if metric.in_sweep or not answers.override.axis:
            yield from _measured(name, metric, answers, failures)


def _measured(name: str, metric: Metric, answers: Answers, failures: Failures) -> list[Measurement]:
    found = failures.compute(partial(_checked, metric, answers))
    measured = unmeasured(metric.names or (name,), found.reason) if isinstance(found, Failure) else found
    infos = [metric.info(m.metric) for m in measured]
    return [replace(m, goal=info.goal, group=info.group) for m, info in zip(measured, infos, strict=True)]


def _checked(metric: Metric, answers: Answers) -> list[Measurement]:
    found = returned(metric.measure(answers), list, metric, "measure")
    return [returned(item, Measurement, metric, "measure") for item in found]
