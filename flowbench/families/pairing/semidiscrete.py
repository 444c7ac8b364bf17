"""Pairs by semidiscrete optimal transport: noise is drawn first, and its data point is looked up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flowbench.core.cache import numbers_checksum
from flowbench.core.checks import check_count, check_number
from flowbench.core.devices import preparation_device
from flowbench.data import Batch, FlowDataModule
from flowbench.families.pairing.base import Pairing, PairingContext, Pairs, cost_ratio, true_label
from flowbench.families.pairing.batch_pairing import BatchPairing
from flowbench.families.pairing.pair_store import weights_checksum
from flowbench.families.pairing.potential_fit import fitted_potentials
from flowbench.families.pairing.stream import cached_latents
from flowbench.flows import ConditionalCoupling, OptimalTransportCoupling, SemidiscreteDual, SemidiscretePotential
from flowbench.flows.coupling.semidiscrete import check_ascent
from flowbench.training.preparation import Preparation

__all__ = ["SemidiscretePairing"]

ENCODING_BATCH = 512


@dataclass(frozen=True)
class _Solved:
    """Fitted potentials with the points that they belong to.

    Attributes:
        potentials: one, or one for each class.
        members: places in the training split of the points of each.
        cost: of the fit.
        chi2: of the fit.
    """

    potentials: tuple[SemidiscretePotential, ...]
    members: tuple[Tensor, ...]
    cost: Preparation
    chi2: float
    _placed: dict[torch.device, _Solved] = field(default_factory=dict)

    def on(self, device: torch.device) -> _Solved:
        """The same with the points on a device; copies are kept, because training needs them at every step."""
        if self.potentials[0].points.device == device:
            return self
        if device not in self._placed:
            moved = tuple(SemidiscretePotential(p.points.to(device), p.potential.to(device)) for p in self.potentials)
            self._placed[device] = replace(self, potentials=moved, _placed={})
        return self._placed[device]

    def assign(self, noise: Tensor, label: Tensor | None) -> Tensor:
        """The data points of noise (B, *D), within the label where there are several potentials.

        Returns:
            Places in the training split, int64 (B,) on the CPU.
        """
        if len(self.potentials) == 1:
            return self.members[0][self.potentials[0].assign(noise).cpu()]
        assert label is not None, "pairs within labels are those of a conditional flow"
        index, label = torch.empty(len(noise), dtype=torch.int64), label.cpu()
        for number in label.unique().tolist():
            rows = (label == number).nonzero().squeeze(1)
            found = self.potentials[number].assign(noise[rows.to(noise.device)])
            index[rows] = self.members[number][found.cpu()]
        return index


class SemidiscretePairing(Pairing):
    """Fresh noise for every batch, and the data point that semidiscrete optimal transport carries it to.

    A potential of one number for each training point is fitted once, before the first step; afterwards a source point
    costs one scalar product with every training point, whatever the batch. Noise is drawn first and data follow it:
    they are looked up by index, and then dequantised, noised and encoded as the loader's would be. So noise is
    distributed exactly as the source, and data as the training split up to what `chi2` says: the squared coefficient of
    variation of how often a point is drawn. (Minibatch transport has exact data and longer pairs.)

    Points enter the fit without what barely moves them: quantised images at their bins' centres, latents at the mean of
    their posterior. Any source will do that is drawn without a look at the data point. A conditional flow needs
    `per_label`: one potential for each class, from the whole source to the points of the class, so that noise given the
    label is distributed as the source; labels stay those of the stream. One potential for all would give each class
    noise that samples of it do not start from.

    The fit is a part of the training budget, its operations in a limit on operations and its seconds in one of time. It
    is kept in the cache, under a name that follows from data, space, source and settings: runs with other seeds share
    it, and are charged what it cost. One process fits, the others read; a fit that was killed goes on. It runs on a GPU
    where there is one. Memory: the points where the flow lives, on its device, and see
    :class:`~flowbench.flows.SemidiscretePotential`.

    Outside of the training stream, as in validation, pairs are those of exact transport inside the batch, within the
    label where there are labels.

    Args:
        steps: steps of the fit at most, 1 to 1e8.
        batch: source points of a step, 1 to 2^20. About as many as there are points make a fit quick.
        chi2: the fit ends when it is estimated below this, in (0, 1e6]; None takes all the steps.
        per_label: a potential for each class.
        step_size: of the ascent, in (0, 1e3]; see :class:`~flowbench.flows.SemidiscreteDual`.
        ema: decay of the averaged potential, in [0, 1).
        seed: keys the source points of the fit, apart from the run's seed.

    References:
        Mousavi-Hosseini, Zhang, Klein, Cuturi (2025), Flow Matching with Semidiscrete Couplings, arXiv 2509.25519.

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> from flowbench.data import FlowDataModule
        >>> from flowbench.flows import GaussianSource
        >>> data = FlowDataModule("eight_gaussians", train_size=64, batch_size=32)
        >>> context = PairingContext(GaussianSource(), PixelSpace((2,)), None, 0.0, seed=0, device=torch.device("cpu"))
        >>> pairing = SemidiscretePairing(steps=100, batch=256, chi2=None)
        >>> pairing.prepare(context, data).flops > 100 * 256 * 64 * 2 * 2  # the products of the fit, and of chi2
        True
        >>> batch = data.train_batch_at(0)
        >>> pairs = pairing.pairs(context, batch.x, None, batch, torch.Generator().manual_seed(0))
        >>> pairs.x0.shape, bool(pairs.diagnostics()["cost_ratio"] < 1)
        (torch.Size([32, 2]), True)
    """

    looks_up_data = True
    described = ("chi2",)

    def __init__(
        self,
        steps: int = 2000,
        batch: int = 1024,
        chi2: float | None = 0.05,
        per_label: bool = False,
        step_size: float = 0.03,
        ema: float = 0.99,
        seed: int = 0,
    ) -> None:
        check_count("steps", steps, at_most=10**8)
        check_number("chi2", chi2, above=0, at_most=1e6, or_none=True, hint="0.05 of the uniform law")
        check_ascent(batch, step_size, ema, seed)
        self.steps, self.batch, self.chi2, self.per_label = steps, batch, chi2, per_label
        self.step_size, self.ema, self.seed = step_size, ema, seed
        self.coupling = ConditionalCoupling() if per_label else OptimalTransportCoupling()
        self._solved: _Solved | None = None
        self._identity: Mapping[str, Any] | None = None
        self._data: FlowDataModule | None = None

    def __repr__(self) -> str:
        options = f"steps={self.steps}, batch={self.batch}, chi2={self.chi2}, per_label={self.per_label}"
        return f"SemidiscretePairing({options})"

    # ---- fit ----------------------------------------------------------------------------------------------

    def check(self, context: PairingContext, data: FlowDataModule) -> None:
        """Refuse labels without a potential for each, or the other way round, and mirrored images."""
        if context.num_classes is not None and not self.per_label:
            raise ValueError(
                "one potential for all classes gives a class noise that its samples do not start from: set per_label: "
                "true in SemidiscretePairing, or conditional=false"
            )
        if context.num_classes is None and self.per_label:
            raise ValueError("per_label makes a potential for each class of a conditional flow: set conditional=true")
        if data.random_flip:
            raise ValueError(
                "SemidiscretePairing pairs noise with the images as they are, but data.random_flip mirrors them "
                "afterwards: set it to false"
            )

    def setup(self, context: PairingContext, data: FlowDataModule | None, training: bool = True) -> None:
        """Have the potential ready.

        Raises:
            ValueError: without a datamodule, whose training points are looked up.
        """
        if not training:
            return
        if not isinstance(data, FlowDataModule):
            raise ValueError(f"SemidiscretePairing looks points of a FlowDataModule up, got {type(data).__name__}")
        self.prepare(context, data)

    def prepare(self, context: PairingContext, data: FlowDataModule) -> Preparation:
        """Read the potential from the cache, or fit it.

        Raises:
            ValueError: see :meth:`check`; also for a damaged file, or a cache that cannot be written.
        """
        self.check(context, data)
        identity = self._identified(context, data)
        self._data = data
        if self._solved is None or self._identity != identity:
            self._solved, self._identity = self._fitted(context, data, identity), identity
        return self._solved.cost

    def _identified(self, context: PairingContext, data: FlowDataModule) -> dict[str, Any]:
        """All that the potential depends on, in plain types."""
        label = data.train_label if self.per_label else None
        return {
            **data.spec.identity,
            "num_samples": len(data.split("train")),
            "chosen": numbers_checksum(data.train_indices),
            "labels": numbers_checksum(label),
            "space": context.space.checksum,
            "shape": list(context.space.shape),
            "source": f"{context.source!r} {weights_checksum(context.source)}",
            "settings": [self.steps, self.batch, self.chi2, self.per_label, self.step_size, self.ema, self.seed],
        }

    def _fitted(self, context: PairingContext, data: FlowDataModule, identity: Mapping[str, Any]) -> _Solved:
        device = preparation_device(context.device)
        points = _points(replace(context, device=device), data)
        chosen = data.train_places
        rows = self._rows(context, data, chosen)

        def duals() -> list[SemidiscreteDual]:
            return [self._dual(points[part.to(device)], number, context) for number, part in enumerate(rows)]

        found = fitted_potentials(duals, [len(part) for part in rows], self.steps, self.chi2, identity)
        potentials = tuple(
            SemidiscretePotential(points[part.to(device)], g.to(device))
            for part, g in zip(rows, found.potentials, strict=True)
        )
        members = tuple(chosen[part] for part in rows)
        return _Solved(potentials, members, found.cost, found.chi2).on(context.device)

    def _rows(self, context: PairingContext, data: FlowDataModule, chosen: Tensor) -> list[Tensor]:
        """Rows of the points of each potential: all, or those of each class."""
        if not self.per_label:
            return [torch.arange(len(chosen))]
        label = data.train_label
        assert label is not None, "a conditional flow's data are labelled"
        rows = [(label[chosen] == number).nonzero().squeeze(1) for number in range(context.num_classes or 0)]
        empty = [number for number, part in enumerate(rows) if not len(part)]
        if empty:
            raise ValueError(f"per_label needs training points of every class, but there are none of {empty}")
        return rows

    def _dual(self, points: Tensor, number: int, context: PairingContext) -> SemidiscreteDual:
        source, shape = context.source, tuple(context.space.shape)
        return SemidiscreteDual(
            points,
            lambda num, rng: source.sample(num, shape, rng),
            batch=self.batch,
            step_size=self.step_size,
            ema=self.ema,
            seed=self.seed,
            names=(str(number),),
        )

    # ---- pairs --------------------------------------------------------------------------------------------

    def pairs(
        self, context: PairingContext, x1: Tensor, label: Tensor | None, batch: Batch, rng: torch.Generator
    ) -> Pairs:
        """Noise from the step's generator, and its data points; the loader's give their labels, where there are any."""
        if self._solved is None or self._data is None or batch.position is None:
            return BatchPairing(self.coupling).pairs(context, x1, label, batch, rng)
        noise = context.source.sample(len(x1), tuple(x1.shape[1:]), rng, x1.device)
        start = time.perf_counter()
        index = self._solved.on(x1.device).assign(noise, true_label(label, batch))
        found = self._data.train_batch_of(index, batch.position)
        seconds = time.perf_counter() - start
        points = context.space.encode_batch(replace(found, x=found.x.to(x1.device)), rng)
        chi2 = self._solved.chi2

        def diagnostics() -> dict[str, Tensor | float]:
            ratio = cost_ratio(noise, noise.roll(1, 0), points)
            return {"coupling_ms": 1e3 * seconds, "cost_ratio": ratio, "chi2": chi2}

        return Pairs(noise, points, label, diagnostics=diagnostics)

    def typical_pairs(
        self, context: PairingContext, x1: Tensor, label: Tensor | None, batch: Batch, rng: torch.Generator
    ) -> Pairs:
        """Noise and the data points that training gives it, without what training adds to them."""
        if self._solved is None or self._data is None:
            raise ValueError("SemidiscretePairing has no potential yet: call prepare(context, data) before")
        noise = context.source.sample(len(x1), tuple(x1.shape[1:]), rng, x1.device)
        index = self._solved.on(x1.device).assign(noise, label)
        return Pairs(noise, context.space.encode_mean(self._data.model_values("train", index).to(x1.device)), label)

    def describe(self) -> dict[str, float]:
        """Chi squared of the training points' shares: 0 where all are drawn alike."""
        return {} if self._solved is None else {"chi2": self._solved.chi2}


@torch.no_grad()
def _points(context: PairingContext, data: FlowDataModule) -> Tensor:
    """The points that are trained on where the flow lives, without what barely moves them, shape (N, d)."""
    chosen = data.train_places
    latents = cached_latents(context, data)
    if latents is not None:
        return latents.means(chosen).flatten(1).to(context.device)
    centres = data.centred()
    parts = [centres.model_values("train", rows).to(context.device) for rows in chosen.split(ENCODING_BATCH)]
    return torch.cat([context.space.encode_mean(part).flatten(1) for part in parts])
