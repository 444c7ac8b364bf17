"""Flow maps: one network for the average velocity between any two times; few evaluations carry noise to data."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor

from flowbench.core.autocast import autocast_off
from flowbench.core.checks import check_number
from flowbench.core.contract import shaped
from flowbench.data import Batch, DataSpec, FlowDataModule
from flowbench.evaluation.override import SamplerOverride
from flowbench.families.answers import SolvedDensity
from flowbench.families.average_velocity import AverageVelocityNetwork, Part
from flowbench.families.base import FlowModule, FlowSamples, NetworkFactory
from flowbench.families.conditioning.base import guided_network
from flowbench.families.conditioning.condition import Condition
from flowbench.families.description import Description
from flowbench.families.distillation import VelocityTeacher
from flowbench.families.divergence_head import DivergenceHead, JointNetwork, RestingBatch
from flowbench.families.flow_matching import FlowMatching
from flowbench.families.latents.space import Space
from flowbench.families.network_evaluations import CountedNetwork, spending
from flowbench.families.pairing.base import Pairs
from flowbench.flows import (
    BothWays,
    ClassifierFreeGuidance,
    Composition,
    Field,
    FlowMapObjective,
    Guidance,
    JumpBatch,
    Jumps,
    JumpTimes,
    Likelihood,
    LinearPath,
    PathSample,
    SolutionConsistency,
    Source,
    UniformWeight,
)
from flowbench.flows.flow_map.divergence import jumped_log_likelihood
from flowbench.training.count import Count, count_flops
from flowbench.training.module import Loss
from flowbench.training.parallel import shards_weights

__all__ = ["FlowMap"]

# Where squared residuals concentrate, all adaptive weights are nearly equal; in fewer dimensions they are not.
WEIGHED_DIMS = 300


class FlowMap(FlowMatching):
    """A flow map: the network is the average velocity u(x, s, t), and X(x, s, t) = x + (t - s) u carries x from s to t.

    A share of every batch, the diagonal, has s = t and learns the velocity as flow matching does; the rest jumps, and
    learns by an objective what average velocities must be. Samples take one evaluation a jump. Paths, encodings and
    likelihoods are those of the ODE of the velocity u(x, t, t), as of any matching flow: one checkpoint gives both.
    With a divergence head :meth:`head_density` estimates log-densities by a few jumps from the data to the source too.
    Couplings, weights, sources, latents, conditions and guidance are those of :class:`FlowMatching`.

    References:
        Boffi, Albergo and Vanden-Eijnden (2025), How to build a consistency model: Learning flow maps via
        self-distillation, arXiv 2505.18825. Each objective names its own.

    Args:
        spec: the data's shape, classes and value grid.
        network: builds a velocity network of two times (``second_time: true``).
        map_objective: what teaches jumps; None is :class:`~flowbench.flows.SolutionConsistency`.
        jump_times: between which times; None is the objective's own choice, with a divergence head
            :class:`~flowbench.flows.BothWays` of it. Samples take no other jumps.
        diagonal: share of every batch that learns the velocity at one time, in (0, 1]; rounded to whole samples.
        jumps: how samples are drawn; None is one jump.
        target_guidance: scale w of the guidance that is trained in, >= 0, for conditional flows, so that samples need
            none: the velocity v of a labelled pair becomes ``w v + (1 - w) u(x, s, s)``, u without the label; a
            teacher's is guided. 1 is none.
        teacher: a trained flow whose velocity takes the place of the pairs': distillation; None learns from the data.
        initialise_from_teacher: start from the teacher's weights; it must have the same network but for its one time.
        divergence_head: what learns the average divergences of jumps; None: nothing does.
        space: where the flow lives; None is beside the teacher, or the data space.
        source: where it starts; None is the teacher's, or the standard normal.
        options: the other axes of :class:`FlowMatching`; `path` is the straight line.

    Raises:
        ValueError: when two choices exclude each other, for a network of one time, or a teacher that does not fit.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import DataSpec
        >>> from flowbench.networks import MLP
        >>> network = partial(MLP, width=16, depth=1, second_time=True)
        >>> flow = FlowMap(DataSpec("points", "1", (2,)), network)
        >>> samples = flow.sample(flow.draw_noise(torch.arange(3), seed=0), network_evaluations=2)
        >>> samples.x.shape, samples.network_evaluations, flow.describe().sampler
        (torch.Size([3, 2]), 2.0, 'Composition(num_jumps=1)')
    """

    sampling_arguments = FlowMatching.sampling_arguments | {"jumps"}
    solves_samples = False

    def __init__(
        self,
        spec: DataSpec,
        network: NetworkFactory,
        *,
        map_objective: FlowMapObjective | None = None,
        jump_times: JumpTimes | None = None,
        diagonal: float = 0.5,
        jumps: Jumps | None = None,
        target_guidance: float = 1.0,
        teacher: FlowModule | None = None,
        initialise_from_teacher: bool = True,
        divergence_head: DivergenceHead | None = None,
        space: Space | None = None,
        source: Source | None = None,
        **options: Any,
    ) -> None:
        check_number("diagonal", diagonal, above=0, at_most=1, hint="1 is flow matching")
        check_number("target_guidance", target_guidance, at_least=0, hint="1 is none")
        self.map_objective = map_objective or SolutionConsistency()
        self.divergence_head = divergence_head
        self.jump_times = jump_times or self._default_times()
        self.map_objective.check_times(self.jump_times)
        self.diagonal = diagonal
        self.jumps = jumps or Composition()
        self.target_guidance = target_guidance
        self.teacher = None if teacher is None else VelocityTeacher(teacher, spec, target_guidance)
        if self.teacher is not None:
            space, source = space or self.teacher.space, source or self.teacher.source
        super().__init__(spec, network, space=space, source=source, **options)
        if not getattr(self.network, "second_time", False):
            raise ValueError("FlowMap's network takes two times: set second_time: true in its init_args")
        if target_guidance != 1.0 and self.num_classes is None:
            raise ValueError(f"target_guidance of scale {target_guidance:g} needs labels: set conditional=true")
        if self.teacher is None:
            self.check_guidance(target_guidance)
        self._check_weight_power()
        self._intervals(self.jumps)
        self.head = None if divergence_head is None else divergence_head.build(self.network)
        self._density_jumps(1)
        if self.teacher is not None:
            self.teacher.check(self.pairing_context)
            if initialise_from_teacher:
                self.teacher.initialise(self.network)

    def _default_times(self) -> JumpTimes:
        times = self.map_objective.default_times
        if self.divergence_head is None:
            return times
        if not self.map_objective.goes_back:
            raise ValueError(
                f"{self.map_objective!r} trains jumps to later times alone, and the density of a divergence head jumps "
                "back to the source: take Progressive"
            )
        return BothWays(times)

    def check_axes(self) -> None:
        """Also refuse other paths than the straight line, and renoising where pairs are not independent."""
        super().check_axes()
        if self.objective.needs_conversion:
            raise ValueError(
                f"FlowMap's network predicts average velocities, got objective {self.objective!r}: leave it out; "
                "map_objective says what teaches its jumps"
            )
        if not isinstance(self.path, LinearPath) or self.path.needs_generator or self.sampling_path is not None:
            found = self.path if self.sampling_path is None else self.sampling_path
            raise ValueError(f"FlowMap jumps along straight lines without noise, got {found!r}: take LinearPath")
        independent = self.pairing.is_independent and not self.source.is_paired and self.sampling_source is None
        if self.jumps.adds_noise and not (independent and isinstance(self.weight, UniformWeight)):
            raise ValueError(
                f"{self.jumps!r} returns to the path of independent pairs of one weight, got {self.pairing!r}, "
                f"{self.source!r} and {type(self.weight).__name__}: take Composition"
            )

    def _check_weight_power(self) -> None:
        power, dims = self.map_objective.weight_power, math.prod(self.flow_shape)
        if power and dims < WEIGHED_DIMS:
            warnings.warn(
                f"weight_power={power:g} in {dims} dimensions teaches another velocity than the mean: set 0",
                stacklevel=3,
            )

    def describe(self) -> Description:
        """Names the sampler of jumps, and a guidance that was trained in; likelihoods are those of the ODE."""
        found = super().describe()
        trained_in = "" if self.target_guidance == 1.0 else f"+target_guidance={self.target_guidance:g}"
        sampler = repr(self.jumps) + found.sampler.removeprefix(repr(self.solver)) + trained_in
        return replace(found, sampler=sampler, is_deterministic=not self.jumps.adds_noise)

    def count(self) -> Count:
        """The evaluations are those of the jumps."""
        found = super().count()
        number = self.jumps.num_jumps
        return replace(found, evaluations=number, sampling_flops=(found.evaluation_flops or 0) * number)

    def flops_of_one(self) -> int:
        """Operations of a sample of the diagonal and of one that jumps, in their shares."""
        return round(self.diagonal * self._flops_at(1.0) + (1 - self.diagonal) * self._flops_at(0.0))

    def _flops_at(self, diagonal: float) -> int:
        kept, self.diagonal = self.diagonal, diagonal
        try:
            return count_flops(self.loss_of_one)
        finally:
            self.diagonal = kept

    # ---- training -------------------------------------------------------------------------------------

    def check_training(self, data: FlowDataModule, trainer: L.Trainer | None = None) -> None:
        """Also refuse forward-mode derivatives of sharded weights, and a divergence head on them."""
        super().check_training(data, trainer)
        if self.head is not None and trainer is not None and shards_weights(trainer.strategy):
            raise ValueError(
                f"a divergence head reads features, which {type(trainer.strategy).__name__} does not gather: use "
                "trainer.strategy=ddp, or leave divergence_head out"
            )
        if self.map_objective.uses_forward_mode and trainer is not None and shards_weights(trainer.strategy):
            raise ValueError(
                f"{self.map_objective!r} differentiates the network in forward mode, which sharded weights cannot do: "
                "set derivative: difference"
            )

    def on_fit_start(self) -> None:
        """Also refuse a teacher in another latent space."""
        super().on_fit_start()
        if self.teacher is not None:
            self.teacher.check_space(self.pairing_context)

    def loss(self, points: Tensor, condition: Condition, batch: Batch, generator: torch.Generator) -> Loss:
        """Mean squared error of the velocity on the diagonal, and of the objective's residual on the samples that jump.

        Both are averaged over dimensions, weighted by the pair, and averaged over the batch; those of a divergence head
        are added.
        """
        pairs = self.pairing.pairs(self.pairing_context, points, condition.label, batch, generator)
        precise = autocast_off(points.device) if self.map_objective.needs_full_precision else nullcontext()
        with precise:
            error, metrics = self._errors(pairs, replace(condition, label=pairs.label), generator)
        return self.weighted_loss(error, pairs, metrics)

    def _errors(self, pairs: Pairs, given: Condition, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The error of each sample, shape (B,): of those that jump first, then of the diagonal."""
        num = len(pairs.x1)
        num_jumps = num - round(self.diagonal * num)
        # As in flow matching, so that a batch without jumps has its loss to the bit.
        times = self.times.sample(num, generator, pairs.x1.device)
        jumping, resting = slice(num_jumps), slice(num_jumps, num)
        start, end = self.jump_times.sample(num_jumps, generator, pairs.x1.device)
        start = torch.cat([start, times[resting]])
        point = self.path.sample(pairs.x0, pairs.x1, start, generator)
        network = AverageVelocityNetwork(self.network, given, self.training)
        learned = slice(num) if self.map_objective.needs_velocity else resting
        velocity = self._velocity(network, point, given, learned)
        teacher = None
        if self.teacher is not None and num_jumps:
            teacher = self.teacher.field(given.rows(jumping), pairs.x1.device)
        jumps = JumpBatch(
            point.xt[jumping], start[jumping], end, velocity[jumping], teacher, self._progress(), generator
        )
        ends = self.map_objective.ends(jumps) if num_jumps else ()
        parts = [Part(jumps.x, jumps.start, stop, jumping) for stop in ends]
        if num_jumps < num:
            parts.append(Part(point.xt[resting], start[resting], start[resting], resting))
        found = network.together(parts)
        errors: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        if num_jumps:
            residual = self.map_objective.residual(network.rows(jumping), jumps, tuple(found[: len(ends)]))
            errors.append(
                self.map_objective.error(shaped(residual, tuple(jumps.x.shape), self.map_objective, "residual"))
            )
            metrics["jump_loss"] = errors[-1].detach().mean()
        if num_jumps < num:
            errors.append((found[-1] - velocity[resting]).float().square().flatten(1).mean(1))
            metrics["diagonal_loss"] = errors[-1].detach().mean()
        if self.divergence_head is None or self.head is None:
            return torch.cat(errors), metrics
        # Last, so that all the draws of the map are those without a head.
        rest = RestingBatch(point.xt[resting], start[resting], self._differentiable_teacher(given.rows(resting)))
        of_head, logged = self.divergence_head.errors(JointNetwork(network, self.head), jumps, rest, generator)
        return torch.cat(errors) + of_head, {**metrics, **logged}

    def _differentiable_teacher(self, given: Condition) -> Field | None:
        return None if self.teacher is None else self.teacher.differentiable_field(given, self.weights_device)

    def _velocity(self, network: AverageVelocityNetwork, point: PathSample, given: Condition, learned: slice) -> Tensor:
        """What velocities are learned from, of these points; of the others those of the pairs; shape (B, *D)."""
        first = learned.start or 0
        if first == len(point.xt):
            return point.velocity
        rows = PathSample(*(part[learned] for part in (point.x0, point.x1, point.t, point.xt, point.velocity)))
        return torch.cat([point.velocity[:first], self._target(network.rows(learned), rows, given.rows(learned))])

    @torch.no_grad()
    def _target(self, network: AverageVelocityNetwork, point: PathSample, given: Condition) -> Tensor:
        """What velocities are learned from: those of the pairs, guided ones, or a teacher's; shape (B, *D)."""
        if self.teacher is not None:
            return self.teacher.field(given, point.xt.device)(point.t, point.xt)
        if self.target_guidance == 1.0 or given.label is None:
            return point.velocity
        free = network.without_labels()(point.xt, point.t, point.t)
        guided = self.target_guidance * point.velocity + (1 - self.target_guidance) * free
        unlabelled = given.label.eq(self.num_classes or 0).view(-1, *[1] * (point.xt.ndim - 1))
        return torch.where(unlabelled, point.velocity, guided)

    def _progress(self) -> float:
        """Share of the training that is over; 0 outside of one."""
        return 0.0 if self._trainer is None else self._next_progress()

    # ---- samples --------------------------------------------------------------------------------------

    def _check_evaluations(self, guide: Guidance, guided: bool, network_evaluations: int | None) -> None:
        """Refuse evaluations that guided jumps cannot spend exactly, and jumps that are not trained."""
        self._jumps(guide, guided, network_evaluations)

    def flow_sample(self, noise: Tensor, condition: Condition, override: SamplerOverride) -> FlowSamples:
        """Jump from the source to the data; every evaluation of the network counts.

        Guidance combines the average velocities of each jump with and without the label, at the time where it starts.
        That is not the map of the guided flow, which `target_guidance` trains.

        Raises:
            ValueError: for jumps that are not trained, or evaluations that guided jumps cannot spend exactly.
        """
        guide, counted = self._guide(override.guidance), CountedNetwork(self.network)
        jumps = self._jumps(guide, self._is_guided(condition), override.network_evaluations)
        jump = partial(self._jump, guide, condition, counted)
        return FlowSamples(jumps.sample(jump, noise, self.source), counted.rows / len(noise))

    @property
    def composes_jumps(self) -> bool:
        """Where all three jumps are trained."""
        return all(self.jump_times.covers(*jump) for jump in ((0.0, 0.5), (0.5, 1.0), (0.0, 1.0)))

    def flow_jump(self, x: Tensor, condition: Condition, start: float, end: float) -> Tensor:
        """See :meth:`FlowModule.flow_jump`."""
        return self._jump(ClassifierFreeGuidance(), condition, CountedNetwork(self.network), x, start, end)

    def _jump(
        self, guide: Guidance, condition: Condition, counted: CountedNetwork, x: Tensor, start: float, end: float
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        first, last = (torch.full((len(x),), time, dtype=dtype, device=x.device) for time in (start, end))

        def network(x: Tensor, t: Tensor, label: Tensor | None = None, values: Tensor | None = None) -> Tensor:
            return counted(x, t, label, values, last)

        guided, given = guided_network(network, condition, self.conditioner)
        return x + (end - start) * guide.velocity(guided, x, first, given).to(x.dtype)

    def _jumps(self, guide: Guidance, guided: bool, network_evaluations: int | None) -> Jumps:
        """The jumps that spend so many network evaluations; None is their own number."""
        if network_evaluations is None:
            return self._intervals(self.jumps)
        if not guided:
            return self._intervals(self.jumps.with_number(network_evaluations))

        def evaluations(jumps: Jumps) -> int:
            return sum(guide.evaluations_at(start) for start, _ in jumps.intervals)

        with_number = self.jumps.with_number
        return self._intervals(spending(network_evaluations, with_number, evaluations, repr(self.jumps), "jump"))

    def _intervals(self, jumps: Jumps) -> Jumps:
        """The jumps, all of which are trained."""
        for start, end in jumps.intervals:
            if not self.jump_times.covers(start, end):
                raise ValueError(
                    f"{jumps!r} jumps from {start:g} to {end:g}, but {self.jump_times!r} trains "
                    f"{self.jump_times.covered}: take another number, or Renoise, which jumps to the data"
                )
        return jumps

    # ---- densities by jumps -----------------------------------------------------------------------------

    def head_density(self, network_evaluations: int | None = None) -> SolvedDensity | None:
        """See :meth:`FlowModule.head_density`; by as many jumps of equal length from the data to the source."""
        if self.head is None:
            return None
        number = self.jumps.num_jumps if network_evaluations is None else network_evaluations
        return SolvedDensity(partial(self._jumped_likelihood, number), repr(self._density_jumps(number)))

    def _jumped_likelihood(
        self, num_jumps: int, x: Tensor, condition: Condition, index: Tensor, seed: int
    ) -> Likelihood:
        assert self.head is not None, "asked above"
        joint = JointNetwork(AverageVelocityNetwork(self.network, condition, training=False), self.head)
        return jumped_log_likelihood(joint, x, self.source.log_prob, num_jumps)

    def _density_jumps(self, num_jumps: int) -> Composition:
        """Jumps of equal length; with a divergence head those from the data to the source are trained."""
        jumps = Composition(num_jumps)
        for start, end in jumps.intervals:
            if self.head is not None and not self.jump_times.covers(end, start):
                raise ValueError(
                    f"the density of a divergence head jumps from {end:g} to {start:g}, but {self.jump_times!r} trains "
                    f"{self.jump_times.covered}: take BothWays"
                )
        return jumps

    def flow_decode(self, noise: Tensor, condition: Condition, guidance: float | None = 1.0) -> FlowSamples:
        """The inverse of encoding: along the ODE of the velocity, not by jumps."""
        return super().flow_sample(noise, condition, SamplerOverride(guidance=guidance))
