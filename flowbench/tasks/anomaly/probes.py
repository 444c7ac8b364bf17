"""How anomalous a module finds each test sample."""

from __future__ import annotations

from dataclasses import dataclass

import lightning as L
from torch import Tensor

from flowbench.data import FlowDataModule
from flowbench.evaluation.densities import log_densities
from flowbench.evaluation.probe import Probe, Setup
from flowbench.evaluation.protocols import HasDensity
from flowbench.tasks.anomaly.data import ANOMALY

__all__ = ["AnomalyScores", "Scores", "anomalies"]


@dataclass(frozen=True)
class AnomalyScores:
    """Of test samples.

    Attributes:
        values: higher is more anomalous, float64, shape (N,).
        is_anomaly: bool, shape (N,).
        method: what the score is, for the protocol.
    """

    values: Tensor
    is_anomaly: Tensor
    method: str

    def __post_init__(self) -> None:
        if self.values.shape != self.is_anomaly.shape:
            raise ValueError(f"{len(self.values)} scores for {len(self.is_anomaly)} samples: give one per sample")


@dataclass(frozen=True)
class Scores(Probe[AnomalyScores]):
    """The score of every test sample; of a module with a density the negative log-density."""

    stage = "anomaly scores"

    def check(self, module: L.LightningModule, data: FlowDataModule) -> None:
        """Refuse data that do not tell anomalies from normal samples, and a density that does not exist."""
        if ANOMALY not in data.entry.columns:
            raise ValueError(
                f"{data.dataset} has no column {ANOMALY!r}, which tells anomalies from normal samples: take data with "
                "such a column, e.g. data.dataset=one_class_digits_0"
            )
        if isinstance(module, HasDensity):
            module.check_density()

    def ask(self, setup: Setup) -> AnomalyScores | None:
        """Batch by batch of the test split; a collective."""
        log_prob = log_densities(setup)
        if log_prob is None:
            return None
        values = -log_prob.double()
        return AnomalyScores(values, anomalies(setup, len(values)), "negative log-density")


def anomalies(setup: Setup, num: int) -> Tensor:
    """Which of the first `num` test samples are anomalies, bool, shape (num,)."""
    return setup.data.columns("test", slice(num))[ANOMALY].bool()
