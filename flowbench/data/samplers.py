"""Which samples form which batch: an endless stream for training, shards without padding for evaluation.

Both yield whole batches of indices, because data in memory are indexed a batch at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Sampler

from flowbench.core.checks import check_count, check_seed
from flowbench.core.seeds import generator
from flowbench.data.batch import check_group_size, check_position

__all__ = ["BatchIndex", "EndlessSampler", "ShardedSampler", "rows_of"]


@dataclass(frozen=True)
class BatchIndex:
    """Which samples this process takes.

    Attributes:
        indices: positions in the split, int64, shape (B,).
        position: place of the global batch in the stream, in samples, >= 0; None in evaluation.
        group_size: so many consecutive samples share a class, >= 1.

    Example:
        >>> taken = BatchIndex(torch.tensor([7, 2, 5]), position=96)
        >>> taken.indices.tolist(), taken.position
        ([7, 2, 5], 96)
    """

    indices: Tensor
    position: int | None = None
    group_size: int = 1

    def __post_init__(self) -> None:
        check_position(self.position)
        check_group_size(self.group_size, len(self.indices))


@lru_cache(maxsize=4)
def _epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """The permutation of one epoch, keyed by (seed, "order", epoch)."""
    return torch.randperm(num_samples, generator=generator(seed, "order", epoch))


def _check_rank(rank: int, world_size: int) -> None:
    check_count("world_size", world_size)
    check_count("rank", rank, at_least=0, at_most=world_size - 1, hint=f"there are {world_size} processes")


def rows_of(batch_size: int, rank: int, world_size: int) -> slice:
    """A process's contiguous share of a global batch.

    Args:
        batch_size: size of the global batch, >= 1.
        rank: the process, >= 0.
        world_size: number of processes, >= 1.

    Raises:
        ValueError: the processes cannot share the batch evenly.
    """
    if batch_size % world_size:
        raise ValueError(
            f"batch_size: {batch_size} (over all processes) must be a positive multiple of the "
            f"{world_size} processes; change batch_size or trainer.devices"
        )
    local = batch_size // world_size
    return slice(rank * local, (rank + 1) * local)


class EndlessSampler(Sampler[BatchIndex]):
    """An endless stream of shuffled samples, epoch after epoch, as a pure function of (seed, position).

    The stream is cut into global batches; a process takes its contiguous share of each. So the world size
    does not change which samples form a batch, and a run resumed at a position sees what it would have seen.

    Args:
        num_samples: size of the split, >= 1.
        batch_size: size of the global batch, >= 1, over all processes.
        seed: seed of the order, >= 0.
        rank: this process, >= 0.
        world_size: number of processes, >= 1.
        start: gives the position (samples drawn by all processes so far) when an iteration begins.
        members: the samples' places in a larger split, int64 (num_samples,); None is 0..num_samples - 1.

    Raises:
        ValueError: for an empty split, a batch that the processes cannot share evenly, or another number of members.

    Example:
        >>> sampler = EndlessSampler(num_samples=6, batch_size=4, seed=0)
        >>> batches = iter(sampler)
        >>> [next(batches).position for _ in range(3)]
        [0, 4, 8]
        >>> sorted(sampler.stream(position=6, num=6).tolist())  # the second epoch has every sample once
        [0, 1, 2, 3, 4, 5]
    """

    group_size: int = 1
    """Consecutive samples that share a class, as far as the stream sees to it."""

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: Callable[[], int] = int,
        members: Tensor | None = None,
    ) -> None:
        _check_rank(rank, world_size)
        check_count("num_samples", num_samples, hint="the size of the training split")
        check_count("batch_size", batch_size)
        check_seed("seed", seed)
        rows = rows_of(batch_size, rank, world_size)
        if members is not None and len(members) != num_samples:
            raise ValueError(f"members: must be the places of {num_samples} samples, got {len(members)}")
        self.num_samples = num_samples
        self.members = members
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.rows = rows

    def stream(self, position: int, num: int) -> Tensor:
        """The samples at positions ``position .. position + num - 1`` of the stream, int64, shape (num,)."""
        parts = []
        while num > 0:
            epoch, offset = divmod(position, self.num_samples)
            parts.append(_epoch_order(self.num_samples, self.seed, epoch)[offset : offset + num])
            position, num = position + len(parts[-1]), num - len(parts[-1])
        return self._in_split(torch.cat(parts))

    def _in_split(self, drawn: Tensor) -> Tensor:
        """Places in the whole split of samples of this stream."""
        return drawn if self.members is None else self.members[drawn]

    def batch_at(self, position: int) -> BatchIndex:
        """This process's share of the global batch that begins at ``position``."""
        return BatchIndex(self.stream(position, self.batch_size)[self.rows], position, self.group_size)

    def __iter__(self) -> Iterator[BatchIndex]:
        position = self.start()
        while True:
            yield self.batch_at(position)
            position += self.batch_size


class ShardedSampler(Sampler[BatchIndex]):
    """Every sample exactly once over all processes, in the same number of batches on each.

    Process r takes samples r, r + W, r + 2 W, ... Nothing is padded or repeated, so sums over all processes
    are exact; batch counts agree, so collectives inside a step meet. Where the division leaves a rest,
    batches differ by at most one sample, spread evenly. (With ``batch_size=1`` a batch may hold two samples:
    a process short of one could not fill the last batch otherwise.)

    Args:
        num_samples: size of the split.
        batch_size: largest number of samples of one process in one batch, >= 1.
        rank: this process, >= 0.
        world_size: number of processes W, >= 1.

    Raises:
        ValueError: for fewer samples than processes, or a batch size below one.

    Example:
        >>> shards = [ShardedSampler(num_samples=7, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
        >>> [[batch.indices.tolist() for batch in shard] for shard in shards]
        [[[0, 2], [4, 6]], [[1, 3], [5]]]
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        _check_rank(rank, world_size)
        check_count("batch_size", batch_size)
        check_count("num_samples", num_samples, at_least=0)
        if num_samples < world_size:
            raise ValueError(
                f"sampler: num_samples={num_samples} are too few for {world_size} processes; use fewer devices"
            )
        self.indices = torch.arange(rank, num_samples, world_size)
        largest = math.ceil(num_samples / world_size)
        self.num_batches = min(math.ceil(largest / batch_size), num_samples // world_size)

    def __len__(self) -> int:
        """Number of batches, the same on every process."""
        return self.num_batches

    def __iter__(self) -> Iterator[BatchIndex]:
        return (BatchIndex(part) for part in self.indices.tensor_split(self.num_batches))
