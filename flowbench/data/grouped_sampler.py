"""The endless stream of groups of one class, for flows that are trained on sequences of images."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.core.seeds import generator
from flowbench.data.batch import check_groups
from flowbench.data.samplers import EndlessSampler

__all__ = ["GroupedSampler"]


class GroupedSampler(EndlessSampler):
    """An endless stream in which ``group_size`` consecutive samples share a class, a function of (seed, position).

    Classes come with the frequencies of the data: after e epochs a class of n samples has filled
    floor(e n / group_size) groups, so the stream has the same prior over classes as :class:`EndlessSampler`; the groups
    of an epoch are shuffled. Inside a class they are cut from permutations, one after the other, so no group holds a
    sample twice. Where n is no multiple of the group, a rest of each permutation is left out; it moves through the
    class, so that all samples are left out equally often: uses of two samples of a class differ by two at most, at any
    epoch.

    (The authors' loader draws a random class, uniformly, for each of "all images" items of an epoch: classes are then
    equally frequent whatever the data, and some images are not seen for long.)

    Args:
        label: class of each sample, int64 (N,); of the ``members``, where these are given.
        group_size: samples of one group, >= 1.
        batch_size: size of the global batch in samples, over all processes; a multiple of group_size and processes.
        seed: seed of the order, >= 0.
        rank: this process, >= 0.
        world_size: number of processes, >= 1.
        start: gives the position (samples drawn by all processes so far) when an iteration begins.
        members: the samples' places in a larger split, int64 (N,); None is 0..N - 1.

    Raises:
        ValueError: for a class of fewer samples than a group, or batches that are not made of whole groups.

    References:
        Hui et al. (2025), arXiv 2501.16085: sequences of images of one class.

    Example:
        >>> label = torch.tensor([0, 1, 0, 1, 1, 0, 1, 1])
        >>> sampler = GroupedSampler(label, group_size=2, batch_size=4, seed=0)
        >>> batch = next(iter(sampler))
        >>> batch.group_size, bool((label[batch.indices].view(2, 2).diff() == 0).all())
        (2, True)
    """

    def __init__(
        self,
        label: Tensor,
        group_size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: Callable[[], int] = int,
        members: Tensor | None = None,
    ) -> None:
        check_count("group_size", group_size)
        super().__init__(len(label), batch_size, seed, rank, world_size, start, members)
        check_groups(batch_size, group_size, world_size)
        self.group_size = group_size
        classes, counts = label.unique(return_counts=True)
        small = counts < group_size
        if bool(small.any()):
            raise ValueError(
                f"group_size: class {int(classes[small][0])} has {int(counts[small][0])} training samples, fewer than "
                f"a group of {group_size}; lower group_size or train on more samples"
            )
        self._counts = tuple(counts.tolist())
        self._by_class = label.argsort(stable=True)

    def stream(self, position: int, num: int) -> Tensor:
        """The samples at positions ``position .. position + num - 1`` of the stream, int64, shape (num,)."""
        first, offset = divmod(position, self.group_size)
        wanted = -(-(offset + num) // self.group_size)
        places = self._groups(first, wanted).flatten()[offset : offset + num]
        return self._in_split(self._by_class[places])

    def _groups(self, first: int, num: int) -> Tensor:
        """Places among the samples sorted by class of the groups ``first .. first + num - 1``, (num, group_size)."""
        # Rounding down loses less than a group of each class: this epoch is the one of the group, or just before it.
        epoch = first * self.group_size // self.num_samples
        while self._before(epoch + 1) <= first:
            epoch += 1
        offset, parts = first - self._before(epoch), []
        while num > 0:
            part = _epoch_groups(self._counts, self.group_size, self.seed, epoch)[offset : offset + num]
            parts.append(part)
            num, offset, epoch = num - len(part), 0, epoch + 1
        return torch.cat(parts)

    def _before(self, epoch: int) -> int:
        """Number of groups before an epoch."""
        return sum(epoch * count // self.group_size for count in self._counts)


@lru_cache(maxsize=4)
def _epoch_groups(counts: tuple[int, ...], size: int, seed: int, epoch: int) -> Tensor:
    """The groups of one epoch in their order, as places among the samples sorted by class, (G, size)."""
    parts, start = [], 0
    for number, count in enumerate(counts):
        first, stop = epoch * count // size, (epoch + 1) * count // size
        parts.append(start + _class_groups(count, size, seed, number, first, stop))
        start += count
    groups = torch.cat(parts)
    return groups[torch.randperm(len(groups), generator=generator(seed, "order", "groups", epoch))]


def _class_groups(count: int, size: int, seed: int, number: int, first: int, stop: int) -> Tensor:
    """Groups ``first .. stop - 1`` of the endless stream of one class, as places in the class, (stop - first, size)."""
    each = count // size
    cycles = range(first // each, max(stop - 1, first) // each + 1)
    groups = torch.cat([_cycle(count, size, seed, number, cycle) for cycle in cycles])
    return groups[first - cycles[0] * each :][: stop - first]


def _cycle(count: int, size: int, seed: int, number: int, cycle: int) -> Tensor:
    """A permutation of a class cut into groups, without the rest whose turn it is to be left out."""
    rest = count % size
    order = torch.randperm(count, generator=generator(seed, "order", "rest", number))
    taken = order.roll(-cycle * rest)[rest:]
    shuffled = taken[torch.randperm(len(taken), generator=generator(seed, "order", "class", number, cycle))]
    return shuffled.view(-1, size)
