"""Reflow: flow matching on the pairs that a trained flow makes of noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowbench.core.checks import check_count, check_number, check_seed
from flowbench.core.devices import preparation_device
from flowbench.core.seeds import generator
from flowbench.data import Batch, DataSpec, FlowDataModule
from flowbench.data.samplers import EndlessSampler
from flowbench.evaluation.override import SamplerOverride
from flowbench.families.base import FlowModule, NetworkFactory
from flowbench.families.conditioning.base import Conditioner
from flowbench.families.conditioning.condition import Condition
from flowbench.families.distillation import start_from
from flowbench.families.flow_matching import FlowMatching
from flowbench.families.latents.space import Space
from flowbench.families.pairing.base import Pairing, PairingContext, Pairs, cost_ratio
from flowbench.families.pairing.pair_store import PairStore
from flowbench.families.pairing.teacher import (
    FrozenTeacher,
    check_noise,
    check_spaces,
    check_teacher,
    required_teacher,
    source_of,
    space_of,
)
from flowbench.flows import Solver, Source
from flowbench.training.count import forward_flops
from flowbench.training.preparation import Preparation

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Reflow", "ReflowPairing"]

GENERATION_BATCH = 512
# Pairs by which the operations of all are counted: a solver that chooses its steps does not spend alike on each.
COUNTED_PAIRS = 16


class ReflowPairing(Pairing):
    """Fixed pairs (z0, z1) with z1 the sample that a trained flow makes of the source point z0.

    Pair i starts from noise keyed by (seed, i); a conditional teacher is given the label of a training sample drawn
    for it. The pairs are made once per machine, before the first step, and kept in the cache; every run is charged what
    they cost, as a part of its budget in operations or seconds (see :meth:`prepare`). They lie where the flow
    lives, as the teacher's sampler gives them: denoised where it denoises, guided where it guides.

    In training the data are not looked at: the pairs have an endless stream of their own, in the same batches. A share
    of them is held out for the validation batches.

    Args:
        teacher: trained; any flow.
        num_pairs: pairs to make, at least 2.
        hold_out: share of them for validation, in (0, 1).
        seed: keys noise and labels, apart from the run's seed: runs with other seeds share the pairs.
        solver: integrates the teacher's samples; None is the teacher's own sampler.
        guidance: scale of the teacher's guidance; None is the teacher's own.

    Raises:
        ValueError: for a value out of range, or a solver for a teacher whose samples need none.
    """

    def __init__(
        self,
        teacher: FlowModule,
        num_pairs: int,
        hold_out: float = 0.05,
        seed: int = 0,
        solver: Solver | None = None,
        guidance: float | None = None,
    ) -> None:
        check_count("num_pairs", num_pairs, at_least=2, hint="one to train on and one to hold out")
        check_number("hold_out", hold_out, above=0, below=1, hint="validation needs pairs of its own")
        check_seed("pair_seed", seed)
        check_number("pair_guidance", guidance, at_least=0, or_none=True, hint="1 is none")
        self._frozen = FrozenTeacher(teacher)
        if solver is not None:
            if not isinstance(teacher, FlowMatching) or not teacher.solves_samples:
                raise ValueError(
                    f"pair_solver integrates the field of a teacher, and samples of {type(teacher).__name__} follow "
                    "none: leave it out"
                )
            teacher.solver = solver
            teacher.check_axes()
        if guidance is not None:
            teacher.check_guidance(guidance)
        self.num_held_out = min(max(1, round(hold_out * num_pairs)), num_pairs - 1)
        self.num_training = num_pairs - self.num_held_out
        self.seed = seed
        self.guidance = guidance
        self._store: PairStore | None = None
        self._cost = Preparation()
        self._sampler: EndlessSampler | None = None

    @property
    def teacher(self) -> FlowModule:
        """The flow whose samples are paired."""
        return self._frozen.flow

    def __repr__(self) -> str:
        return f"ReflowPairing({type(self.teacher).__name__}, {self.num_training + self.num_held_out} pairs)"

    # ---- generation -------------------------------------------------------------------------------------

    def check(self, context: PairingContext, data: FlowDataModule) -> None:
        """Refuse a teacher of other points, labels or another source, or with less noise."""
        check_teacher(context, self.teacher)
        check_noise(context, self.teacher)

    def setup(self, context: PairingContext, data: FlowDataModule | None, training: bool = True) -> None:
        """Have the pairs ready, and their order; processes share the work.

        Raises:
            ValueError: when teacher and student do not live in the same space, or there is no datamodule.
        """
        if not isinstance(data, FlowDataModule):
            raise ValueError(f"stored pairs follow the batches of a FlowDataModule, got {type(data).__name__}")
        self.prepare(context, data)
        self._sampler = EndlessSampler(
            self.num_training, data.batch_size, context.seed, context.rank, context.world_size
        )

    def prepare(self, context: PairingContext, data: FlowDataModule) -> Preparation:
        """Read the pairs, or make those that are missing, on a GPU where there is one.

        Returns:
            The operations of the teacher's samples, by those of a few of each file, and the seconds that the pairs
            took, both as noted when they were made. Operations that an earlier version did not note are counted now.

        Raises:
            ValueError: when teacher and student do not live in the same space.
        """
        check_teacher(context, self.teacher)
        check_spaces(context, self.teacher)
        num_pairs = self.num_training + self.num_held_out
        store = PairStore("reflow", self._identity(data), num_pairs)
        if self._store is None or self._store.folder != store.folder:
            labels = self._labels(data, num_pairs)
            device = preparation_device(context.device)

            def flops(index: Tensor) -> float:
                counted = index[:COUNTED_PAIRS]
                return forward_flops(lambda: self._made(counted, labels, device)) * len(index) / len(counted)

            store.complete(lambda index: self._made(index, labels, device), flops)
            self._cost = Preparation(store.flops, store.seconds)
            self._store = store
        return self._cost

    def _identity(self, data: FlowDataModule) -> Mapping[str, Any]:
        """All that the pairs depend on; the data only through the labels of their training split."""
        teacher, labelled = self.teacher, self.teacher.num_classes is not None
        facts = teacher.describe()
        return {
            "kind": "reflow",
            "seed": self.seed,
            "teacher": self._frozen.checksum,
            "shape": list(teacher.flow_shape),
            "source": repr(teacher.source),
            "sampler": f"{type(teacher).__name__} {facts.sampler}",
            "guidance": facts.guidance_scale if self.guidance is None else self.guidance,
            "labels": {**data.spec.identity, "num": len(data.split("train"))} if labelled else None,
        }

    def _labels(self, data: FlowDataModule, num_pairs: int) -> Tensor | None:
        """The label of a training sample drawn for each pair."""
        if self.teacher.num_classes is None:
            return None
        labels = data.split("train").label
        assert labels is not None, "a conditional teacher's data are labelled"
        drawn = torch.randint(len(labels), (num_pairs,), generator=generator(self.seed, "reflow", "label"))
        return labels[drawn]

    @torch.no_grad()
    def _made(self, index: Tensor, labels: Tensor | None, device: torch.device) -> dict[str, Tensor]:
        teacher = self._frozen.on(device)
        parts: list[dict[str, Tensor]] = []
        for rows in index.split(GENERATION_BATCH):
            noise = teacher.source.sample_indexed(rows, teacher.flow_shape, self.seed, "reflow", device=device)
            label = None if labels is None else labels[rows].to(device)
            with teacher.full_precision():
                points = teacher.drawn(noise, Condition(label), SamplerOverride(guidance=self.guidance)).x
            if not bool(points.isfinite().all()):
                raise ValueError(
                    "the teacher's samples hold NaN or infinity: train it longer, or give another pair_solver"
                )
            part = {"x0": noise.cpu(), "x1": points.float().cpu()}
            parts.append(part if label is None else {**part, "label": label.cpu()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    # ---- training ---------------------------------------------------------------------------------------

    def pairs(
        self, context: PairingContext, x1: Tensor, label: Tensor | None, batch: Batch, rng: torch.Generator
    ) -> Pairs:
        """The stored pairs at this batch's place in the stream; dropped labels stay dropped.

        Before :meth:`setup`, as when operations are counted, fresh noise and the points as they are.
        """
        if self._store is None or (self._sampler is None and batch.position is not None):
            return Pairs(context.source.sample_for(x1, rng), x1, label)
        rows = self._store.take(self._chosen(batch, len(x1)), x1.device)
        x0, x1 = rows["x0"], rows["x1"]
        if label is not None:
            label = torch.where(label.eq(self.teacher.num_classes or 0), label, rows["label"])
        return Pairs(x0, x1, label, diagnostics=lambda: {"cost_ratio": cost_ratio(x0, x0.roll(1, 0), x1)})

    def _chosen(self, batch: Batch, num: int) -> Tensor:
        """Numbers of the pairs of a batch: of the stream, or held out."""
        if batch.position is not None:
            assert self._sampler is not None
            return self._sampler.batch_at(batch.position).indices
        index = torch.arange(num) if batch.index is None else batch.index.cpu()
        return self.num_training + index % self.num_held_out


class Reflow(FlowMatching):
    """Flow matching on the pairs of a trained flow, which straightens its paths (rectified flow).

    Its noise and samples are a coupling of the same two distributions, with a transport cost that is not larger and
    paths that cross less; each round does so again, and keeps the errors of the former. A chain of rounds is a chain of
    experiment files, each with the former as `teacher`. With ``times: PointTimes(0)`` and one Euler step it is the
    paper's one-step distillation.

    Making the pairs is paid from a training budget in operations or seconds: `num_pairs` samples of the teacher,
    which `pair_solver` makes cheaper. The training of the teacher is no part of it.

    References:
        Liu et al. (2023), Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow, arXiv
        2209.03003, sec. 2 and alg. 1.

    Args:
        spec: the data's shape, classes and value grid.
        network: builds the velocity network.
        teacher: trained, of the same data; an experiment file names it under ``requires``.
        num_pairs: pairs to make, at least 2.
        hold_out: share of the pairs for validation, in (0, 1).
        pair_seed: keys the pairs' noise and labels, >= 0; runs with other seeds share the pairs.
        pair_solver: integrates the pairs; None is the teacher's own sampler.
        pair_guidance: scale of the teacher's guidance, in [0, 1e12]; None is the teacher's own.
        initialise_from_teacher: start from the teacher's weights; it must have the same network.
        space: where the student lives; None is beside the teacher: its autoencoder's latents, or the data space.
        source: None is the teacher's.
        conditioner: refused, because generated points have no data that a condition could be made from.
        options: the other axes of :class:`FlowMatching`; `pairing` is what this family chooses.

    Raises:
        ValueError: without a teacher, or with one of another shape, source, number of classes or network.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import DataSpec
        >>> from flowbench.networks import MLP
        >>> spec, network = DataSpec("points", "1", (2,)), partial(MLP, width=16, depth=1)
        >>> teacher = FlowMatching(spec, network).eval()
        >>> flow = Reflow(spec, network, teacher=teacher, num_pairs=100)
        >>> noise = flow.draw_noise(torch.arange(3), seed=0)
        >>> torch.equal(flow.sample(noise).x, teacher.sample(noise).x)  # it starts from the teacher's weights
        True
    """

    pairing: ReflowPairing

    def __init__(
        self,
        spec: DataSpec,
        network: NetworkFactory,
        *,
        teacher: FlowModule | None = None,
        num_pairs: int = 50_000,
        hold_out: float = 0.05,
        pair_seed: int = 0,
        pair_solver: Solver | None = None,
        pair_guidance: float | None = None,
        initialise_from_teacher: bool = True,
        space: Space | None = None,
        source: Source | None = None,
        conditioner: Conditioner | None = None,
        **options: Any,
    ) -> None:
        teacher = required_teacher(teacher, "Reflow", spec)
        if conditioner is not None:
            raise ValueError("Reflow's points are generated, and a conditioner needs data to hide: leave it out")
        super().__init__(
            spec,
            network,
            pairing=ReflowPairing(teacher, num_pairs, hold_out, pair_seed, pair_solver, pair_guidance),
            space=space or space_of(teacher),
            source=source or source_of(teacher),
            **options,
        )
        check_teacher(self.pairing_context, teacher)
        if initialise_from_teacher:
            settings = ", e.g. by `base: [<its experiment file>]`"
            start_from(teacher, self.network, self.objective.prediction, settings)
