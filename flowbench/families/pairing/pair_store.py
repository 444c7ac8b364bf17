"""Tensors with one row per pair on disk, made once per machine and piece by piece."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowbench.core.cache import ensure, identity_key, read_tensors, write_tensors
from flowbench.core.places import cached

__all__ = ["PairStore", "weights_checksum"]

# A killed generation loses at most this many rows of each process.
SHARD_ROWS = 4096
# Up to this size the rows are kept in memory; above it every batch is gathered from memory maps.
IN_MEMORY_BYTES = 2**28

Rows = dict[str, Tensor]


class PairStore:
    """N rows of named tensors in files of :data:`SHARD_ROWS` rows, each whole or absent.

    The folder's name follows from what the rows are, so that another teacher or seed is another folder. Several
    processes share the work: each makes shards that no other is making.

    Attributes:
        seconds: that it took to make the rows, whenever that was; 0 of files of earlier versions.
        flops: operations of making them, as told to :meth:`complete`.

    Args:
        name: the folder's first word.
        identity: what the rows depend on, in plain types.
        num_rows: N, at least 1.
        shard_rows: rows of a file.
    """

    def __init__(self, name: str, identity: Mapping[str, Any], num_rows: int, shard_rows: int = SHARD_ROWS) -> None:
        self.identity = {**identity, "num_rows": num_rows, "shard_rows": shard_rows}
        self.folder = cached("pairs", f"{name}-{identity_key(self.identity, 16)}")
        self.num_rows = num_rows
        self.shard_rows = shard_rows
        self.seconds = self.flops = 0.0
        self._shards: list[Rows] = []

    def complete(self, make: Callable[[Tensor], Rows], flops: Callable[[Tensor], float] | None = None) -> None:
        """Make the shards that are missing, then open all of them.

        Args:
            make: gives the rows of some indices, int64 (M,); a function of them alone.
            flops: operations of making such rows, asked once for each file and kept in it; None counts none. Rows of
                files of earlier versions are counted again at each call.

        Raises:
            ValueError: for a file that is damaged or holds other rows; a cache that cannot be written.
        """
        paths = [self.folder / f"{first:09d}.pt" for first in range(0, self.num_rows, self.shard_rows)]
        for wait in (False, True):  # first what no process works on, then wait for the others
            for number, path in enumerate(paths):
                ensure(path, partial(self._write, path, number, make, flops), wait=wait)
        found = [read_tensors(path, self.identity, "the stored pairs") for path in paths]
        self.seconds = sum(float(content.get("seconds", 0.0)) for content in found)
        self.flops = sum(float(content.get("flops", 0.0)) for content in found)
        unknown = [self._rows_of(number) for number, content in enumerate(found) if "flops" not in content]
        if unknown and flops is not None:
            self.flops += flops(torch.cat(unknown))
        self._shards = [dict(content["rows"]) for content in found]
        if sum(value.nbytes for shard in self._shards for value in shard.values()) <= IN_MEMORY_BYTES:
            self._shards = [{name: torch.cat([part[name] for part in self._shards]) for name in self._shards[0]}]

    def _rows_of(self, number: int) -> Tensor:
        """Indices of the rows of a shard."""
        first = number * self.shard_rows
        return torch.arange(first, min(first + self.shard_rows, self.num_rows))

    def _write(
        self, path: Path, number: int, make: Callable[[Tensor], Rows], flops: Callable[[Tensor], float] | None
    ) -> None:
        index, began = self._rows_of(number), time.perf_counter()
        rows = make(index)
        content: dict[str, Any] = {"rows": {name: value.cpu() for name, value in rows.items()}}
        content["seconds"] = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        if flops is not None:
            content["flops"] = torch.tensor(flops(index), dtype=torch.float64)
        write_tensors(path, self.identity, content)

    def take(self, index: Tensor, device: torch.device) -> Rows:
        """Some rows.

        Args:
            index: of the rows, int64 (B,), on any device.
            device: where the result lies.
        """
        index = index.cpu()
        if len(self._shards) == 1:
            return {name: value.index_select(0, index).to(device) for name, value in self._shards[0].items()}
        shard = index // self.shard_rows
        out = {name: torch.empty(len(index), *v.shape[1:], dtype=v.dtype) for name, v in self._shards[0].items()}
        for number in shard.unique().tolist():
            places = (shard == number).nonzero().squeeze(1)
            for name, value in self._shards[number].items():
                out[name][places] = value.index_select(0, index[places] - number * self.shard_rows)
        return {name: value.to(device) for name, value in out.items()}


def weights_checksum(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a module's state, the first 16 hex digits."""
    digest = hashlib.sha256()
    for part in _leaves("", module.state_dict()):
        digest.update(part)
    return digest.hexdigest()[:16]


def _leaves(name: str, value: Any) -> Iterable[bytes]:
    """Bytes of tensors and of plain values, in the order of their names."""
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield from _leaves(f"{name}.{key}", value[key])
    elif isinstance(value, Tensor):
        yield f"{name}|{value.dtype}|{tuple(value.shape)}|".encode()
        yield value.detach().cpu().contiguous().numpy().tobytes()
    else:
        yield f"{name}={value!r}".encode()
