"""What a module can be asked for, told by the methods that it has, whatever family or task it is of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from flowbench.data import Batch, FlowDataModule

if TYPE_CHECKING:
    from flowbench.evaluation.probe import Setup

__all__ = ["CanSample", "HasDensity", "Sampled", "SamplerFacts"]


class Sampled(Protocol):
    """Samples with their cost."""

    @property
    def x(self) -> Tensor:
        """Samples in data space, shape (B, *D)."""

    @property
    def network_evaluations(self) -> float:
        """Evaluations of the network that each sample cost."""

    @property
    def seconds(self) -> float:
        """Wall time of the batch."""


class SamplerFacts(Protocol):
    """What samples depend on, and what of it can be chosen."""

    @property
    def sampler(self) -> str:
        """What samples depend on beside the weights, noise and guidance scale; empty where nothing."""

    @property
    def guidance_scale(self) -> float | None:
        """Scale of the sampler's own guidance, 1 is none; None where nothing can be guided."""

    @property
    def can_choose_evaluations(self) -> bool:
        """Whether the number of network evaluations per sample can be chosen."""


@runtime_checkable
class CanSample(Protocol):
    """A module that draws samples, each keyed by its index."""

    num_classes: int | None

    def describe(self) -> SamplerFacts:
        """What the samples are, and what of them can be chosen."""

    def sample_at(self, index: Tensor, setup: Setup) -> Sampled:
        """The samples at some indices: the same for any batch and any number of processes.

        Args:
            index: sample indices, shape (B,).
            setup: seed, data for labels and conditions, and what a sweep imposes.
        """

    def labels_of_samples(self, setup: Setup) -> Tensor | None:
        """Labels that the samples 0, 1, ... are given, shape (setup.num_samples,); None without labels."""

    def check_sampling(self, network_evaluations: int | None = None, guidance: float | None = None) -> None:
        """Refuse (ValueError) what the sampler cannot do; nothing is drawn."""

    def check_conditions(self, data: FlowDataModule) -> None:
        """Refuse (ValueError) data that cannot give the conditions which the samples need."""


@runtime_checkable
class HasDensity(Protocol):
    """A module with a log-density of the data."""

    def batch_log_prob(self, batch: Batch) -> Tensor:
        """Log-densities of a numbered batch in nats under its own labels and conditions, shape (B,)."""

    def check_density(self) -> None:
        """Refuse (ValueError) to have one where it does not exist; nothing is computed."""
