"""The contract that every contender keeps, so that the evaluator need not distinguish families."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, ClassVar, Literal, get_args

import lightning as L
import torch
from torch import Tensor, nn

from flowbench.core.autocast import autocast_off
from flowbench.core.contract import ContractError, returned, shaped
from flowbench.core.devices import wait_for
from flowbench.data import Batch, DataSpec, FlowDataModule
from flowbench.evaluation.override import SamplerOverride
from flowbench.evaluation.probe import Setup
from flowbench.families.answers import FlowSamples, SolvedDensity, Trajectory
from flowbench.families.conditioning.by_index import condition_at
from flowbench.families.conditioning.condition import Condition
from flowbench.families.description import Description, LikelihoodKind
from flowbench.families.fitted import FittedModule
from flowbench.families.latents.space import Density, LatentSpace, PixelSpace, Space
from flowbench.flows import Likelihood, Source
from flowbench.training.config import TrainingConfig
from flowbench.training.count import Count
from flowbench.training.module import Loss, TrainingModule
from flowbench.training.parallel import shards_weights

__all__ = ["FlowModule", "FlowSamples", "LikelihoodKind", "NetworkFactory", "Trajectory"]

DensityKind = Literal["exact", "ode", "none"]
NetworkFactory = Callable[[tuple[int, ...], int | None], nn.Module]


class FlowModule(FittedModule):
    """A flow between a source and the data, possibly in the latent space of an autoencoder.

    Subclasses model the flow in the flow's own space: they must define :meth:`loss`, :meth:`flow_sample`,
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
    loss_is_likelihood: ClassVar[bool] = False
    """Whether :meth:`loss` is -log p of the points in nats per dimension, as a space that is trained too needs it."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a class that defines a part of an earlier contract, which nothing would call."""
        super().__init_subclass__(**options)
        for name in ("flow_loss", "batch_loss"):
            if name in vars(cls):
                wanted = "define loss(points, condition, batch, generator)"
                raise ContractError(f"{cls.__name__} defines {name}, which is never called: {wanted}")

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
        if self.space.trained is not None:
            self._check_joint_training()
            self.autoencoder = self.space.trained
        if self.density not in get_args(DensityKind):
            *kinds, last = map(repr, get_args(DensityKind))
            wanted = f"{', '.join(kinds)} or {last}"
            raise ContractError(f"{type(self).__name__}.density must be {wanted}, got {self.density!r}")

    def _check_joint_training(self) -> None:
        if not self.loss_is_likelihood:
            raise ValueError(
                f"{type(self).__name__} regresses, its loss is no -log p(z) that an autoencoder could be trained with: "
                "take SimFlow, or a LatentSpace of a trained autoencoder"
            )

    def describe(self) -> Description:
        """Facts for rows and refusals; a family replaces those that are otherwise for it."""
        bounded = isinstance(self.space, LatentSpace) and self.density != "none"
        kind: LikelihoodKind = "bound" if bounded else self.density
        return Description(kind, has_velocities=self.density == "ode")

    @property
    def composes_jumps(self) -> bool:
        """Whether :meth:`flow_jump` goes from source to data at once, and in two halves that meet at time 1/2."""
        return False

    def flow_jump(self, x: Tensor, condition: Condition, start: float, end: float) -> Tensor:
        """Carry points (B, *flow_shape) at one time to another, unguided; a family of flow maps does.

        Raises:
            ValueError: by any other family.
        """
        raise ValueError(f"{type(self).__name__} has no map between two times: take a FlowMap")

    @property
    def checkpoint_identity(self) -> dict[str, Any]:
        """Adds classes, autoencoder checksum and noise; a checkpoint that differs models another density."""
        own = {"classes": self.num_classes, "autoencoder": self.space.identity, "noise_std": self.space.noise_std}
        own["conditioner"] = self.conditioner.name if self.conditioner else None
        return {**super().checkpoint_identity, **own}

    # ---- what a family gives --------------------------------------------------------------------------

    @property
    @abstractmethod
    def density(self) -> DensityKind:
        """What :meth:`flow_log_prob` is: ``exact``, through an ``ode`` solver, or ``none``; a class attribute will do.

        A family whose samples have no density says ``none``: its :meth:`flow_log_prob` is never called, its rows have
        no likelihood, and its map to the data need not be invertible.
        """

    @abstractmethod
    def loss(self, points: Tensor, condition: Condition, batch: Batch, generator: torch.Generator) -> Loss:
        """The loss of one training batch.

        Args:
            points: the batch where the flow lives, shape (B, *flow_shape).
            condition: of the points; what was dropped is the null label or the null condition already.
            batch: that the points were made from, for families that look at more of it.
            generator: source of every random number.
        """

    @abstractmethod
    def flow_sample(self, noise: Tensor, condition: Condition, override: SamplerOverride) -> FlowSamples:
        """Carry noise to the flow's data end.

        Args:
            noise: source points, shape (B, *flow_shape).
            condition: of the samples, checked.
            override: what is asked of the sampler in place of its own choices.
        """

    @abstractmethod
    def flow_encode(self, z: Tensor, condition: Condition) -> Tensor:
        """Carry points `z` (B, *flow_shape) to the noise that the flow maps to them, same shape, without guidance."""

    def flow_decode(self, noise: Tensor, condition: Condition, guidance: float | None = 1.0) -> FlowSamples:
        """Points (B, *flow_shape), never denoised: the inverse of encoding at scale 1; None is the sampler's own."""
        return self.drawn(noise, condition, SamplerOverride(guidance=guidance))

    def flow_denoise(self, z: Tensor, condition: Condition) -> Tensor:
        """Take the noise of training out of points (B, *flow_shape) that :meth:`flow_decode` gave, as sampling does."""
        return z

    @abstractmethod
    def flow_log_prob(self, x: Tensor, condition: Condition, index: Tensor, seed: int) -> Tensor:
        """Log-density of points `x` (B, *flow_shape) in nats, shape (B,); called with autocast off."""

    def solved_density(self, network_evaluations: int | None = None, *, refined: bool = False) -> SolvedDensity | None:
        """The log-density by another solve of the same flow, for families of density `ode`.

        Args:
            network_evaluations: evaluations of the solve; None takes those of :meth:`flow_log_prob`.
            refined: a stricter solve than that, by which its error is estimated.

        Returns:
            None where there is none: nothing is solved, or the solver has no stricter one.

        Raises:
            ValueError: when the solver cannot spend exactly those evaluations.
        """
        return None

    def head_density(self, network_evaluations: int | None = None) -> SolvedDensity | None:
        """An estimate of the log-density from learned divergences, by so many evaluations; of flow maps with a head.

        It is a likelihood of its own kind, `head`: no density, and no bound. See :meth:`solved_density` for the other
        kind of estimate.

        Args:
            network_evaluations: evaluations of the estimate; None takes those of the sampler.

        Returns:
            None where nothing learned divergences.

        Raises:
            ValueError: when those evaluations cannot be spent.
        """
        return None

    @abstractmethod
    def trajectory(
        self, noise: Tensor, condition: Condition | Tensor | None = None, num_points: int = 33
    ) -> Trajectory:
        """States between source and data.

        Args:
            noise: source points, shape (B, *flow_shape).
            condition: of the samples; labels alone, shape (B,), will do: :meth:`check_condition` makes them one.
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
        """The loss of one point of zeros where the flow lives, or of the data where the way there is trained too."""
        if self.space.trained is not None:
            return super().loss_of_one()
        points = torch.zeros(1, *self.flow_shape, device=self.weights_device)
        loss = self.loss(points, self.null_condition(1), Batch(points), torch.Generator())
        return returned(loss, Loss, self, "loss").total

    def count(self) -> Count:
        """Adds the flow's space and its classes."""
        return replace(super().count(), space=self.flow_shape, num_classes=self.num_classes)

    # ---- what every family does -----------------------------------------------------------------------

    def check_training(self, data: FlowDataModule, trainer: L.Trainer | None = None) -> None:
        """Refuse data that the space cannot carry, or that the conditioner can make nothing of."""
        super().check_training(data, trainer)
        if self.space.trained is not None and trainer is not None and shards_weights(trainer.strategy):
            raise ValueError(
                f"an autoencoder cannot be trained with its flow under {type(trainer.strategy).__name__}, which shards "
                "weights: use one device or trainer.strategy=ddp"
            )
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
        encoded = self.space.encode_batch(batch, generator)
        points = shaped(encoded, (len(batch), *self.flow_shape), self.space, "encode")
        condition = self.training_condition(batch, generator)
        loss = returned(self.loss(points, condition, batch, generator), Loss, self, "loss")
        return self.space.joined(loss, points, batch)

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        condition: Condition | Tensor | None = None,
        *,
        network_evaluations: int | None = None,
        guidance: float | None = None,
    ) -> FlowSamples:
        """Draw samples in data space, with their cost.

        Args:
            noise: source points, shape (B, *flow_shape).
            condition: of the samples; labels alone, shape (B,), will do. None: unconditional samples.
            network_evaluations: evaluations per sample, for solvers that can choose; None keeps the family's own.
            guidance: scale of classifier-free guidance; 1 is none; None keeps the family's own.

        Raises:
            ValueError: when the family cannot choose its evaluations, guidance is asked of an unconditional model, or a
                condition is missing or not wanted.
        """
        given = self.check_condition(condition, len(noise))
        by_condition = self.drops_conditions and self.num_classes is None
        free = by_condition or self.describe().has_label_free_guidance
        if guidance not in (None, 1.0) and given.label is None and not free:
            raise ValueError(f"guidance={guidance} needs labels: train with conditional=true and give a condition")
        self.check_sampling(network_evaluations, guidance)
        start = time.perf_counter()
        drawn = self.drawn(noise, given, SamplerOverride(network_evaluations, guidance))
        x = shaped(self.space.decode(drawn.x), (len(noise), *self.spec.shape), self.space, "decode")
        if given.grid is not None and self.conditioner is not None:
            x = self.conditioner.finish(x, given.grid)
        wait_for(x.device)
        return replace(drawn, x=x, seconds=time.perf_counter() - start)

    def drawn(self, noise: Tensor, condition: Condition, override: SamplerOverride) -> FlowSamples:
        """What :meth:`flow_sample` draws, which is checked: it may be somebody else's."""
        found = returned(self.flow_sample(noise, condition, override), FlowSamples, self, "flow_sample")
        shaped(found.x, tuple(noise.shape), self, "flow_sample")
        return found

    def sample_at(self, index: Tensor, setup: Setup) -> FlowSamples:
        """The samples at some indices: the same for any batch and any number of processes.

        Args:
            index: sample indices, shape (B,).
            setup: seed, data for labels and conditions, and what a sweep imposes.
        """
        return self.sample(
            self.draw_noise(index, setup.seed), condition_at(self, setup, index), **asdict(setup.override)
        )

    @torch.no_grad()
    def encode(self, x: Tensor, condition: Condition | Tensor | None = None) -> Tensor:
        """The noise that the flow carries to data, with autocast off; latent families take the posterior's mean.

        Args:
            x: points in model space, shape (B, *shape).
            condition: of the points; labels alone, shape (B,), will do. None: the unconditional flow.

        Returns:
            Noise, shape (B, *flow_shape): exact for block flows, up to the solver's error for continuous ones.

        Raises:
            ValueError: for another shape, or a condition that the model cannot take.
        """
        self._check_points(x)
        given = self.check_condition(condition, len(x))
        with self.full_precision():
            z = self.space.encode_mean(x)
            return shaped(self.flow_encode(z, given), tuple(z.shape), self, "flow_encode")

    def _check_points(self, x: Tensor) -> None:
        if x.shape[1:] != torch.Size(self.spec.shape):
            raise ValueError(f"expected points of shape {self.spec.shape}, got {tuple(x.shape[1:])}")

    def log_prob(
        self,
        x: Tensor,
        condition: Condition | Tensor | None = None,
        *,
        index: Tensor | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Log-density of data in nats, or its lower bound, shape (B,); see :meth:`describe`.

        Args:
            x: points in model space, shape (B, *shape).
            condition: of the points; labels alone, shape (B,), will do. None: the unconditional density.
            index: sample indices that key the probes and posterior draws; 0..B-1 when None.
            seed: the evaluation seed.

        Raises:
            ValueError: for another shape, a condition that the model cannot take, or a family without a density.
        """
        self._check_points(x)
        given = self.check_condition(condition, len(x))
        self._check_has_density()
        index = torch.arange(len(x)) if index is None else index

        def flow_density(z: Tensor) -> Tensor:
            return shaped(self.flow_log_prob(z, given, index, seed), (len(z),), self, "flow_log_prob")

        return self._log_prob_in_space(x, given, index, seed, flow_density)

    def _log_prob_in_space(
        self, x: Tensor, given: Condition, index: Tensor, seed: int, flow_density: Density
    ) -> Tensor:
        with self.full_precision():
            value = self.space.log_prob(x, flow_density, index, seed, lambda z: self.flow_denoise(z, given))
        return shaped(value, (len(x),), self.space, "log_prob")

    def solved_likelihood(self, density: SolvedDensity, batch: Batch) -> Likelihood:
        """As :meth:`batch_log_prob` by another solve, with what it cost and its error over the probes.

        Args:
            density: one of :meth:`solved_density`.
            batch: numbered held-out data.
        """
        index, given = batch.index, self.check_condition(self.held_out_condition(batch), len(batch))
        assert index is not None, "the samples are numbered"
        solved: list[Likelihood] = []

        def flow_density(z: Tensor) -> Tensor:
            solved.append(returned(density.solve(z, given, index, 0), Likelihood, self, "solved_density"))
            return shaped(solved[-1].log_prob, (len(z),), self, "solved_density")

        log_prob = self._log_prob_in_space(batch.x, given, index, 0, flow_density)
        return replace(solved[-1], log_prob=log_prob)

    def batch_log_prob(self, batch: Batch) -> Tensor:
        """Log-densities of a numbered batch of held-out data under its own labels and conditions, shape (B,)."""
        return self.log_prob(batch.x, self.held_out_condition(batch), index=batch.index)

    def check_density(self) -> None:
        """Refuse (ValueError) a log-density that this family, or this space, does not have; nothing is computed."""
        self._check_has_density()
        self.space.check_likelihood()

    def _check_has_density(self) -> None:
        if self.density == "none":
            raise ValueError(
                f"samples of {type(self).__name__} have no density: take out what needs a likelihood, or choose a "
                "family that has one"
            )

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Turn autocast off: likelihoods are computed in the precision of their inputs."""
        with autocast_off(self.device):
            yield
