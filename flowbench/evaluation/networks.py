"""The feature networks of a measurement, each loaded when it is first needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

import torch

from flowbench.data import FlowDataModule
from flowbench.evaluation.extractors import get_extractor
from flowbench.metrics import FeatureExtractor

__all__ = ["FeatureNetworks"]


class FeatureNetworks(Mapping[str, FeatureExtractor]):
    """Feature extractors by name.

    Args:
        names: of the extractors.
        data: what they are to describe.
        device: where their networks run.
    """

    def __init__(self, names: Iterable[str], data: FlowDataModule, device: torch.device | str) -> None:
        self._names = sorted(set(names))
        self._data, self._device = data, device
        self._loaded: dict[str, FeatureExtractor | Exception] = {}

    def __getitem__(self, name: str) -> FeatureExtractor:
        """The extractor, trained or read from the cache.

        Raises:
            KeyError: for a name that is not among them.
            ValueError: when it cannot be had.
        """
        if name not in self._names:
            raise KeyError(name)
        if name not in self._loaded:
            try:
                self._loaded[name] = get_extractor(name, self._data, self._device)
            except (ValueError, OSError) as error:  # asked for again and again, and a network that is down is slow
                self._loaded[name] = error
        found = self._loaded[name]
        if isinstance(found, Exception):
            raise found
        return found

    def available(self) -> dict[str, FeatureExtractor]:
        """Those that can be had."""
        found = {}
        for name in self:
            with suppress(ValueError, OSError):
                found[name] = self[name]
        return found

    def __iter__(self) -> Iterator[str]:
        """Their names in alphabetical order."""
        return iter(self._names)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._names)
