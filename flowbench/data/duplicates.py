"""Images that are equal byte by byte: within a set, and across splits, where they leak."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["first_duplicates", "leaks"]


def first_duplicates(values: Tensor) -> Tensor:
    """For every sample the index of the first sample that is equal to it.

    Only uint8 images are compared; of continuous values equal samples are not an accident of copying.

    Args:
        values: (N, *D).

    Returns:
        int64, shape (N,); ``0..N-1`` where all differ.
    """
    if values.dtype != torch.uint8:
        return torch.arange(len(values))
    seen: dict[bytes, int] = {}
    return torch.tensor([seen.setdefault(key, index) for index, key in enumerate(_keys(values))], dtype=torch.int64)


def leaks(splits: Mapping[str, Tensor]) -> dict[tuple[str, str], int]:
    """Number of samples of a later split that also lie in an earlier one.

    Args:
        splits: values by split name, uint8 images; other values are not compared.

    Returns:
        ``{(earlier, later): samples of the later one}``, only pairs that share any.
    """
    keys = {name: list(_keys(values)) for name, values in splits.items() if values.dtype == torch.uint8}
    names = list(keys)
    found: dict[tuple[str, str], int] = {}
    for number, later in enumerate(names):
        for earlier in names[:number]:
            known = set(keys[earlier])
            if count := sum(key in known for key in keys[later]):
                found[earlier, later] = count
    return found


def _keys(values: Tensor) -> list[bytes]:
    return [hashlib.blake2b(memoryview(row), digest_size=16).digest() for row in values.contiguous().numpy()]
