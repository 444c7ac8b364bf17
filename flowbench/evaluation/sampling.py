"""Samples of a module as a stream that becomes features and is thrown away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from flowbench.data import FlowDataModule
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.artifacts import save_samples
from flowbench.evaluation.failures import agreed
from flowbench.evaluation.gather import gather_by_index
from flowbench.evaluation.pictures import log_samples
from flowbench.evaluation.probe import Probe, Setup
from flowbench.evaluation.protocols import CanSample
from flowbench.evaluation.samples import Collector, GeneratedSet, SampleSet

__all__ = ["Generated", "Samples", "log_generated", "samples_of"]


@dataclass(frozen=True)
class Generated:
    """Samples with their cost.

    Attributes:
        samples: the set: of a module, of a reference row, or of images that somebody else made.
        network_evaluations: mean per sample; None where there is no network.
        per_second: samples per second of this process, decoding included; None where it was not measured.
    """

    samples: SampleSet
    network_evaluations: float | None = None
    per_second: float | None = None


@dataclass(frozen=True)
class Samples(Probe[Generated]):
    """Samples by the module's own sampler, or under what a sweep imposes.

    Attributes:
        features: names of extractors, each with the number of samples to extract, counted from the first; None is all.
    """

    features: frozenset[tuple[str, int | None]] = frozenset()
    stage = "samples"
    follows_sampler = True

    @property
    def extractors(self) -> frozenset[str]:
        """See :attr:`Probe.extractors`."""
        return frozenset(name for name, _ in self.features)

    @classmethod
    def with_features(cls, name: str, count: int | None) -> Samples:
        """Samples whose features one extractor is asked for."""
        return cls(frozenset({(name, count)}))

    def merge(self, other: Samples) -> Samples:
        """The features of both."""
        return Samples(self.features | other.features)

    def counts(self, num_samples: int) -> dict[str, int]:
        """Samples that each extractor is asked for, `num_samples` at most."""
        found: dict[str, int] = {}
        for name, count in sorted(self.features, key=str):
            wanted = num_samples if count is None else min(count, num_samples)
            found[name] = max(found.get(name, 0), wanted)
        return found

    def collector(self, setup: Setup) -> Collector:
        """Takes samples as they come, and extracts the features that this probe asks for."""
        counts = self.counts(setup.num_samples)
        networks: Mapping = {name: setup.extractors[name] for name in counts}
        return Collector(setup.data.spec, networks, counts, setup.num_pictures)

    def check(self, module: L.LightningModule, data: FlowDataModule) -> None:
        """Refuse data that cannot give the conditions which the samples need."""
        if isinstance(module, CanSample):
            module.check_conditions(data)

    def ask(self, setup: Setup) -> Generated | None:
        """Draw, extract and throw away, batch by batch; a collective."""
        module = setup.module
        if not isinstance(module, CanSample):
            return None
        costs, seconds = [], 0.0
        with agreed():
            collector = self.collector(setup)
            index = setup.shard(setup.num_samples)
            module.sample_at(index[:2], setup)  # the first call allocates and compiles: no part of the rate
            for chunk in setup.batches(index):
                drawn = module.sample_at(chunk, setup)
                collector.add(chunk, drawn.x)
                # An adaptive solver's cost differs from batch to batch.
                costs.append(torch.full((len(chunk),), drawn.network_evaluations, dtype=torch.float64))
                seconds += drawn.seconds
            labels = module.labels_of_samples(setup)
        cost = gather_by_index(index, torch.cat(costs))

        def pictures(wanted: Tensor) -> Tensor:
            """Draw some samples again: their noise is keyed by their index."""
            parts = [module.sample_at(part, setup).x for part in wanted.split(setup.batch_size)]
            return setup.data.spec.to_uint8(torch.cat(parts).cpu().nan_to_num(-1.0))

        return Generated(collector.gathered("generated", pictures, labels), float(cost.mean()), len(index) / seconds)

    def show(self, answer: Generated, setup: Setup, trainer: L.Trainer, step: int) -> None:
        """Leave samples.npz, and the first ones in TensorBoard."""
        if isinstance(answer.samples, GeneratedSet):
            folder, shown = Path(trainer.default_root_dir), answer.samples.shown
            save_samples(folder, shown, setup.data.spec, setup.num_pictures)
            log_generated(answer, setup, trainer, "test/samples", step)


def log_generated(drawn: Generated, setup: Setup, trainer: L.Trainer, tag: str, step: int) -> None:
    """Write a picture of the first samples to TensorBoard, where the run has such a logger.

    Args:
        drawn: the samples.
        setup: with what they were asked for.
        trainer: whose logger.
        tag: of the picture.
        step: of the training.
    """
    if isinstance(drawn.samples, GeneratedSet):
        log_samples(trainer, drawn.samples.shown[: setup.num_pictures], setup.data.spec, tag, step)


def samples_of(answers: Answers) -> SampleSet:
    """The samples that were drawn.

    Raises:
        UnansweredError: when they could not be.
        ValueError: when there are none.
    """
    found = answers[Samples()]
    if found is None:
        raise ValueError("there are no samples to measure")
    return found.samples
