"""Preallocated keys and values of a sequential pass.

Shape suffixes: B batch, H heads, S slots, C slots of one page, L slots of one call, E head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["KeyValueCache", "LayerCache", "SlotRun"]

# A float32 cache that is larger than this (bytes) does not stay in a core's cache and is read from memory in every
# step. Reading the start of every head's run of slots then reaches a third of the memory's speed, pages nearly all.
_RESIDENT = 1 << 24
_PAGE = 32


@dataclass(frozen=True)
class SlotRun:
    """The slots of one call: which, and where their values lie.

    Attributes:
        first: index of the first slot that is computed.
        end: one past the last.
        rows: seen rows of the flattened values (B * H * S, E), shape (B * H * end,), int32; None without pages.
        offsets: where each sequence and head starts in ``rows``, shape (B * H,).
        mask: what a run of several slots that does not begin at slot 0 adds to its logits, shape (L, end); else None.
    """

    first: int
    end: int
    rows: Tensor | None = None
    offsets: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer.

    Attributes:
        pages: rotated keys, slot by slot; every page of shape (B, H, C, E), the last one may be shorter.
        values: values, shape (B, H, S, E).
    """

    pages: tuple[Tensor, ...]
    values: Tensor

    def write(self, k_BHLE: Tensor, v_BHLE: Tensor, run: SlotRun) -> None:
        """Store the rows of a run of slots."""
        self.values.narrow(2, run.first, run.end - run.first).copy_(v_BHLE)
        if len(self.pages) == 1:
            self.pages[0].narrow(2, run.first, run.end - run.first).copy_(k_BHLE)
            return
        size = self.pages[0].shape[2]
        for index in range(run.first // size, (run.end - 1) // size + 1):
            start = index * size
            lower, upper = max(run.first, start), min(run.end, start + size)
            part = k_BHLE[:, :, lower - run.first : upper - run.first]
            self.pages[index][:, :, lower - start : upper - start] = part

    def seen_pages(self, end: int) -> tuple[Tensor, ...]:
        """The pages that hold slots 0 .. end - 1, the last one whole."""
        return self.pages[: -(-end // self.pages[0].shape[2])]

    def seen_keys(self, end: int) -> Tensor:
        """Keys of slots 0 .. end - 1, shape (B, H, end, E)."""
        pages = self.seen_pages(end)
        return (pages[0] if len(pages) == 1 else torch.cat(pages, dim=2))[:, :, :end]


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of the slots seen so far, for one sequential pass.

    It belongs to the caller, never to a module: an exception in the middle of a pass leaves nothing behind.
    A slot is written before it is read, so a cache may be used again without clearing, and slots may be computed
    again: their rows are overwritten.

    Attributes:
        layers: one entry per layer.
    """

    layers: tuple[LayerCache, ...]

    @classmethod
    def allocate(
        cls, like: Tensor, dtype: torch.dtype, depth: int, shape: tuple[int, int, int, int], static: bool
    ) -> KeyValueCache:
        """A zero cache on the device of ``like``.

        Args:
            like: a tensor on the device.
            dtype: of keys and values.
            depth: number of layers.
            shape: (B, H, S, E).
            static: keep the keys in one page, whatever is faster.
        """
        batch, heads, slots, size = shape
        total = 2 * depth * batch * heads * slots * size * dtype.itemsize
        paged = not static and like.device.type == "cpu" and dtype == torch.float32 and total > _RESIDENT
        page = _PAGE if paged else max(1, slots)

        def layer() -> LayerCache:
            starts = range(0, max(1, slots), page)
            lengths = [min(page, slots - start) for start in starts]
            pages = tuple(like.new_zeros((batch, heads, length, size), dtype=dtype) for length in lengths)
            return LayerCache(pages, like.new_zeros(shape, dtype=dtype))

        return cls(tuple(layer() for _ in range(depth)))

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self.layers[0].values.shape[0]

    @property
    def num_bytes(self) -> int:
        """Memory held: 2 * depth * batch * slots * width * bytes of one number."""
        tensors = [tensor for layer in self.layers for tensor in (*layer.pages, layer.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def run(self, first: int, length: int) -> SlotRun:
        """The slots first .. first + length - 1."""
        end = first + length
        layer = self.layers[0]
        if length > 1 and first > 0:
            # Added, not boolean: that is what the kernel would make of it, in every layer again.
            mask = layer.values.new_full((length, end), -math.inf).triu_(first + 1)
            return SlotRun(first, end, mask=mask)
        if length > 1 or len(layer.pages) == 1:
            return SlotRun(first, end)
        batch, heads, slots, _ = layer.values.shape
        start = torch.arange(batch * heads, dtype=torch.int32)  # pages exist on a CPU only
        rows = start[:, None] * slots + torch.arange(end, dtype=torch.int32)
        return SlotRun(first, end, rows.flatten(), start * end)
