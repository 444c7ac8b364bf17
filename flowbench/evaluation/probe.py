"""What is asked of a trained module, and what it is asked with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Self, TypeVar, cast

import lightning as L
from torch import Tensor

from flowbench.core.contract import ContractError
from flowbench.data import Batch, FlowDataModule
from flowbench.evaluation.gather import shard
from flowbench.evaluation.override import SamplerOverride
from flowbench.evaluation.samples import SampleSet
from flowbench.evaluation.stages import Steps, uncounted
from flowbench.metrics import FeatureExtractor
from flowbench.training import Budget

__all__ = ["Probe", "Setup", "merged"]

A = TypeVar("A")
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """With what probes are asked.

    Attributes:
        module: the trained module, with the weights that are measured in place; None for reference rows.
        data: its data.
        reference: real data that samples are compared with.
        held_out: real data that no model has seen.
        extractors: feature extractors by name, loaded when they are first looked up.
        seed: the evaluation seed; every random number is keyed by it and by the sample's index.
        num_samples: samples to draw over all processes.
        batch_size: samples at a time.
        num_pictures: samples to keep for pictures.
        num_paths: paths from source to data over all processes.
        path_points: states along each path of a continuous flow.
        num_likelihood: test samples whose likelihood is measured, counted from the first; None takes all.
        likelihood_split: the split of those samples; `val` where a point of a sweep is chosen.
        test_batches: batches of test samples at most for this process; None takes all.
        rank: this process.
        world_size: number of processes.
        budget: what the training spent; None where it was not metered.
        override: what a sweep imposes on the sampler.
        report: is called with the number of steps done and of all steps.
        kept: what :meth:`once` keeps for the other points of a sweep.
    """

    module: L.LightningModule | None
    data: FlowDataModule
    reference: SampleSet
    held_out: SampleSet
    extractors: Mapping[str, FeatureExtractor]
    seed: int = 0
    num_samples: int = 360
    batch_size: int = 256
    num_pictures: int = 64
    num_paths: int = 256
    path_points: int = 33
    num_likelihood: int | None = None
    likelihood_split: Literal["val", "test"] = "test"
    test_batches: int | None = None
    rank: int = 0
    world_size: int = 1
    budget: Budget | None = None
    override: SamplerOverride = field(default_factory=SamplerOverride)
    report: Steps = uncounted
    kept: dict[Hashable, Any] = field(default_factory=dict, compare=False)

    def once(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """What does not depend on the sampler, computed by the first probe that needs it at any point of a sweep.

        Args:
            key: names it.
            compute: on all processes.
        """
        if key not in self.kept:
            self.kept[key] = compute()
        return cast("Value", self.kept[key])

    def shard(self, num: int) -> Tensor:
        """This process's indices below `num`."""
        return shard(num, self.rank, self.world_size)

    def batches(self, index: Tensor) -> Iterator[Tensor]:
        """Indices of `batch_size` samples at a time, and a report after each of these batches."""
        done = 0
        for chunk in index.split(self.batch_size):
            yield chunk
            done += len(chunk)
            self.report(done, len(index))

    def likelihood_batches(self) -> Iterator[Batch]:
        """This process's batches of the likelihood's split, in the order of their indices, and a report after each."""
        loader = self.data.evaluation_loader(self.likelihood_split, self.num_likelihood)
        total = len(loader) if self.test_batches is None else min(len(loader), self.test_batches)
        for number, batch in enumerate(loader, start=1):
            if number > total:
                return
            yield batch
            self.report(number, total)


class Probe(ABC, Generic[A]):
    """A question to a trained module; subclasses are frozen dataclasses.

    Probes of one key are merged, so one pass over the module serves all metrics that ask it.

    Attributes:
        stage: its name in the progress of a measurement.
        follows_sampler: whether it is asked at the points of a sweep: its answer is that of the sampler under
            :attr:`Setup.override`.
    """

    stage: str = ""
    follows_sampler: bool = False

    @property
    def extractors(self) -> frozenset[str]:
        """Names of the feature extractors that it looks up."""
        return frozenset()

    def key(self) -> Hashable:
        """Probes of the same key are one question."""
        return type(self)

    def merge(self, other: Self) -> Self:
        """The question whose answer serves both probes, of one key: extractors of both, the larger number of samples.

        Args:
            other: a probe of the same key.

        Raises:
            ContractError: for two probes of one key that differ, of a class that does not merge them.
        """
        if self != other:
            raise ContractError(f"{self} and {other} have one key: define {type(self).__name__}.merge, or another key")
        return self

    def check(self, module: L.LightningModule, data: FlowDataModule) -> None:
        """Refuse, before any training, what :meth:`ask` could not answer afterwards; by default nothing.

        Args:
            module: perhaps untrained, or on the meta device.
            data: of which no values need be read.

        Raises:
            ValueError: one line with what to change.
        """

    def check_sampling(self, module: L.LightningModule, override: SamplerOverride) -> None:
        """Refuse, before any training, a point of a sweep at which :meth:`ask` has no answer; by default nothing.

        Args:
            module: perhaps untrained, or on the meta device.
            override: what the sweep imposes.

        Raises:
            ValueError: one line with what to change.
        """

    @abstractmethod
    def ask(self, setup: Setup) -> A | None:
        """The answer; None when this module has none.

        All processes call it. What one of them does alone stands inside
        :func:`~flowbench.evaluation.failures.agreed`, and gathering outside of it.

        Args:
            setup: the module, its data, and how many samples.
        """

    def show(self, answer: A, setup: Setup, trainer: L.Trainer, step: int) -> None:
        """Leave what a person looks at in the run's folder and in TensorBoard; by default nothing.

        Args:
            answer: of this probe, on process 0.
            setup: with what it was asked.
            trainer: whose folder and logger.
            step: of the training, for TensorBoard.
        """


def merged(probes: Iterable[Probe[Any]]) -> list[Probe[Any]]:
    """One probe for each key, in the order in which the keys first occur."""
    found: dict[Hashable, Probe[Any]] = {}
    for probe in probes:
        key = probe.key()
        found[key] = found[key].merge(probe) if key in found else probe
    return list(found.values())
