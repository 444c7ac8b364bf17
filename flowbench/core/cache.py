"""The cache of results computed once per machine: made under a lock, whole or absent, checked when read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import Timeout

from flowbench.core.lazy import lazy_module
from flowbench.core.places import locked
from flowbench.core.storage import write_atomic

if TYPE_CHECKING:
    import torch
else:
    torch = lazy_module("torch")

__all__ = ["ensure", "identity_key", "numbers_checksum", "read_tensors", "write_tensors"]


def ensure(
    path: Path, make: Callable[[], object], is_there: Callable[[], bool] | None = None, *, wait: bool = True
) -> bool:
    """Make something in the cache unless it is there; of several processes one makes it, and the others wait.

    What is there needs no lock, so a cache that is read-only serves as well.

    Args:
        path: of a file that `make` writes whole or not at all, or of a folder; the lock lies beside it.
        make: called under the lock, at most once.
        is_there: whether it is; None looks for the file.
        wait: for a process that is making it.

    Returns:
        Whether it is there now; False only without waiting.

    Raises:
        ValueError: one line: the cache cannot be written.
    """
    there = is_there or path.is_file
    if there():
        return True
    try:
        with locked(path, wait=wait):
            if not there():
                make()
    except Timeout:
        return False
    return True


def identity_key(identity: Mapping[str, Any], digits: int) -> str:
    """A part of a file's name for all that its content depends on.

    Args:
        identity: plain values by name; their order does not matter.
        digits: hex digits, 1 to 64.
    """
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:digits]


def numbers_checksum(numbers: torch.Tensor | None) -> str | None:
    """A plain value that stands for many whole numbers, such as labels or places; None for None."""
    return None if numbers is None else hashlib.sha256(numbers.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def write_tensors(path: Path, identity: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Write tensors with what they depend on, for :func:`read_tensors`.

    Args:
        path: the file; it appears whole.
        identity: plain values by name.
        content: tensors, or mappings of them, by names other than ``identity``.
    """
    write_atomic(path, lambda file: torch.save({"identity": dict(identity), **content}, file))


def read_tensors(path: Path, identity: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The content of a file of :func:`write_tensors`, in memory maps on the CPU.

    Args:
        path: the file.
        identity: what its content must depend on.
        what: the plural that messages call it by, e.g. ``the cached latents``.

    Raises:
        ValueError: one line: the file is damaged or holds something else, and is to be deleted.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = content.pop("identity")
    except Exception as error:  # on arbitrary bytes the unpickler raises anything
        raise ValueError(f"cannot read {what} {path} ({type(error).__name__}): delete the file") from None
    if found != identity:
        raise ValueError(f"{what} {path} are those of {found}, expected {dict(identity)}: delete the file")
    return dict(content)
