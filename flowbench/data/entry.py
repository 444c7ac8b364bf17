"""An entry of the catalogue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flowbench.data.spec import DataSpec
from flowbench.data.split import Split

__all__ = ["DatasetEntry"]


@dataclass(frozen=True)
class DatasetEntry:
    """A dataset: what it is, under which terms, and how to get it.

    Attributes:
        spec: shape, classes and value grid; known without loading.
        description: one line for ``flowbench list``.
        licence: terms of use.
        citation: whom to cite.
        load: given the folder for downloads, returns the splits ``train``, ``val`` and ``test``.
    """

    spec: DataSpec
    description: str
    licence: str
    citation: str
    load: Callable[[Path], dict[str, Split]]

    @property
    def name(self) -> str:
        """Name in the catalogue."""
        return self.spec.name

    @property
    def version(self) -> str:
        """Version of the values."""
        return self.spec.version
