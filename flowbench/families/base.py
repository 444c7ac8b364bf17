"""The contract that every contender keeps, so that the evaluator need not distinguish families."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import lightning as L
import torch
from torch import Tensor, nn

from flowbench.core.autocast import autocast_off
from flowbench.core.contract import ContractError, returned, shaped
from flowbench.core.devices import wait_for
from flowbench.data import Batch, DataSpec, FlowDataModule
from flowbench.evaluation.probe import Setup
from flowbench.families.answers import Drawn, Samples, Trajectory
from flowbench.families.conditioning.base import SpatialCondition
from flowbench.families.conditioning.by_index import condition_argument
from flowbench.families.description import Description, LikelihoodKind
from flowbench.families.fitted import FittedModule
from flowbench.families.latents.space import LatentSpace, PixelSpace, Space
from flowbench.flows import Source
from flowbench.training.config import TrainingConfig
from flowbench.training.count import Count
from flowbench.training.module import Loss, TrainingModule

__all__ = ["Drawn", "FlowModule", "LikelihoodKind", "NetworkFactory", "Samples", "Trajectory"]

DensityKind = Literal["exact", "ode"]
NetworkFactory = Callable[[tuple[int, ...], int | None], nn.Module]


class FlowModule(FittedModule):
    """A flow between a source and the data, possibly in the latent space of an autoencoder.

    Subclasses model the flow in the flow's own space: they must define :meth:`flow_loss`, :meth:`flow_sample`,
    :meth:`flow_encode`, :meth:`flow_log_prob`, :meth:`trajectory` and :attr:`density`. This class carries data there.

    Args:
        spec: the data's shape, classes and value grid.
        space: where the flow lives; None means the data space itself.
        sampling_source: where samples start, in place of the source of the training; None is that source.
        conditional: condition on class labels.
        label_dropout: share of training labels replaced by the null label, in [0, 1); it makes guidance possible.
        training: optimiser, averaged weights and compilation; None takes the defaults.

    Raises:
        TypeError: for a subclass that lacks one of those; names them.
        ValueError: when labels are asked for and the data has none, or a value is out of range.

    Example:
        >>> from flowbench.data import DataSpec
        >>> flow: FlowModule = TARFlow(DataSpec("points", "1", (2,)), layers=[1, 1], width=16, head_dim=8)
        >>> flow.encode(x := torch.zeros(3, 2)).shape, flow.sample(x).x.shape, flow.log_prob(x).shape
        (torch.Size([3, 2]), torch.Size([3, 2]), torch.Size([3]))
    """

    sampling_arguments = TrainingModule.sampling_arguments | {"sampling_source"}

    def __init__(
        self,
        spec: DataSpec,
        *,
        space: Space | None = None,
        sampling_source: Source | None = None,
        conditional: bool = False,
        label_dropout: float = 0.1,
        training: TrainingConfig | None = None,
    ) -> None:
        if not isinstance(spec, DataSpec):
            raise ValueError(f"{type(self).__name__} models vectors and images, but {spec.name} holds {spec.summary}")
        super().__init__(
            spec,
            space=space or PixelSpace(spec.shape),
            sampling_source=sampling_source,
            conditional=conditional,
            label_dropout=label_dropout,
            training=training,
        )
        if self.density not in get_args(DensityKind):
            kinds = " or ".join(map(repr, get_args(DensityKind)))
            raise ContractError(f"{type(self).__name__}.density must be {kinds}, got {self.density!r}")

    def describe(self) -> Description:
        """Facts for rows and refusals; a family replaces those that are otherwise for it."""
        kind: LikelihoodKind = "bound" if isinstance(self.space, LatentSpace) else self.density
        return Description(kind, has_velocities=self.density == "ode")

    @property
    def checkpoint_identity(self) -> dict[str, Any]:
        """Adds classes, autoencoder checksum and noise; a checkpoint that differs models another density."""
        own = {"classes": self.num_classes, "autoencoder": self.space.checksum, "noise_std": self.space.noise_std}
        own["conditioner"] = self.conditioner.name if self.conditioner else None
        return {**super().checkpoint_identity, **own}

    # ---- what a family gives --------------------------------------------------------------------------

    @property
    @abstractmethod
    def density(self) -> DensityKind:
        """What :meth:`flow_log_prob` is: ``exact``, or through an ``ode`` solver; a class attribute will do."""

    @abstractmethod
    def flow_loss(self, x: Tensor, label: Tensor | None, rng: torch.Generator) -> Loss:
        """Training loss of points `x` (B, *flow_shape); dropped labels are already the null label."""

    @abstractmethod
    def flow_sample(
        self, noise: Tensor, label: Tensor | None, network_evaluations: int | None, guidance: float | None
    ) -> Drawn | tuple[Tensor, float]:
        """Carry noise to the flow's data end: points, evaluations per sample, and what else is known of them."""

    @abstractmethod
    def flow_encode(self, z: Tensor, label: Tensor | None) -> Tensor:
        """Carry points `z` (B, *flow_shape) to the noise that the flow maps to them, same shape, without guidance."""

    def flow_decode(self, noise: Tensor, label: Tensor | None, guidance: float = 1.0) -> tuple[Tensor, float]:
        """Points (B, *flow_shape), never denoised, and evaluations per sample: the inverse of encoding at scale 1."""
        return self.flow_sample(noise, label, None, guidance)[:2]

    def flow_denoise(self, z: Tensor, label: Tensor | None) -> Tensor:
        """Take the noise of training out of points (B, *flow_shape) that :meth:`flow_decode` gave, as sampling does."""
        return z

    @abstractmethod
    def flow_log_prob(self, x: Tensor, label: Tensor | None, index: Tensor, seed: int) -> Tensor:
        """Log-density of points `x` (B, *flow_shape) in nats, shape (B,); called with autocast off."""

    @abstractmethod
    def trajectory(self, noise: Tensor, condition: Tensor | None = None, num_points: int = 33) -> Trajectory:
        """States between source and data.

        Args:
            noise: source points, shape (B, *flow_shape).
            condition: labels, shape (B,), or None.
            num_points: states to return along a continuous flow; a block flow returns one per block.
        """

    def training_pairs(self, data: FlowDataModule, num: int, seed: int) -> dict[str, float] | None:
        """What the pairs of training look like, by metric name; None for a family that does not train on pairs.

        Args:
            data: the data; its training split is looked at, and its batch size.
            num: pairs.
            seed: the evaluation seed.
        """
        return None

    @property
    def training_pair_names(self) -> tuple[str, ...] | None:
        """Names of what :meth:`training_pairs` returns; None where a family does not declare them."""
        return () if type(self).training_pairs is FlowModule.training_pairs else None

    def loss_of_one(self) -> Tensor:
        """The loss of one point of zeros where the flow lives."""
        device = self.weights_device
        label = None if self.num_classes is None else torch.zeros(1, dtype=torch.int64, device=device)
        loss = self.flow_loss(torch.zeros(1, *self.flow_shape, device=device), label, torch.Generator())
        return returned(loss, Loss, self, "flow_loss").total

    def count(self) -> Count:
        """Adds the flow's space and its classes."""
        return replace(super().count(), space=self.flow_shape, num_classes=self.num_classes)

    # ---- what every family does -----------------------------------------------------------------------

    def check_training(self, data: FlowDataModule, trainer: L.Trainer | None = None) -> None:
        """Refuse data that the space cannot carry, or that the conditioner can make nothing of."""
        super().check_training(data, trainer)
        self.space.check_training(data)
        self.check_conditions(data)

    def training_loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """The family's loss of one batch.

        Args:
            batch: data in model space with labels when the family is conditional.
            generator: source of every random number of the step.

        Raises:
            ValueError: when the batch carries a condition that this family cannot use.
        """
        if batch.condition is not None and self.conditioner is None:
            raise ValueError(
                f"{type(self).__name__} is conditioned on class labels only, but the batch has a condition"
            )
        x = shaped(self.space.encode_batch(batch, generator), (len(batch), *self.flow_shape), self.space, "encode")
        loss = self.batch_loss(batch, x, self.drop_labels(batch.label, generator), generator)
        return returned(loss, Loss, self, "flow_loss")

    def batch_loss(self, batch: Batch, x: Tensor, label: Tensor | None, rng: torch.Generator) -> Loss:
        """:meth:`flow_loss` of an encoded batch, for families that look at more of it than points and labels."""
        return self.flow_loss(x, label, rng)

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        condition: Tensor | None = None,
        *,
        network_evaluations: int | None = None,
        guidance: float | None = None,
        spatial: SpatialCondition | None = None,
    ) -> Samples:
        """Draw samples in data space, with their cost.

        Args:
            noise: source points, shape (B, *flow_shape).
            condition: labels, shape (B,), or None for unconditional samples.
            network_evaluations: evaluations per sample, for solvers that can choose; None keeps the family's own.
            guidance: scale of classifier-free guidance; 1 is none; None keeps the family's own.
            spatial: conditions that the flow's conditioner made, one per sample; None where it has none.

        Raises:
            ValueError: when the family cannot choose its evaluations, guidance is asked of an unconditional model, or a
                spatial condition is missing or not wanted.
        """
        label = self.check_condition(condition, len(noise))
        self.check_spatial(spatial, len(noise))
        by_condition = self.drops_conditions and self.num_classes is None
        free = by_condition or self.describe().has_label_free_guidance
        if guidance not in (None, 1.0) and label is None and not free:
            raise ValueError(f"guidance={guidance} needs labels: train with conditional=true and give a condition")
        self.check_sampling(network_evaluations, guidance)
        start = time.perf_counter()
        drawn = self._drawn(self.flow_sample(noise, label, network_evaluations, guidance, **_given(spatial)), noise)
        x = shaped(self.space.decode(drawn.points), (len(noise), *self.spec.shape), self.space, "decode")
        if spatial is not None and self.conditioner is not None:
            x = self.conditioner.finish(x, spatial)
        wait_for(x.device)
        return Samples(x, drawn.network_evaluations, time.perf_counter() - start, drawn.iterations, drawn.residual)

    def sample_at(self, index: Tensor, setup: Setup) -> Samples:
        """The samples at some indices: the same for any batch and any number of processes.

        Args:
            index: sample indices, shape (B,).
            setup: seed, data for labels and conditions, and what a sweep imposes.
        """
        labels, override = self.labels_of_samples(setup), setup.override
        return self.sample(
            self.draw_noise(index, setup.seed),
            None if labels is None else labels[index].to(self.device),
            network_evaluations=override.network_evaluations,
            guidance=override.guidance,
            **condition_argument(self, setup, index),
        )

    def _drawn(self, found: object, noise: Tensor) -> Drawn:
        drawn = Drawn(*returned(found, tuple, self, "flow_sample"))
        shaped(drawn.points, tuple(noise.shape), self, "flow_sample")
        return drawn

    @torch.no_grad()
    def encode(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """The noise that the flow carries to data, with autocast off; latent families take the posterior's mean.

        Args:
            x: points in model space, shape (B, *shape).
            condition: labels, shape (B,), or None for the unconditional flow.

        Returns:
            Noise, shape (B, *flow_shape): exact for block flows, up to the solver's error for continuous ones.

        Raises:
            ValueError: for another shape, or labels that the model cannot take.
        """
        self._check_points(x)
        label = self.check_condition(condition, len(x))
        with self.full_precision():
            z = self.space.encode_mean(x)
            return shaped(self.flow_encode(z, label), tuple(z.shape), self, "flow_encode")

    def _check_points(self, x: Tensor) -> None:
        if x.shape[1:] != torch.Size(self.spec.shape):
            raise ValueError(f"expected points of shape {self.spec.shape}, got {tuple(x.shape[1:])}")

    def log_prob(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        *,
        index: Tensor | None = None,
        seed: int = 0,
        spatial: SpatialCondition | None = None,
    ) -> Tensor:
        """Log-density of data in nats, or its lower bound, shape (B,); see :meth:`describe`.

        Args:
            x: points in model space, shape (B, *shape).
            condition: labels, shape (B,), or None for the unconditional density.
            index: sample indices that key the probes and posterior draws; 0..B-1 when None.
            seed: the evaluation seed.
            spatial: conditions that the flow's conditioner made, one per point; None where it has none.
        """
        self._check_points(x)
        label = self.check_condition(condition, len(x))
        self.check_spatial(spatial, len(x))
        index = torch.arange(len(x)) if index is None else index

        def flow_density(z: Tensor) -> Tensor:
            density = self.flow_log_prob(z, label, index, seed, **_given(spatial))
            return shaped(density, (len(z),), self, "flow_log_prob")

        with self.full_precision():
            value = self.space.log_prob(x, flow_density, index, seed, lambda z: self.flow_denoise(z, label))
        return shaped(value, (len(x),), self.space, "log_prob")

    def batch_log_prob(self, batch: Batch) -> Tensor:
        """Log-densities of a numbered batch of held-out data under its own labels and conditions, shape (B,)."""
        assert batch.index is not None, "the datamodule numbers its samples"
        label = batch.label if self.num_classes is not None else None
        spatial = None
        if self.conditioner is not None:
            spatial = self.conditioner.held_out_condition(batch.x, batch.condition, batch.index, 0, self.space)
        return self.log_prob(batch.x, label, index=batch.index, spatial=spatial)

    def check_density(self) -> None:
        """Refuse (ValueError) a log-density that does not exist in this space; nothing is computed."""
        self.space.check_likelihood()

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Turn autocast off: likelihoods are computed in the precision of their inputs."""
        with autocast_off(self.device):
            yield


def _given(spatial: SpatialCondition | None) -> dict[str, Any]:
    """The argument of a conditioned flow's own methods; other families do not take it."""
    return {} if spatial is None else {"spatial": spatial}
