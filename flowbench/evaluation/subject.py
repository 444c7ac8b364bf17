"""What a metric looks at: samples, a reference, and what else is known about the one who made them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from flowbench.data import DataSpec
from flowbench.evaluation.measurement import SweptName
from flowbench.evaluation.samples import DrawnSet, SampleSet
from flowbench.metrics import FeatureExtractor, PathGeometry

__all__ = ["BoundTerms", "ConditionScore", "Cost", "Part", "Reconstructions", "Subject"]

Part = Literal[
    "samples",
    "log_prob",
    "geometry",
    "transport_cost",
    "training_pairs",
    "reconstructions",
    "bound_terms",
    "condition_scores",
]
"""What metrics look at: fields of :class:`Subject`, each computed by itself."""


@dataclass(frozen=True)
class Cost:
    """What a contender cost.

    Attributes:
        parameters: trainable parameters of the contender.
        train_seconds: wall time inside training steps.
        train_flops: floating-point operations of training.
        samples_seen: training samples, repeats included.
        peak_memory_mb: highest memory of the process (resident on a CPU, allocated on a GPU), MiB.
        samples_per_second: samples drawn per second by this process's shard, decoding included; None where none were.
        steps: optimiser steps of the training; 0 where they were not counted.
        product_rate: operations a second of large float32 products on this machine, over all processes; None where
            nothing was trained.
    """

    parameters: int
    train_seconds: float
    train_flops: float
    samples_seen: int
    peak_memory_mb: float
    samples_per_second: float | None
    steps: int = 0
    product_rate: float | None = None

    @property
    def flop_utilisation(self) -> float | None:
        """Share of the product rate that training reached; None where one of them is unknown."""
        if not self.product_rate or not self.train_seconds or not self.train_flops:
            return None
        return self.train_flops / (self.train_seconds * self.product_rate)


@dataclass(frozen=True)
class ConditionScore:
    """How well samples keep to their condition.

    Attributes:
        values: one per sample, shape (N,).
        unit: of the values.
        floor: the same of the condition's own images through the autoencoder, shape (N,): what its decoder leaves of
            the best sample; None in data space.
        protocol: the condition, the split, N.
    """

    values: Tensor
    unit: str
    floor: Tensor | None
    protocol: str


@dataclass(frozen=True)
class Reconstructions:
    """Held-out images that went through an autoencoder.

    Attributes:
        images: what came out.
        psnr: of every image against its original, decibels, shape (N,).
    """

    images: DrawnSet
    psnr: Tensor


@dataclass(frozen=True)
class BoundTerms:
    """Of held-out images.

    Attributes:
        reconstruction: |x - decode(encode(x))|^2 summed over dimensions, squared model units, shape (N,).
        flow_loss: the mean over times of |u - v|^2 summed over latent dimensions, squared scaled latent units, shape
            (N,); None where the flow's training is no regression on independent, equally weighted pairs.
        num_times: times per image behind the second.
        split: the images' split.
        latent: shape of the latents, for the protocol.
        given: what the velocity is told, for the protocol: `label`, the conditioner's name, both, or nothing.
    """

    reconstruction: Tensor
    flow_loss: Tensor | None
    num_times: int
    split: str
    latent: str
    given: str = ""


@dataclass
class Subject:
    """Somebody whose samples are scored: a flow, a classical baseline, held-out data or noise.

    Attributes:
        spec: the data's shape and value grid.
        samples: what was generated.
        reference: real data that the samples are compared with.
        network_evaluations: per sample; None where there is no network.
        guidance: scale of the samples' guidance, 1 = none; None where nothing can be guided.
        sampler: what the samples depend on beside the weights, for the row.
        swept: what a sweep imposed on the sampler, `network_evaluations` or `guidance`; empty outside a sweep.
        at: the value that it imposed; None outside a sweep.
        log_prob: log-densities of the test split in nats, shape (N,), or None.
        likelihood: `exact`, `ode` or `bound`.
        likelihood_method: solver and divergence of the log-densities; empty where they are closed form.
        reports_bits_per_dim: whether they may be given in bits per dimension: not those of a flow of noisy data.
        given_label: whether the log-densities are those of the points given their labels.
        dequantize: how grey levels were placed for them: `uniform`, or `none` for the centres of the bins.
        geometry: geometry of the paths from source to data, or None.
        space: where those paths run: `data`, or `latent` with its shape.
        transport_cost: squared W2 between source and data, summed over dimensions, or None.
        transport_origin: where it comes from, for the protocol: `reference` (flowbench.data.reference_transport), or
            `2048-points` for an estimate from as many points on each side.
        training_pairs: what the pairs of training look like, by metric name, see :class:`TrainingPairs`; or None.
        cost: what training and sampling cost, or None.
        extractors: feature extractors by name.
        held_out: real data that no model has seen, of the same kind as the reference, or None.
        reconstructions: held-out images through the autoencoder of a latent flow, or None.
        bound_terms: the two terms of the bound on W2 of a latent flow's samples, or None.
        condition_scores: how well samples keep to conditions that are more than labels, by metric name, or None.
        missing: why a part could not be computed, by its name; its field is None, or holds samples that nobody has.
        memory: what one metric computed and another may use, by name.
    """

    spec: DataSpec
    samples: SampleSet
    reference: SampleSet
    network_evaluations: float | None = None
    guidance: float | None = None
    sampler: str = ""
    swept: SweptName = ""
    at: float | None = None
    log_prob: Tensor | None = None
    likelihood: str = "exact"
    likelihood_method: str = ""
    reports_bits_per_dim: bool = True
    given_label: bool = False
    dequantize: str = "uniform"
    geometry: PathGeometry | None = None
    space: str = "data"
    transport_cost: float | None = None
    transport_origin: str = "2048-points"
    training_pairs: dict[str, float] | None = None
    cost: Cost | None = None
    extractors: dict[str, FeatureExtractor] = field(default_factory=dict)
    held_out: SampleSet | None = None
    reconstructions: Reconstructions | None = None
    bound_terms: BoundTerms | None = None
    condition_scores: dict[str, ConditionScore] | None = None
    missing: dict[Part, str] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)

    def reason(self, parts: Iterable[Part]) -> str:
        """Why the first of some parts is missing; empty where none is."""
        return next((self.missing[part] for part in parts if part in self.missing), "")
