"""One split of a dataset, in memory or mapped into it, and the rule that cuts a dataset into splits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flowbench.core.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

__all__ = ["SPLITS", "Split", "make_splits", "split_indices", "stratified_order"]

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """Samples of one split.

    Attributes:
        values: grey levels uint8 (N, C, H, W) of quantised data, else float32 (N, *D) in model space.
        label: class ids int64 (N,), or None.
        columns: what else there is of every sample, by name, first dimension N; see
            :class:`~flowbench.data.columns.Column`.

    Raises:
        ValueError: when values and labels, or values and a column, differ in number.

    Example:
        >>> split = Split(torch.arange(8.0).view(4, 2), label=torch.tensor([0, 1, 0, 1]))
        >>> chosen = split.take(torch.tensor([3, 0]))
        >>> len(split), chosen.label.tolist()
        (4, [1, 0])
    """

    values: Tensor
    label: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.label is not None and len(self.label) != len(self.values):
            raise ValueError(f"split: {len(self.values)} samples but {len(self.label)} labels; give one per sample")
        for name, column in self.columns.items():
            found = len(column) if column.ndim else "a single"
            if found != len(self.values):
                raise ValueError(
                    f"split: {len(self.values)} samples but {found} entries of column {name!r}; give one per sample"
                )

    def __len__(self) -> int:
        """Number of samples N."""
        return self.values.shape[0]

    def take(self, indices: Tensor) -> Split:
        """The samples at ``indices`` (int64, shape (M,)), in that order."""
        # index_select copies whole rows; plain indexing of bytes is five times slower.
        return self._each(lambda values: values.index_select(0, indices))

    def part(self, rows: slice) -> Split:
        """The samples of a range: views, so a memory map stays one."""
        return self._each(lambda values: values[rows])

    def join(self, other: Split) -> Split:
        """The samples of both, this split's first; a view where they lie one behind the other in memory.

        Labels and columns that one of them lacks are left out.
        """
        label = None if self.label is None or other.label is None else torch.cat([self.label, other.label])
        shared = [name for name in self.columns if name in other.columns]
        columns = {name: _join(self.columns[name], other.columns[name]) for name in shared}
        return Split(_join(self.values, other.values), label, columns)

    def _each(self, rows: Callable[[Tensor], Tensor]) -> Split:
        """The same rows of everything."""
        label = None if self.label is None else rows(self.label)
        return Split(rows(self.values), label, {name: rows(column) for name, column in self.columns.items()})


def _join(first: Tensor, second: Tensor) -> Tensor:
    end = first.data_ptr() + first.numel() * first.element_size()
    shared = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr() and end == second.data_ptr()
    if not (shared and first.is_contiguous() and second.is_contiguous()):
        return torch.cat([first, second])
    # A memory map stays a memory map, and a large set is not copied.
    return first.as_strided((len(first) + len(second), *first.shape[1:]), first.stride())


def stratified_order(num: int, key: str, label: Tensor | None = None) -> Tensor:
    """A fixed order of samples whose every prefix holds the classes in proportion.

    Samples of a class are ordered by the BLAKE2 hash of (key, index) and spread evenly over the whole order.
    Hashes rather than a random generator: the order is the same for every version of every library.

    Args:
        num: number of samples N.
        key: names the order; another key gives another one.
        label: class ids (N,), or None for one class.

    Returns:
        A permutation of 0..N-1, int64, shape (N,). Any prefix of length m holds n_c m / N samples of a class
        of size n_c, to within one (two for prefixes cut from the middle).
    """
    digests = [hashlib.blake2b(f"{key}/{i}".encode(), digest_size=8).digest() for i in range(num)]
    classes = [0] * num if label is None else label.tolist()
    members: dict[int, list[int]] = {}
    for index, cls in enumerate(classes):
        members.setdefault(cls, []).append(index)
    placed: list[tuple[float, bytes, int]] = []
    for indices in members.values():
        indices.sort(key=lambda i: digests[i])
        placed += [((rank + 0.5) / len(indices), digests[i], i) for rank, i in enumerate(indices)]
    return torch.tensor([index for _, _, index in sorted(placed)], dtype=torch.int64)


def split_indices(num: int, key: str, num_val: int, num_test: int, label: Tensor | None = None) -> dict[str, Tensor]:
    """Which samples go into train, val and test, stratified by class.

    Args:
        num: number of samples N.
        key: names the order, see :func:`stratified_order`.
        num_val: size of the validation split.
        num_test: size of the test split.
        label: class ids (N,), or None for one class.

    Returns:
        Indices of each split in ascending order, int64.
    """
    parts = stratified_order(num, key, label).split([num_test, num_val, num - num_test - num_val])
    return {name: part.sort().values for name, part in zip(("test", "val", "train"), parts, strict=True)}


def make_splits(whole: Split, key: str, num_val: int, num_test: int) -> dict[str, Split]:
    """Divide a dataset into train, val and test, stratified by class.

    Args:
        whole: all samples.
        key: names the order, see :func:`stratified_order`.
        num_val: size of the validation split.
        num_test: size of the test split.

    Returns:
        The three splits; within a split samples keep their original order.
    """
    order = split_indices(len(whole), key, num_val, num_test, whole.label)
    return {name: whole.take(indices) for name, indices in order.items()}
