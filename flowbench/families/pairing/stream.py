"""Pairs over several batches at once, solved ahead of the training."""

from __future__ import annotations

import copy
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.core.distributed import broadcast
from flowbench.core.seeds import derive_seed, generator
from flowbench.data import Batch, FlowDataModule
from flowbench.families.latents.latent_cache import LatentCache, latent_cache
from flowbench.families.latents.space import LatentSpace
from flowbench.families.pairing.base import Pairing, PairingContext, Pairs, cost_ratio
from flowbench.families.pairing.batch_pairing import BatchPairing
from flowbench.families.pairing.job import CouplingJob, CouplingResult, solve
from flowbench.flows import Coupling, OptimalTransportCoupling, Source

__all__ = ["StreamPairing", "cached_latents"]

_FAILED = -1  # in the place of an index: the process that solves could not


@dataclass
class _PairGroup:
    """The pairs of some consecutive batches of the stream.

    Attributes:
        number: place in the stream, in groups.
        noise: source points of all processes, or of this one's shares, on the CPU, shape (N, *D).
        index: a source point for every data point, int64 (N,).
        solve_seconds: wall time of the solve; None where another process solved.
        wait_seconds: how long this process waited for it.
    """

    number: int
    noise: Tensor
    index: Tensor
    solve_seconds: float | None
    wait_seconds: float


class StreamPairing(Pairing):
    """Couples several consecutive training batches in one problem, in advance.

    The training stream is a function of (seed, position), so the data of the batches to come are known, and so is
    their noise, which is keyed by (seed, group). A group is `oversample` consecutive global batches. Larger problems
    give shorter pairs; the network's batch stays as it is (Cheng & Schwing, 2025, arXiv 2503.10636, sec. 4).

    Pairs are a function of (seed, group) alone: the same for any `ahead`, for a resumed run and, when gathered, for any
    number of processes with the same global batch. Only a permutation of the noise results, so the data points are
    looked up without what barely moves them: quantised images at their bins' centres, latents at the mean of their
    posterior. Random flips are applied first, because they change distances. Latents are read from the flow's cache
    where it has `cache_latents`; else the encoder runs here too, once more for each training point.

    Outside of the training stream, as in validation, pairs are found inside the batch: there is nothing to look ahead
    in. So they are in a call without a trainer.

    Args:
        coupling: chooses a source point for every data point of a group; None is exact optimal transport. It is given
            the labels of the data where the flow is conditional. Threads call one object, so a call must not change it.
        oversample: consecutive batches in one problem, 1 to 1e6.
        gather: one problem over all processes, solved by the first of them and sent to the others; else each process
            solves its own share.
        ahead: groups that are solved ahead in threads beside the training, 0 to 1,000; 0 solves in line. The couplings
            here compute outside of Python's lock; one written in Python takes its time from the training.
        workers: how many such threads, >= 1 and at most `ahead`. More than one pays where a solve takes longer than a
            group's training steps and a core is free for it.

    Raises:
        ValueError: for an `oversample` or `workers` below 1, a negative `ahead`, or more workers than groups ahead.

    Example:
        >>> pairing = StreamPairing(oversample=4)
        >>> pairing
        StreamPairing(OptimalTransportCoupling(), oversample=4, gather=True)
        >>> pairing.num_coupled(batch_size=64)  # four batches of 64 in one problem
        256
    """

    def __init__(
        self,
        coupling: Coupling | None = None,
        oversample: int = 1,
        gather: bool = True,
        ahead: int = 1,
        workers: int = 1,
    ) -> None:
        check_count("oversample", oversample, at_most=10**6, hint="1 is the batch itself")
        check_count("ahead", ahead, at_least=0, at_most=1000, hint="0 solves in line")
        check_count("workers", workers, at_most=max(1, ahead), hint=f"each needs one of the ahead={ahead} groups")
        self.coupling: Coupling = coupling or OptimalTransportCoupling()
        self.oversample = oversample
        self.gather = gather
        self.ahead = ahead
        self.workers = workers
        self._stream: _Stream | None = None

    def __repr__(self) -> str:
        return f"StreamPairing({self.coupling!r}, oversample={self.oversample}, gather={self.gather})"

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamPairing:
        """A copy that is not set up: it shares no thread with the original."""
        return StreamPairing(copy.deepcopy(self.coupling, memo), self.oversample, self.gather, self.ahead, self.workers)

    def num_coupled(self, batch_size: int) -> int:
        """Those of all the batches of a group."""
        return self.oversample * batch_size

    def setup(self, context: PairingContext, data: FlowDataModule | None, training: bool = True) -> None:
        """Look ahead in the training stream from now on.

        Raises:
            ValueError: without a datamodule, whose stream is what this pairing looks ahead in.
        """
        if not training:
            return
        if not isinstance(data, FlowDataModule):
            raise ValueError(
                f"StreamPairing needs the stream of a FlowDataModule, got {type(data).__name__}: "
                "give the coupling without it"
            )
        self.close()
        self._stream = _Stream(self, context, data)

    def pairs(
        self, context: PairingContext, x1: Tensor, label: Tensor | None, batch: Batch, rng: torch.Generator
    ) -> Pairs:
        """This batch's part of its group's pairs; nothing is drawn from `rng` inside the training stream.

        Raises:
            ValueError: what the coupling refuses.
            RuntimeError: on the other processes, where the coupling failed on the one that solves.
        """
        if self._stream is None or batch.position is None:
            return BatchPairing(self.coupling).pairs(context, x1, label, batch, rng)
        return self._stream.pairs(x1, label, batch.position)

    def close(self) -> None:
        """Stop looking ahead: what is queued is not solved, and only the end of the process waits for what is."""
        if self._stream is not None and self._stream.threads is not None:
            self._stream.threads.shutdown(wait=False, cancel_futures=True)
        self._stream = None


