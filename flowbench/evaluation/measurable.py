"""Whether an evaluator will be able to measure, as far as it is known before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import lightning as L

from flowbench.core.checks import named
from flowbench.data import FlowDataModule
from flowbench.evaluation.drawing import Imposed
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.trainer_parts import flow_of
from flowbench.families import FlowModule
from flowbench.families.conditioning.base import check_given

__all__ = ["Settings", "check_data", "check_measurable"]


class Settings(Protocol):
    """What an evaluator was told to measure."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """By name."""

    @property
    def reference(self) -> str:
        """Split that samples are compared with."""

    @property
    def held_out(self) -> str:
        """Split that is scored as if it were generated."""

    def imposed(self, flow: FlowModule) -> Sequence[Imposed]:
        """The points of the sweep that a flow can choose."""


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
        ValueError: for a module that is no flow, metrics that do not suit the data, points of the sweep that the
            sampler cannot do, conditions or a likelihood that held-out data cannot have, or fewer samples than
            processes.
    """
    flow = flow_of(module)
    check_data(evaluator, data)
    for point in evaluator.imposed(flow):
        with named("evaluator.sweep"):
            flow.check_sampling(point.network_evaluations, point.guidance)
    if flow.conditioner is not None:
        flow.conditioner.check(data.known_spec)
    check_given(flow.conditioner, data.condition)
    _check_likelihood(evaluator, flow)
    for name in ("num_samples", "num_trajectories"):
        if getattr(evaluator, name) < world_size:
            raise ValueError(
                f"evaluator.{name}={getattr(evaluator, name)} is too few for {world_size} processes: raise it, or "
                "lower trainer.devices"
            )


def _check_likelihood(evaluator: Settings, flow: FlowModule) -> None:
    for key, metric in evaluator.metrics.items():
        if "log_prob" in metric.needs:
            with named(f"evaluator.metrics.{key}"):
                flow.space.check_likelihood()


def check_data(evaluator: Settings, data: FlowDataModule) -> None:
    """Refuse metrics and splits that do not suit the data; see :func:`check_measurable`.

    Raises:
        ValueError: names the metric.
    """
    if data.train_on_val and "val" in (evaluator.reference, evaluator.held_out):
        raise ValueError("evaluator.reference or held_out is val, but data.train_on_val trains on it: take test")
    for key, metric in evaluator.metrics.items():
        with named(f"evaluator.metrics.{key}"):
            metric.check(data.dataset, data.known_spec)
