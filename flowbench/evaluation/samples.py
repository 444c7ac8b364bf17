"""Sets of samples as the metrics see them: features by extractor, never all images at once."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.core.distributed import gather_objects
from flowbench.core.places import cached, locked
from flowbench.core.preparation_progress import note_progress
from flowbench.core.storage import write_atomic
from flowbench.data import DataSpec, FlowDataModule
from flowbench.evaluation.gather import gather_by_index
from flowbench.metrics import FeatureExtractor, FeatureStatistics, Moments, extract, load_statistics, save_statistics

__all__ = ["Collector", "GeneratedSet", "Images", "RealSet", "SampleSet"]

# Images at a time on their way through a feature network.
CHUNK = 256

Images = Callable[[Tensor], Tensor]


class SampleSet(ABC):
    """Samples in a fixed order, known by their features.

    A metric may look at the first few samples only, so every question names a count.

    Args:
        spec: the data's shape and value grid.
        name: what they are, for the protocol: a split's name or `generated`.
        count: number of samples N, >= 0.

    Attributes:
        is_finite: whether no sample diverged to NaN or infinity; a distance to samples that did has no value.
        label: class ids, shape (N,): those that a conditional flow was given, or that real data have; or None.
    """

    is_finite: bool = True
    label: Tensor | None = None

    def __init__(self, spec: DataSpec, name: str, count: int) -> None:
        check_count("count", count, at_least=0)
        self.spec = spec
        self.name = name
        self._count = count
        self._statistics: dict[tuple[str, int], FeatureStatistics] = {}

    def __len__(self) -> int:
        """Number of samples."""
        return self._count

    @abstractmethod
    def features(self, extractor: FeatureExtractor, count: int | None = None) -> Tensor:
        """Features of the first `count` samples (None: all there are), shape (count, F), on the CPU."""

    @abstractmethod
    def points(self) -> Tensor:
        """The samples themselves, of data that are points, shape (N, d)."""

    @abstractmethod
    def images(self, indices: Tensor) -> Tensor:
        """Some samples as pictures, uint8, shape (M, C, H, W)."""

    def statistics(self, extractor: FeatureExtractor, count: int | None = None) -> FeatureStatistics:
        """Float64 sums over the features of the first `count` samples, computed once."""
        key = (extractor.name, len(self) if count is None else count)
        if key not in self._statistics:
            self._statistics[key] = self._sums(extractor, key[1])
        return self._statistics[key]

    def moments(self, extractor: FeatureExtractor, count: int) -> Tensor | Moments:
        """What a Frechet distance to the first `count` samples is taken from: their sums, or their features."""
        return self.statistics(extractor, count)

    def _sums(self, extractor: FeatureExtractor, count: int) -> FeatureStatistics:
        return FeatureStatistics.from_features(self.features(extractor, count))


class GeneratedSet(SampleSet):
    """Samples that were turned into features when they were drawn.

    Args:
        spec: the data's shape and value grid.
        name: what they are.
        count: number of samples.
        features: by the extractor's name, in the order of the samples, shape (at most N, F).
        shown: the first samples in model space, for pictures; of points all, shape (at most N, *D).
        is_finite: see :class:`SampleSet`.
        images: gives pictures of the samples at some indices.
        label: see :class:`SampleSet`.
    """

    def __init__(
        self,
        spec: DataSpec,
        name: str,
        count: int,
        *,
        features: Mapping[str, Tensor],
        shown: Tensor,
        is_finite: bool = True,
        images: Images | None = None,
        label: Tensor | None = None,
    ) -> None:
        super().__init__(spec, name, count)
        self._features = features
        self.shown = shown
        self.is_finite = is_finite
        self._images = images
        self.label = label

    def features(self, extractor: FeatureExtractor, count: int | None = None) -> Tensor:
        """See :meth:`SampleSet.features`."""
        wanted = len(self) if count is None else count
        found = self._features[extractor.name]
        assert len(found) >= wanted, f"{wanted} features of {extractor.name} were not collected"
        return found[:wanted]

    def points(self) -> Tensor:
        """See :meth:`SampleSet.points`."""
        assert len(self.shown) == len(self), "points are kept all"
        return self.shown

    def images(self, indices: Tensor) -> Tensor:
        """See :meth:`SampleSet.images`."""
        assert self._images is not None, "this set was made without a way to its pictures"
        return self._images(indices)


class Collector:
    """Turns samples into features as they come, and puts the parts of all processes together.

    Args:
        spec: the data's shape and value grid.
        extractors: feature extractors by name.
        counts: how many samples, counted from index 0, each extractor is asked for.
        num_shown: samples to keep for pictures; of points all are kept.
    """

    def __init__(
        self,
        spec: DataSpec,
        extractors: Mapping[str, FeatureExtractor],
        counts: Mapping[str, int],
        num_shown: int,
    ) -> None:
        self.spec = spec
        self.extractors = {name: extractors[name] for name in counts}
        self.counts = dict(counts)
        self.num_shown = num_shown
        self.is_finite = True
        self._shown: list[tuple[Tensor, Tensor]] = []
        self._features: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in counts}
        self._count = 0

    def add(self, index: Tensor, x: Tensor) -> None:
        """Take samples in model space, shape (B, *D), at indices (B,)."""
        self.is_finite = self.is_finite and bool(x.isfinite().all())
        x = x.detach().cpu()
        if self.spec.modality == "vector":
            self._take(index, x, x)
        else:
            # A broken sample still needs a place; the distances of a set that holds one are not computed.
            self._take(index, x, self.spec.to_uint8(x.nan_to_num(-1.0)))

    def add_images(self, index: Tensor, images: Tensor) -> None:
        """Take pictures, uint8 (B, C, H, W), at indices (B,)."""
        self._take(index, images.float() / 127.5 - 1, images)

    def _take(self, index: Tensor, x: Tensor, pictures: Tensor) -> None:
        self._count += len(index)
        kept = index < self.num_shown if self.spec.modality == "image" else torch.ones_like(index, dtype=torch.bool)
        self._shown.append((index[kept], x[kept]))
        for name, count in self.counts.items():
            mine = index < count
            if mine.any():
                self._features[name].append((index[mine], extract(self.extractors[name], pictures[mine])))

    def gathered(self, name: str, images: Images | None = None, label: Tensor | None = None) -> GeneratedSet:
        """All processes' samples as one set; a collective, so every process calls it.

        Args:
            name: what they are.
            images: gives pictures of the samples at some indices.
            label: class ids of all samples, those of other processes included.
        """
        total = torch.tensor([self._count, 0 if self.is_finite else 1])
        parts = torch.stack(gather_objects(total))
        features = {key: self._ordered(pairs, self.extractors[key].dimension) for key, pairs in self._features.items()}
        return GeneratedSet(
            self.spec,
            name,
            int(parts[:, 0].sum()),
            features=features,
            shown=self._ordered(self._shown, *self.spec.shape),
            is_finite=not bool(parts[:, 1].any()),
            images=images,
            label=label,
        )

    @staticmethod
    def _ordered(pairs: list[tuple[Tensor, Tensor]], *shape: int) -> Tensor:
        # A process without a share of the first few samples still takes part in the collective.
        index = torch.cat([torch.empty(0, dtype=torch.int64), *(i for i, _ in pairs)])
        return gather_by_index(index, torch.cat([torch.empty(0, *shape), *(v.float() for _, v in pairs)]))


class RealSet(SampleSet):
    """A split of the data; its features are extracted when they are first asked for, and kept in the cache.

    The cache's files are named by a hash of everything the features depend on, and carry it inside.

    Args:
        data: the data.
        split: name of the split.
        count: the first so many samples; None takes all.
    """

    def __init__(self, data: FlowDataModule, split: str, count: int | None = None) -> None:
        check_count("count", count, at_least=0, or_none=True)
        total = len(data.split(split))
        super().__init__(data.spec, split, total if count is None else min(count, total))
        self.data = data
        label = data.split(split).label
        self.label = None if label is None else label[: len(self)]
        self._features: dict[str, Tensor] = {}

    def features(self, extractor: FeatureExtractor, count: int | None = None) -> Tensor:
        """See :meth:`SampleSet.features`."""
        wanted = len(self) if count is None else min(count, len(self))
        held = self._features.get(extractor.name)
        if held is None or len(held) < wanted:
            held = self._cached(extractor, wanted) if self._is_cached(extractor) else self._extract(extractor, wanted)
            self._features[extractor.name] = held
        return held[:wanted]

    def points(self) -> Tensor:
        """See :meth:`SampleSet.points`."""
        return self.data.model_values(self.name, slice(len(self)))

    def images(self, indices: Tensor) -> Tensor:
        """See :meth:`SampleSet.images`."""
        return self.data.uint8_images(self.name, indices)

    def metadata(self, extractor: FeatureExtractor, count: int) -> dict[str, Any]:
        """What the features of the first `count` samples depend on, as JSON values."""
        return {
            **self.data.spec.identity,
            "split": self.name,
            "split_size": len(self.data.split(self.name)),
            "transform": "uint8",
            "extractor": extractor.name,
            "checksum": extractor.checksum,
            "protocol": extractor.protocol,
            "count": count,
        }

    def moments(self, extractor: FeatureExtractor, count: int) -> Tensor | Moments:
        """See :meth:`SampleSet.moments`; fewer pixels-as-features than there are of them need no D x D matrix."""
        few = count < extractor.dimension and not self._is_cached(extractor)
        return self.features(extractor, count) if few else self.statistics(extractor, count)

    def _is_cached(self, extractor: FeatureExtractor) -> bool:
        """Points, raw pixels and their norms are cheaper to take than to keep."""
        return self.spec.modality == "image" and extractor.name not in ("identity", "norm")

    def _file(self, kind: str, extractor: FeatureExtractor, count: int) -> Path:
        text = json.dumps({**self.metadata(extractor, count), "count": None}, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        dataset = re.sub(r"[^\w.-]", "-", self.data.spec.name)
        return cached("features", f"{dataset}-{self.name}-{extractor.name}-{kind}-{key}-{count}.npz")

    def _cached(self, extractor: FeatureExtractor, count: int) -> Tensor:
        found = self._found(extractor, count)
        if found is not None:  # before the lock, which a read-only cache does not allow
            return found
        path = self._file("features", extractor, count)
        # One process computes, the others wait and read.
        with locked(path):
            found = self._found(extractor, count)
            if found is None:
                found = self._extract(extractor, count)
                write_features(path, found, self.metadata(extractor, count))
            return found

    def _found(self, extractor: FeatureExtractor, count: int) -> Tensor | None:
        """Features in the cache: a file of as many samples, or of more, whose first ones are the same."""
        known = self._file("features", extractor, count)
        for path in known.parent.glob(known.name.replace(f"-{count}.npz", "-*.npz")):
            held = path.stem.rpartition("-")[2]
            if held.isdigit() and int(held) >= count:
                return read_features(path, self.metadata(extractor, int(held)))[:count]
        return None

    def _sums(self, extractor: FeatureExtractor, count: int) -> FeatureStatistics:
        if not self._is_cached(extractor):
            return super()._sums(extractor, count)
        path, metadata = self._file("statistics", extractor, count), self.metadata(extractor, count)
        if path.is_file():
            return load_statistics(path, metadata)[0]
        with locked(path):
            if path.is_file():
                return load_statistics(path, metadata)[0]
            statistics = super()._sums(extractor, count)
            save_statistics(path, statistics, metadata)
            return statistics

    def _extract(self, extractor: FeatureExtractor, count: int) -> Tensor:
        found, done = [], 0
        for part in self._chunks(count):
            found.append(extract(extractor, part))
            done += len(part)
            note_progress(f"{extractor.name} features of {done}/{count} images", done, count)
        return torch.cat(found)

    def _chunks(self, count: int) -> Iterable[Tensor]:
        if self.spec.modality == "vector":
            return [self.points()[:count]]
        return (self.images(part) for part in torch.arange(count).split(CHUNK))


def write_features(path: Path, features: Tensor, metadata: Mapping[str, Any]) -> None:
    """Write features float32 (N, F) and what they are of, atomically."""
    text = json.dumps(dict(metadata), sort_keys=True)
    write_atomic(path, lambda file: np.savez(file, features=features.numpy(), metadata=np.str_(text)))


def read_features(path: Path, expected: Mapping[str, Any]) -> Tensor:
    """Read what :func:`write_features` wrote.

    Raises:
        ValueError: the file is damaged, or its metadata is not the expected.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            metadata, features = json.loads(str(file["metadata"])), torch.from_numpy(file["features"])
    except Exception as error:  # broken files make NumPy, zipfile and zlib raise nearly anything
        raise ValueError(f"cannot read the features in {path} ({type(error).__name__}); delete the file") from None
    for key, value in expected.items():
        if metadata.get(key) != value:
            raise ValueError(f"features {path} have {key}={metadata.get(key)!r}, expected {value!r}; delete the file")
    return features