class _Stream:
    """A pairing at work on the stream of one datamodule.

    Args:
        options: the pairing.
        context: of the flow that is trained.
        data: where its batches come from.
    """

    def __init__(self, options: StreamPairing, context: PairingContext, data: FlowDataModule) -> None:
        self.options = options
        self.context = context
        self.rank, self.world_size = context.rank, context.world_size
        self.batch_size = data.batch_size
        self.local = data.batch_size // self.world_size
        self.size = options.oversample * (data.batch_size if options.gather else self.local)
        self.data = data.centred()
        self.latents = cached_latents(context, data)
        self.solves = self.rank == 0 or not options.gather
        self.num_threads = torch.get_num_threads()
        has_threads = self.solves and options.ahead > 0
        self.threads = ThreadPoolExecutor(options.workers, "flowbench-coupling") if has_threads else None
        self.queued: dict[int, tuple[CouplingJob, Future[CouplingResult]]] = {}
        self.group: _PairGroup | None = None

    # ---- one batch --------------------------------------------------------------------------------------

    def pairs(self, x1: Tensor, label: Tensor | None, position: int) -> Pairs:
        number, batch = divmod(position // self.batch_size, self.options.oversample)
        if self.group is None or self.group.number != number:
            self.group = self._solved(number)
        group = self.group
        start = batch * self.batch_size + self.rank * self.local if self.options.gather else batch * self.local
        rows = slice(start, start + self.local)
        x0 = group.noise[group.index[rows]].to(x1.device)

        def diagnostics() -> dict[str, Tensor | float]:
            ratio = cost_ratio(x0, group.noise[rows].to(x1.device), x1)
            return {"cost_ratio": ratio, "effective_batch": float(len(group.index)), **self._times(group)}

        return Pairs(x0, x1, label, diagnostics=diagnostics)

    def _times(self, group: _PairGroup) -> dict[str, Tensor | float]:
        """Milliseconds of the group, shared out among its batches."""
        share = 1e3 / self.options.oversample
        solving = {} if group.solve_seconds is None else {"coupling_ms": share * group.solve_seconds}
        return {**solving, "coupling_wait_ms": share * group.wait_seconds}

    # ---- one group --------------------------------------------------------------------------------------

    def _solved(self, number: int) -> _PairGroup:
        """Noise and pairs of a group; a collective call where they are gathered."""
        start = time.perf_counter()
        seconds, error = None, None
        try:
            noise, solved = self._answer(number) if self.solves else (self._other_noise(number), None)
        except Exception as failure:
            if not self._broadcasts:
                raise
            # The other processes wait for the result: they receive the failure before this one stops.
            noise, solved, error = torch.empty(0), None, failure
        index = torch.full((self.size,), _FAILED)
        if solved is not None:
            index, seconds = solved.index, solved.seconds
        if self._broadcasts:
            index = broadcast(index)
        if error is not None:
            raise error
        if int(index[0]) == _FAILED:
            raise RuntimeError("the coupling failed on the first process: its message says why")
        waited = time.perf_counter() - start
        self._work_ahead(number)
        return _PairGroup(number, noise, index, seconds, waited)

    @property
    def _broadcasts(self) -> bool:
        return self.options.gather and self.world_size > 1

    def _answer(self, number: int) -> tuple[Tensor, CouplingResult]:
        job, future = self.queued.pop(number, (None, None))
        if job is None or future is None:
            job = self._job(number)
            return job.noise, solve(self.options.coupling, job, self.num_threads)
        return job.noise, future.result()

    def _work_ahead(self, number: int) -> None:
        if self.threads is None:
            return
        wanted = range(number + 1, number + 1 + self.options.ahead)
        for stale in [queued for queued in self.queued if queued not in wanted]:
            self.queued.pop(stale)[1].cancel()
        for following in wanted:
            if following not in self.queued:
                try:
                    job = self._job(following)
                    future = self.threads.submit(solve, self.options.coupling, job, self.num_threads)
                except Exception:
                    # Raised again, and sent to the other processes, when the group's turn comes.
                    return
                self.queued[following] = (job, future)

    # ---- what is coupled --------------------------------------------------------------------------------

    def _job(self, number: int) -> CouplingJob:
        batches = self._batches(number)
        points = self._encoded(batches)
        labels = [batch.label for batch in batches if batch.label is not None]
        condition = torch.cat(labels) if labels and self.context.num_classes is not None else None
        seed = derive_seed(self.context.seed, "coupling", number, "solve", *self._own)
        return CouplingJob(self._noise(number, points), points, condition, seed)

    @property
    def _own(self) -> tuple[int, ...]:
        """What a process that solves its own share adds to its keys."""
        return () if self.options.gather else (self.rank,)

    def _batches(self, number: int) -> list[Batch]:
        first = number * self.options.oversample
        whole = [self.data.train_batch_at((first + i) * self.batch_size) for i in range(self.options.oversample)]
        return whole if self.options.gather else [self._share(batch) for batch in whole]

    def _share(self, batch: Batch) -> Batch:
        rows = slice(self.rank * self.local, (self.rank + 1) * self.local)
        label, index = (None if value is None else value[rows] for value in (batch.label, batch.index))
        return Batch(batch.x[rows], label, index=index)

    @torch.no_grad()
    def _encoded(self, batches: list[Batch]) -> Tensor:
        """Data of some batches where the flow lives, without noise, on the CPU."""
        if self.latents is not None:
            index = torch.cat([batch.index for batch in batches if batch.index is not None])
            return self.latents.means(index)
        device = (
            self.context.device if self.context.space.checksum else torch.device("cpu")
        )  # only weights are worth the way
        return torch.cat([self.context.space.encode_mean(batch.x.to(device)).cpu() for batch in batches])

    def _other_noise(self, number: int) -> Tensor:
        """The group's noise on a process that does not solve; it needs the data where the noise does."""
        if type(self.context.source).sample_for is not Source.sample_for:
            return self._noise(number, self._encoded(self._batches(number)))
        return self.context.source.sample(self.size, tuple(self.context.space.shape), self._generator(number))

    def _noise(self, number: int, points: Tensor) -> Tensor:
        return self.context.source.sample_for(points, self._generator(number))

    def _generator(self, number: int) -> torch.Generator:
        """Of the CPU, so that a group's noise is the same on every device and process."""
        return generator(self.context.seed, "coupling", number, *self._own)


def cached_latents(context: PairingContext, data: FlowDataModule) -> LatentCache | None:
    """The training split's latents in their file, which is there by now; None where the flow does not look them up."""
    if isinstance(context.space, LatentSpace) and context.space.cache_latents:
        return latent_cache(context.space.autoencoder, data, context.device)
    return None
