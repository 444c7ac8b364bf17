"""Whether an evaluator will be able to measure, as far as it is known before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import lightning as L

from flowbench.core.checks import named
from flowbench.data import FlowDataModule
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.override import SamplerOverride
from flowbench.evaluation.probe import Probe, merged
from flowbench.evaluation.protocols import CanSample
from flowbench.evaluation.reference import Reference
from flowbench.evaluation.sampling import Samples
from flowbench.evaluation.trainer_parts import measured_module

__all__ = ["Compared", "Settings", "check_data", "check_measurable"]


class Compared(Protocol):
    """Metrics, and the splits that they compare with."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """By name."""

    @property
    def references(self) -> Mapping[str, Reference]:
        """By the names of their rows."""

    @property
    def reference(self) -> str:
        """Split that samples are compared with."""

    @property
    def held_out(self) -> str:
        """Split that is scored as if it were generated."""


class Settings(Compared, Protocol):
    """What an evaluator is to measure."""

    num_samples: int
    num_trajectories: int
    best_by: str | None

    def overrides(self, module: L.LightningModule) -> Sequence[SamplerOverride]:
        """The points of the sweep that a module can choose."""


def check_measurable(evaluator: Settings, module: L.LightningModule, data: FlowDataModule, world_size: int = 1) -> None:
    """Refuse what could not be measured after the training.

    No data are read but the user's own whose shape nobody declared, and nothing is drawn: the module may lie on the
    meta device.

    Args:
        evaluator: the evaluator.
        module: what is to be measured.
        data: its data.
        world_size: number of processes.

    Raises:
        ValueError: for a module that has nothing to measure, metrics that do not suit the data, metrics in a sweep that
            their probes do not follow, points of the sweep that the sampler cannot do, conditions or a likelihood that
            held-out data cannot have, or fewer samples than processes.
    """
    measured_module(module)
    check_data(evaluator, data)
    if data.train_on_val and evaluator.best_by is not None:
        raise ValueError("evaluator.best_by chooses on the validation split, but data.train_on_val trains on it")
    if isinstance(module, CanSample):
        for point in evaluator.overrides(module):
            with named("evaluator.sweep"):
                module.check_sampling(point.network_evaluations, point.guidance)
    Samples().check(module, data)  # drawn whatever the metrics are
    probes: list[Probe[Any]] = [Samples()]
    for key, metric in evaluator.metrics.items():
        with named(f"evaluator.metrics.{key}"):
            for probe in metric.probes():
                probe.check(module, data)
                if metric.in_sweep and evaluator.overrides(module) and not probe.follows_sampler:
                    raise ValueError(
                        f"is measured at every point of a sweep, but {type(probe).__name__} does not follow the "
                        "sampler: set follows_sampler there, or in_sweep of the metric to False"
                    )
                for point in evaluator.overrides(module) if metric.in_sweep else ():
                    probe.check_sampling(module, point)
            probes = merged([*probes, *metric.probes()])
    for name in ("num_samples", "num_trajectories"):
        if getattr(evaluator, name) < world_size:
            raise ValueError(
                f"evaluator.{name}={getattr(evaluator, name)} is too few for {world_size} processes: raise it, or "
                "lower trainer.devices"
            )


def check_data(evaluator: Compared, data: FlowDataModule) -> None:
    """Refuse metrics and splits that do not suit the data; see :func:`check_measurable`.

    Raises:
        ValueError: names the metric.
    """
    if data.train_on_val and "val" in (evaluator.reference, evaluator.held_out):
        raise ValueError("evaluator.reference or held_out is val, but data.train_on_val trains on it: take test")
    for key, metric in evaluator.metrics.items():
        with named(f"evaluator.metrics.{key}"):
            metric.check(data.dataset, data.known_spec)
    for key, reference in evaluator.references.items():
        with named(f"evaluator.references.{key}"):
            reference.check(data.dataset, data.known_spec)
