"""What the metrics are given: clouds of points and images as the evaluator collects them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowbench.data import DataSpec
from flowbench.evaluation import Answers, Generated, Probe, Samples, SampleSet
from flowbench.evaluation.samples import Collector
from flowbench.metrics import FeatureExtractor, IdentityFeatures

DIGITS = DataSpec("digits", "1", (1, 8, 8), num_classes=10, levels=17)
POINTS = DataSpec("points", "1", (2,))


def cloud(num: int, spec: DataSpec, seed: int, shift: float = 0.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (0.4 * torch.randn(num, *spec.shape, generator=rng) + shift).clamp(-0.999, 0.999)


def sample_set(x: Tensor, spec: DataSpec, name: str) -> SampleSet:
    """Samples as the evaluator collects them, all kept for the comparisons here."""
    collector = Collector(spec, extractors(spec), {"identity": len(x)}, len(x))
    for index in torch.arange(len(x)).split(25):
        collector.add(index, x[index])
    return collector.gathered(name)


def extractors(spec: DataSpec) -> dict[str, FeatureExtractor]:
    return {"identity": IdentityFeatures(spec.num_dims)}


def compared(
    samples: SampleSet,
    reference: SampleSet,
    networks: Mapping[str, FeatureExtractor] | None = None,
    held_out: SampleSet | None = None,
    given: Mapping[Probe, Any] | None = None,
) -> Answers:
    """Samples against a reference; `given` are the answers to other probes, or to that of the samples."""
    found = {Samples(): Generated(samples), **(given or {})}
    networks = extractors(samples.spec) if networks is None else networks
    answers = {probe.key(): answer for probe, answer in found.items()}
    return Answers(samples.spec, reference, held_out or reference, networks, answers, num_samples=len(samples))


def known(
    spec: DataSpec = POINTS, num: int = 60, num_real: int = 90, given: Mapping[Probe, Any] | None = None
) -> Answers:
    """A cloud against another one, and what else is known."""
    samples = sample_set(cloud(num, spec, 0, 0.2), spec, "generated")
    return compared(samples, sample_set(cloud(num_real, spec, 1), spec, "val"), given=given)


def flat(x: Tensor, spec: DataSpec) -> np.ndarray:
    values = spec.to_uint8(x) if spec.modality == "image" else x
    return values.double().flatten(1).numpy()
