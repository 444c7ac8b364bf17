"""Who stands in the table beside the contenders without being one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

import torch

from flowbench.data import DataSpec, FlowDataModule
from flowbench.evaluation.probe import Probe, Setup

__all__ = ["Reference"]

A = TypeVar("A")


class Reference(ABC):
    """Answers the probes of the metrics in place of a trained module; it belongs to the data, not to a contender.

    Attributes:
        has_labels: whether its samples have labels, where the data have some.
        has_density: whether it has log-densities of the data.
        is_free: whether nothing is drawn or fitted for it, so that every single run can have its rows.
    """

    has_labels: bool = False
    has_density: bool = False
    is_free: bool = False

    @abstractmethod
    def answer(self, probe: Probe[A], setup: Setup) -> A | None:
        """The answer to a probe; None for one that it has no answer to.

        Args:
            probe: the question.
            setup: data, seed and how many samples; without a module.
        """

    def check(self, dataset: str, spec: DataSpec) -> None:  # noqa: B027 - most take any data
        """Refuse (ValueError) data that it cannot be made of, before anything is trained; by default none.

        Args:
            dataset: name in the catalogue or of a user's format.
            spec: shape, classes and value grid of the data.
        """

    def prepare(self, data: FlowDataModule, device: torch.device | str) -> None:  # noqa: B027 - most need nothing
        """Put into the cache what it needs and all contenders share; by default nothing."""

    def left_out(self, spec: DataSpec) -> str:
        """Why it has no rows for such data; empty where it has."""
        return ""
