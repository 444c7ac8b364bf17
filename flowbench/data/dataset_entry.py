"""An entry of the catalogue."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from flowbench.core.checks import check_count, check_number
from flowbench.data.columns import Column, check_columns
from flowbench.data.spec_base import Spec
from flowbench.data.split import SPLITS, Split

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DatasetEntry", "Report"]

Report = Callable[[str], object]
"""Receives one line about what is going on."""


@dataclass(frozen=True)
class DatasetEntry:
    """A dataset: what it is, under which terms, and how to get it.

    Attributes:
        spec: shape, classes and value grid; known without loading.
        description: one line for ``flowbench list``.
        licence: terms of use.
        citation: whom to cite.
        load: given the folder for downloads, returns the splits ``train``, ``val`` and ``test``; fetches what is
            missing unless FLOWBENCH_OFFLINE is set.
        num_samples: samples per split, >= 0, known without loading; empty for a user's own data.
        download_mb: size of the download in megabytes (10^6 bytes), in [0, 1e12]; 0 when the data ship or are
            generated.
        is_present: given the folder for downloads, whether :attr:`load` needs no download.
        flips: a horizontal mirror image is a sample of the same distribution.
        fetch: given the folder for downloads and a report, fetches what is missing and verifies what is there; None
            when there is nothing to fetch.
        understood: of a user's own data, one line of what they were taken for.
        columns: what the splits hold beside values and labels, by name.

    Raises:
        ValueError: for a number out of range, a column whose name is no identifier, or a spatial one that does not lie
            on the grid of the images.

    Example:
        >>> def load(folder):
        ...     return {name: Split(torch.zeros(2, 3)) for name in ("train", "val", "test")}
        >>> spec = DataSpec("zeros", "1", (3,))
        >>> entry = DatasetEntry(spec, "nothing but zeros", licence="CC0", citation="nobody", load=load)
        >>> entry.check_splits(entry.load(None))  # raises where they are not what the entry declares
        >>> entry.name, entry.is_present(None)
        ('zeros', True)
    """

    spec: Spec
    description: str
    licence: str
    citation: str
    load: Callable[[Path], dict[str, Split]]
    num_samples: Mapping[str, int] = field(default_factory=dict)
    download_mb: float = 0.0
    is_present: Callable[[Path], bool] = lambda root: True
    flips: bool = False
    fetch: Callable[[Path, Report], None] | None = None
    understood: str = ""
    columns: Mapping[str, Column] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for split, num in self.num_samples.items():
            check_count(f"num_samples[{split}]", num, at_least=0)
        check_number("download_mb", self.download_mb, at_least=0)
        for name, column in self.columns.items():
            if not name.isidentifier():
                raise ValueError(f"{self.name}: a column's name consists of letters, digits and _, got {name!r}")
            if column.spatial and column.shape[-2:] != self.spec.grid:
                raise ValueError(
                    f"{self.name}: column {name!r} of shape {column.shape} does not lie on the grid {self.spec.grid} "
                    "of the data; set spatial to False"
                )

    @property
    def name(self) -> str:
        """Name in the catalogue."""
        return self.spec.name

    @property
    def version(self) -> str:
        """Version of the values."""
        return self.spec.version

    def check_splits(self, splits: Mapping[str, Split]) -> None:
        """Refuse what :attr:`load` gave when it differs from what the entry declares.

        Args:
            splits: by name.

        Raises:
            ValueError: one line: a missing split, values or labels of another kind, out of range or of
                another number than declared, or other columns.
        """
        if missing := sorted(set(SPLITS) - set(splits)):
            raise ValueError(f"{self.name}: the split {missing[0]!r} is missing; load must give {', '.join(SPLITS)}")
        check_columns(splits, self.columns, self.name)
        for name, split in splits.items():
            if (declared := self.num_samples.get(name, len(split))) != len(split):
                has = f"has {len(split)} samples, but num_samples declares {declared}"
                raise ValueError(f"{self.name}: {name!r} {has}; make them agree")
            self.spec.check_values(split.values)
            self._check_label(name, split.label)

    def _check_label(self, split: str, label: Tensor | None) -> None:
        classes = self.spec.num_classes
        if (label is None) != (classes is None):
            has = "no labels" if label is None else "labels"
            raise ValueError(f"{self.name}: {split!r} has {has}, but spec.num_classes is {classes}; make them agree")
        if label is not None and classes is not None:
            self.spec.check_range(label, classes, f"labels of {split!r}")
