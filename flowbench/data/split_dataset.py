"""From a split to batches in model space."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowbench.core.seeds import derive_seed, generator
from flowbench.data.batch import Batch
from flowbench.data.samplers import BatchIndex
from flowbench.data.spec import DataSpec
from flowbench.data.split import Split

__all__ = ["SplitDataset", "indexed_uniform"]


def indexed_uniform(indices: Tensor, shape: tuple[int, ...], seed: int, *names: str | int) -> Tensor:
    """Uniform noise in [0, 1) with one generator per sample, so no batching and no world size changes it.

    Args:
        indices: N sample indices.
        shape: shape of one sample.
        seed: the run's seed.
        names: axis names hashed with the seed and the index.

    Returns:
        float32, shape (N, *shape).
    """
    rng = torch.Generator()
    out = torch.empty((len(indices), *shape))
    for row, index in zip(out, indices.tolist(), strict=True):
        torch.rand(shape, generator=rng.manual_seed(derive_seed(seed, *names, index)), out=row)
    return out


class SplitDataset(Dataset[Batch]):
    """Gathers a whole batch at once, mirrors it where asked, and dequantises it.

    Dequantisation is a function of (seed, position in the stream) in training, where the global batch's noise
    is drawn and this process's rows are kept, and of (seed, split, sample index) in evaluation. It happens
    here rather than on the device, so a batch is the same on every machine and for every number of workers.
    Mirroring is likewise a function of (seed, position in the stream), and evaluation never mirrors.

    Args:
        spec: the dataset.
        split: its samples.
        name: the split's name.
        seed: the run's seed.
        uniform: uniform dequantisation; else bin centres. Continuous data are never changed.
        batch_size: size of the global training batch.
        rows: this process's rows of the global training batch.
        random_flip: mirror each training image left to right with probability 1/2.
        spatial: names of the columns that lie on the images' grid, and are mirrored with them.
        condition: name of the column that is the batches' ``condition``.
    """

    def __init__(
        self,
        spec: DataSpec,
        split: Split,
        name: str,
        seed: int,
        uniform: bool = True,
        batch_size: int = 0,
        rows: slice = slice(None),
        random_flip: bool = False,
        spatial: Collection[str] = (),
        condition: str | None = None,
    ) -> None:
        self.spec = spec
        self.split = split
        self.name = name
        self.seed = seed
        self.uniform = uniform
        self.batch_size = batch_size
        self.rows = rows
        self.random_flip = random_flip
        self.spatial = spatial
        self.condition = condition

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.split)

    def __getitem__(self, item: BatchIndex) -> Batch:
        """The batch at ``item``."""
        part = self._flipped(self.split.take(item.indices), item)
        columns = dict(part.columns)
        condition = None if self.condition is None else columns[self.condition]
        values = self.model_values(part.values, item)
        return Batch(values, part.label, condition, item.indices, item.position, columns, item.group_size)

    def _flipped(self, part: Split, item: BatchIndex) -> Split:
        if not self.random_flip or item.position is None:
            return part
        coin = torch.rand(self.batch_size, generator=generator(self.seed, "flip", item.position))[self.rows] < 0.5
        columns = {name: _mirrored(c, coin) if name in self.spatial else c for name, c in part.columns.items()}
        return Split(_mirrored(part.values, coin), part.label, columns)

    def model_values(self, values: Tensor, item: BatchIndex) -> Tensor:
        """Values (B, *D) of the samples at ``item`` in model space, float32."""
        if self.spec.levels is None:
            return values
        if not self.uniform:
            return self.spec.to_model(values)
        return self.spec.to_model(values, self._offset(item))

    def _offset(self, item: BatchIndex) -> Tensor:
        if item.position is None:
            return indexed_uniform(item.indices, self.spec.shape, self.seed, "dequantize", self.name)
        noise = generator(self.seed, "dequantize", "stream", item.position)
        return torch.rand((self.batch_size, *self.spec.shape), generator=noise)[self.rows]


def _mirrored(values: Tensor, which: Tensor) -> Tensor:
    """Rows (B, ..., H, W) mirrored left to right where `which` (B,) is True."""
    return torch.where(which.view(-1, *[1] * (values.ndim - 1)), values.flip(-1), values)
