"""Conditional flow matching: one module, one small object per axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from flowbench.core.contract import returned, shaped
from flowbench.core.seeds import generator
from flowbench.data import Batch, DataSpec, FlowDataModule
from flowbench.evaluation.override import SamplerOverride
from flowbench.families.base import DensityKind, FlowSamples, NetworkFactory, Trajectory
from flowbench.families.conditioning.base import Conditioner, check_condition_channels, guided_network
from flowbench.families.conditioning.condition import Condition, SpatialCondition
from flowbench.families.description import Description
from flowbench.families.latents.space import Space
from flowbench.families.matching_combinations import check_combination
from flowbench.families.network_evaluations import (
    CountedNetwork,
    fixed_cost,
    guided_cost,
    single_evaluation,
    with_evaluations,
)
from flowbench.families.pairing.base import ClosePairing, Pairing, PairingContext, Pairs
from flowbench.families.pairing.batch_pairing import BatchPairing
from flowbench.families.pairing.description import describe_pairs, names_of_pairs
from flowbench.families.velocity_flow import VelocityFlow
from flowbench.flows import (
    ClassifierFreeGuidance,
    ConditionedField,
    Coupling,
    Divergence,
    ExactDivergence,
    Field,
    GaussianSource,
    Guidance,
    HutchinsonDivergence,
    IndependentCoupling,
    LinearPath,
    Midpoint,
    NormAlignedSource,
    Objective,
    Path,
    PathSample,
    RescheduledField,
    RungeKutta4,
    Solver,
    Source,
    TimeDistribution,
    UniformTimes,
    UniformWeight,
    VelocityObjective,
    Weight,
    WeightResult,
)
from flowbench.training.config import TrainingConfig
from flowbench.training.count import Count, forward_flops
from flowbench.training.module import Loss
from flowbench.training.preparation import Preparation

__all__ = ["FlowMatching"]

# Above this many dimensions an exact trace costs more than a handful of probes.
EXACT_TRACE_DIMS = 8


class FlowMatching(VelocityFlow):
    """Flow matching by regression on conditional velocities (CFM).

    The network regresses the velocity of a path between a source point and a data point, or another prediction that
    gives it; the marginal field carries the source to the data. Objective, coupling, weight, path, source, guidance and
    solver are independent choices.

    References:
        Lipman et al. (2023), Flow Matching for Generative Modeling, arXiv 2210.02747, eq. 9.
        Liu et al. (2023), Flow Straight and Fast, arXiv 2209.03003, eq. 1.
        Tong et al. (2024), Improving and Generalizing Flow-Based Generative Models, arXiv 2302.00482, alg. 2.

    Args:
        spec: the data's shape, classes and value grid.
        network: builds the velocity network from the flow's shape and the number of classes.
        path: interpolation; None is the straight line.
        sampling_path: samples follow this path instead, by the scale-time transform of the trained field; None keeps
            the path of the training.
        source: where the flow starts; None is the standard normal.
        sampling_source: where samples start, in place of `source`; None is that source.
        coupling: pairs source with data inside a batch; None draws pairs independently.
        pairing: the rule that makes pairs, in place of the one that applies `coupling` to each batch; not both.
        weight: how much a pair counts; None counts all alike.
        objective: what the network predicts, and how its errors count over time; None is the velocity, alike at all.
        times: distribution of the training times; None is the uniform one.
        guidance: guidance of the sampler; None is classifier-free guidance of scale 1, which is none.
        solver: integrates samples; None is the midpoint rule with 20 steps.
        likelihood_solver: integrates log-densities; None is Runge-Kutta 4 with 32 steps (on digits
            within 0.001 bits/dim of 128 steps; 16 steps flattered the model by 0.01).
        divergence: trace of the Jacobian; None is exact up to 8 dimensions, else two fixed Rademacher probes.
        space: where the flow lives; None means the data space.
        conditioner: makes conditions on the grid of the flow's space, for a network built with their channels.
        conditional: condition on class labels.
        label_dropout: share of training labels replaced by the null label, in [0, 1).
        training: optimiser, averaged weights and compilation; None takes the defaults.

    Raises:
        ValueError: when two choices exclude each other.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import DataSpec
        >>> from flowbench.networks import MLP
        >>> flow = FlowMatching(DataSpec("points", "1", (2,)), partial(MLP, width=16, depth=1))
        >>> samples = flow.sample(flow.draw_noise(torch.arange(3), seed=0), network_evaluations=8)
        >>> samples.x.shape, samples.network_evaluations
        (torch.Size([3, 2]), 8.0)
        >>> flow.log_prob(torch.zeros(1, 2))  # nothing moves before training: ln N(0; 0, I) = -ln(2 pi)
        tensor([-1.8379], dtype=torch.float64)
    """

    sampling_arguments = VelocityFlow.sampling_arguments | {
        "divergence",
        "guidance",
        "likelihood_solver",
        "sampling_path",
        "solver",
    }
    # Whether `solver` draws the samples.
    solves_samples = True

    def __init__(
        self,
        spec: DataSpec,
        network: NetworkFactory,
        *,
        path: Path | None = None,
        sampling_path: Path | None = None,
        source: Source | None = None,
        sampling_source: Source | None = None,
        coupling: Coupling | None = None,
        pairing: Pairing | None = None,
        weight: Weight | None = None,
        objective: Objective | None = None,
        times: TimeDistribution | None = None,
        guidance: Guidance | None = None,
        solver: Solver | None = None,
        likelihood_solver: Solver | None = None,
        divergence: Divergence | None = None,
        space: Space | None = None,
        conditioner: Conditioner | None = None,
        conditional: bool = False,
        label_dropout: float = 0.1,
        training: TrainingConfig | None = None,
    ) -> None:
        self.times = times or UniformTimes()  # before the base class asks what density there is
        super().__init__(
            spec,
            space=space,
            sampling_source=sampling_source,
            conditional=conditional,
            label_dropout=label_dropout,
            training=training,
        )
        self.network = network(self.flow_shape, self.num_classes)
        self.conditioner = conditioner
        check_condition_channels(self.network, conditioner, self.space)
        self.path = path or LinearPath()
        self.sampling_path = sampling_path
        self.source = source or GaussianSource()
        if coupling is not None and pairing is not None:
            raise ValueError(
                f"coupling applies to single batches, and {pairing!r} pairs by itself: give one of the two"
            )
        self.pairing = pairing or BatchPairing(coupling)
        self.weight = weight or UniformWeight()
        self.objective = objective or VelocityObjective()
        self.guidance = guidance or ClassifierFreeGuidance()
        self.check_guidance(self.guidance.scale)
        self.solver = solver or Midpoint(num_steps=20)
        self.likelihood_solver = likelihood_solver or RungeKutta4(num_steps=32)
        few = torch.Size(self.flow_shape).numel() <= EXACT_TRACE_DIMS
        self.divergence = divergence or (ExactDivergence() if few else HutchinsonDivergence(num_probes=2))
        self.check_axes()
        self.objective = self.objective.for_path(self.path, self.source_std or 1.0)

    @property
    def density(self) -> DensityKind:
        """``none`` where the field is trained at one time alone: no differential equation ends where samples do."""
        return super().density if self.times.trains_field else "none"

    @property
    def source_std(self) -> float | None:
        """Standard deviation of each coordinate of a Gaussian source; None for any other."""
        return self.source.std if isinstance(self.source, GaussianSource) else None

    def check_axes(self) -> None:
        """Refuse combinations that would train or sample something else than they state."""
        check_combination(
            path=self.path,
            sampling_path=self.sampling_path,
            source=self.source,
            sampling_source=self.sampling_source,
            pairing=self.pairing,
            weight=self.weight,
            objective=self.objective,
            solver=self.solver,
            likelihood_solver=self.likelihood_solver,
            labelled=self.num_classes is not None,
            conditioned=self.conditioner is not None,
        )

    @property
    def pairing_context(self) -> PairingContext:
        """The facts that the pairs depend on."""
        trainer = self._trainer
        return PairingContext(
            self.source,
            self.space,
            self.num_classes,
            self.label_dropout,
            self.seed,
            self.device,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )

    def describe(self) -> Description:
        """Names the solver of samples and what else changes them (another start or path, guidance, conditions).

        A likelihood's method is its solver and divergence; each evaluation also costs one backward pass per probe.
        """
        parts = [repr(part) for part in (self.solver, self.sampling_path, self.sampling_source) if part is not None]
        if self.objective.sampler_name is not None:
            parts.append(self.objective.sampler_name)
        if repr(self.guidance) != repr(ClassifierFreeGuidance(self.guidance.scale)):
            parts.append(repr(self.guidance))
        if self.conditioner is not None:
            parts.append(self.conditioner.sampler_name)
        return replace(
            super().describe(),
            likelihood_method=self._likelihood_method(self.likelihood_solver),
            likelihood_evaluations=fixed_cost(self.likelihood_solver),
            sampler="+".join(parts),
            encoder="+".join(filter(None, (repr(self.solver), self.objective.sampler_name))),
            encoding_evaluations=fixed_cost(self.solver),
            can_choose_evaluations=True,
            guidance_scale=self.guidance.scale if self._is_guidable else None,
            is_deterministic=self.solver.source_std is None,
        )

    @property
    def checkpoint_identity(self) -> dict[str, Any]:
        """Adds what the network predicts: read as another prediction, weights make another flow."""
        return {**super().checkpoint_identity, "prediction": self.objective.prediction}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also refuse a network of another prediction; files of earlier versions hold velocities."""
        if found := checkpoint.get("flowbench"):
            checkpoint["flowbench"] = {"prediction": VelocityObjective.prediction, **found}
        super().on_load_checkpoint(checkpoint)

    def compiled_modules(self) -> list[nn.Module]:
        """The network: the other modules hold no weights."""
        return [self.network]

    # ---- training -------------------------------------------------------------------------------------

    def fit_to(self, data: FlowDataModule, *, training: bool) -> None:
        """Fit source, weight and pairing to the data besides, where they ask for it."""
        super().fit_to(data, training=training)
        if not training:
            return
        if self.source.needs_fit or self.weight.needs_fit:
            self._fit_axes(self.fit_points(data))
        spent = Preparation(self.source.fit_flops, self.source.fit_seconds)
        self.preparation = spent + self.pairing.prepare(self.pairing_context, data)

    def _fit_axes(self, points: Tensor) -> None:
        if self.source.needs_fit:
            self.source.fit(points, generator(self.seed, "fit", "source"))
        if self.weight.needs_fit:
            rng = generator(self.seed, "fit", "weight")
            std = self.source.std if isinstance(self.source, GaussianSource | NormAlignedSource) else None
            noise = self.source.sample_for(points, rng)
            self.weight.fit(noise, points, rng, self.source.is_isotropic, source_std=std)

    def check_training(self, data: FlowDataModule, trainer: L.Trainer | None = None) -> None:
        """Also refuse what the pairing cannot pair."""
        super().check_training(data, trainer)
        self.pairing.check(self.pairing_context, data)

    def check_sampling(self, network_evaluations: int | None = None, guidance: float | None = None) -> None:
        """Also refuse evaluations that the solver under this guidance cannot spend exactly."""
        super().check_sampling(network_evaluations, guidance)
        self._check_evaluations(self._guide(guidance), self._is_guidable, network_evaluations)

    def _check_evaluations(self, guide: Guidance, guided: bool, network_evaluations: int | None) -> None:
        """Refuse evaluations that samples cannot spend exactly."""
        self._sampler(guide, guided, self._rescheduled(lambda t, x: x), network_evaluations)

    def _guide(self, scale: float | None) -> Guidance:
        """The guidance at another scale; None is its own."""
        return self.guidance if scale is None else self.guidance.with_scale(scale)

    @property
    def _is_guidable(self) -> bool:
        """Whether there are conditions that guidance acts on."""
        return self.num_classes is not None or self.drops_conditions

    def _is_guided(self, condition: Condition) -> bool:
        """Whether guidance acts on samples of this condition."""
        return condition.label is not None or (condition.grid is not None and self.drops_conditions)

    def on_fit_start(self) -> None:
        """Set the pairing up."""
        super().on_fit_start()
        self._set_up_pairing(training=True)

    def on_validation_start(self) -> None:
        """Set the pairing up where nothing is trained before."""
        super().on_validation_start()
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self._set_up_pairing(training=False)

    def _set_up_pairing(self, training: bool) -> None:
        data = getattr(self.trainer, "datamodule", None)
        self.pairing.setup(self.pairing_context, data if isinstance(data, FlowDataModule) else None, training)

    def on_fit_end(self) -> None:
        """Shut down the pairing's worker threads and close its files."""
        self.pairing.close()

    def configure_callbacks(self) -> list[L.Callback]:
        """Shut the pairing down after an exception too, which Lightning reports to callbacks only."""
        return [ClosePairing(self.pairing)]

    def draw_path_sample(
        self, points: Tensor, condition: Condition, batch: Batch, generator: torch.Generator
    ) -> tuple[Pairs, PathSample]:
        """Pairs of a batch, and a point between each of them at a time of its own; arguments as of :meth:`loss`."""
        pairs = self.pairing.pairs(self.pairing_context, points, condition.label, batch, generator)
        first, last = self.path.interval
        drawn = self.training_times(batch).sample(len(points), generator, points.device)
        t = self.objective.clock(first + (last - first) * drawn)
        return pairs, self.path.sample(pairs.x0, pairs.x1, t, generator)

    def loss(self, points: Tensor, condition: Condition, batch: Batch, generator: torch.Generator) -> Loss:
        """Weighted mean squared error of the prediction, averaged over dimensions and batch."""
        pairs, point = self.draw_path_sample(points, condition, batch, generator)
        arguments = replace(condition, label=pairs.label).arguments
        found = self.training_network(batch)(point.xt, point.t, *arguments)
        output = shaped(found, tuple(point.velocity.shape), self.network, "forward")
        return self.weighted_loss(self.objective.error(output, point), pairs, self.objective.metrics(output, point))

    def weighted_loss(self, error: Tensor, pairs: Pairs, metrics: Mapping[str, Tensor]) -> Loss:
        """The mean over a batch of errors (B,), each times the weight of its pair, with more scalars to log."""
        weighted = returned(self.weight(pairs.x0, pairs.x1), WeightResult, self.weight, "forward")

        def diagnostics() -> dict[str, Any]:
            cost = (pairs.x0 - pairs.x1).detach().flatten(1).square().sum(1).mean()
            of_pairs = pairs.diagnostics() if pairs.diagnostics else {}
            found = weighted.diagnostics
            return {"coupling_cost": cost, **of_pairs, **(found() if callable(found) else found)}

        logged = {"unweighted_loss": error.detach().mean(), **metrics, **pairs.metrics}
        return Loss((weighted.weight * error).mean(), logged, diagnostics)

    def training_network(self, batch: Batch) -> Callable[..., Tensor]:
        """What the loss of a batch calls, ``(x, t, *condition)``; a family of sequences takes their length from it."""
        return self.network

    def training_times(self, batch: Batch) -> TimeDistribution:
        """The times of a batch."""
        return self.times

    def training_pairs(self, data: FlowDataModule, num: int, seed: int) -> dict[str, float]:
        """See :func:`~flowbench.families.pairing.description.describe_pairs`."""
        points, label = self.fit_points(data, num).cpu(), self.fit_labels(data, num)
        rng = generator(seed, "training-pairs")
        self.pairing.prepare(self.pairing_context, data)
        return describe_pairs(self.pairing, self.pairing_context, self.weight, points, label, data.batch_size, rng)

    @property
    def training_pair_names(self) -> tuple[str, ...]:
        """See :func:`~flowbench.families.pairing.description.names_of_pairs`."""
        return names_of_pairs(self.weight, self.pairing)

    def loss_of_one(self) -> Tensor:
        """Without pairing and what is fitted to data, which look at values.

        So a look-up of :class:`SemidiscretePairing` is not counted here; where operations are counted on data, it is.
        """
        kept = {name: getattr(self, name) for name in ("pairing", "source", "weight")}
        self.pairing = BatchPairing(IndependentCoupling())
        self.source = GaussianSource() if self.source.needs_fit else self.source
        self.weight = UniformWeight() if self.weight.needs_fit else self.weight
        try:
            return super().loss_of_one()
        finally:
            for name, part in kept.items():
                setattr(self, name, part)

    def count(self) -> Count:
        """Adds an evaluation of the network, and those of the solver where their number is fixed."""
        x = torch.empty(1, *self.flow_shape, device=self.weights_device)
        condition = self.null_condition(1)
        flops = forward_flops(lambda: self.network(x, x.new_zeros(1), *condition.arguments))
        cost = fixed_cost(self.solver)
        evaluations = None if cost is None else int(cost)
        drawn = None if evaluations is None else flops * evaluations
        return replace(super().count(), evaluation_flops=flops, evaluations=evaluations, sampling_flops=drawn)

    # ---- field and solver -----------------------------------------------------------------------------

    def field(self, condition: Condition, guidance: Guidance | None = None) -> Field:
        """The velocity field under a condition along the path of the training, guided by `guidance`."""
        return self._field(guidance or ClassifierFreeGuidance(), condition, self.network)

    def _field(self, guide: Guidance, condition: Condition, network: Callable[..., Tensor]) -> ConditionedField:
        velocities = self.objective.field(network)  # guidance acts on velocities, whatever is predicted

        def velocity(t: Tensor, x: Tensor, label: Tensor | None, values: Tensor | None) -> Tensor:
            rows = Condition(label, None if values is None else SpatialCondition(values))
            guided, given = guided_network(velocities, rows, self.conditioner)
            return guide.velocity(guided, x, t.to(x).expand(len(x)), given)

        return ConditionedField(velocity, condition.label, condition.values)

    def flow_sample(self, noise: Tensor, condition: Condition, override: SamplerOverride) -> FlowSamples:
        """Integrate the field from 0 to 1; every evaluation of the network counts.

        Raises:
            ValueError: when the solver under this guidance cannot spend exactly those evaluations.
        """
        guide = self._guide(override.guidance)
        field, counted = self._sampling_field(guide, condition)
        rescheduled = self._rescheduled(field)
        solver, times = self._sampler(guide, self._is_guided(condition), rescheduled, override.network_evaluations)
        if rescheduled is None:
            return FlowSamples(solver.solve(field, noise, times).states[-1], counted.rows / len(noise))
        points = solver.solve(rescheduled, rescheduled.start(noise), times).states[-1]
        return FlowSamples(rescheduled.finish(points), counted.rows / len(noise))

    def _sampling_field(self, guide: Guidance, condition: Condition) -> tuple[Field, CountedNetwork]:
        """The field that samples follow, and what counts the evaluations of its network."""
        counted = CountedNetwork(self.network)
        return self._field(guide, condition, counted), counted

    def _sampler(
        self, guide: Guidance, guided: bool, rescheduled: RescheduledField | None, network_evaluations: int | None
    ) -> tuple[Solver, Tensor]:
        """The solver of samples with so many evaluations, and the first and the last time."""
        path = self.sampling_path or self.path
        solver = self.solver.for_path(path)
        times = torch.tensor((path if rescheduled is None else rescheduled).interval, dtype=torch.float64, device="cpu")
        if network_evaluations is not None:
            cost = guided_cost(guide, rescheduled) if guided else single_evaluation
            solver = with_evaluations(solver, network_evaluations, cost, times)
        return solver, times

    def _rescheduled(self, field: Field) -> RescheduledField | None:
        """The field along the path of the samples, where that is another than the path of the training."""
        return None if self.sampling_path is None else RescheduledField(field, self.path, self.sampling_path)

    def flow_encode(self, z: Tensor, condition: Condition) -> Tensor:
        """Integrate the unguided field from the data end of the path's interval to its source end.

        The sampler's solver runs backward with the same steps. An explicit method is not its own inverse: encoding and
        decoding return a point up to O(h^p), h the step and p the solver's order.
        """
        solver = self.solver.for_path(self.path)
        first, last = self.path.interval
        return solver.solve(self.field(condition), z, torch.tensor([last, first], dtype=torch.float64)).states[-1]

    @torch.no_grad()
    def trajectory(
        self, noise: Tensor, condition: Condition | Tensor | None = None, num_points: int = 33
    ) -> Trajectory:
        """States and velocities of the learned ODE at equal times, two midpoint steps between neighbours."""
        field = self.field(self.check_condition(condition, len(noise)))
        rescheduled = self._rescheduled(field)
        interval = self.path.interval
        if rescheduled is not None:
            field, noise, interval = rescheduled, rescheduled.start(noise), rescheduled.interval
        times = torch.linspace(*interval, num_points, dtype=torch.float64)
        states = Midpoint(num_steps=2 * (num_points - 1)).solve(field, noise, times).states
        velocities = torch.stack([field(t, x) for t, x in zip(times, states, strict=True)])
        return Trajectory(states, times, velocities)
