"""Seeds derived from named axes, so that contenders share what they should share.

One integer seeds a run. Initialisation, data order, training noise and evaluation noise each derive their own seed by
hashing it with the name of the axis: two families with the same seed see the same batches and the same noise, and a
draw keyed by a sample's index is the same in one process or in eight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from flowbench.core.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

__all__ = ["derive_seed", "generator", "indexed_normal"]


def derive_seed(seed: int, *names: str | int) -> int:
    """Hash a seed with the names of the axes it serves.

    Args:
        seed: the run's seed, any integer.
        names: axis names and counters, e.g. ``"order", 3``; the order matters.

    Returns:
        An integer in [0, 2**63), stable across processes, platforms and Python versions.
    """
    text = "\x1f".join([str(int(seed)), *(f"{type(n).__name__}:{n}" for n in names)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A ``torch.Generator`` seeded by :func:`derive_seed`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *names))


def indexed_normal(
    indices: Iterable[int] | Tensor,
    shape: tuple[int, ...],
    seed: int,
    *names: str | int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Standard normal noise with one generator per sample index.

    The draw happens on the CPU, so a GPU run and a CPU run start from the same noise.

    Args:
        indices: N sample indices.
        shape: shape of one sample.
        seed: the evaluation seed.
        names: axis names hashed with the seed and the index.
        device: where the result lies.
        dtype: floating type of the draw; None is float32.

    Returns:
        Noise of shape (N, *shape).
    """
    values = [int(i) for i in indices]
    rng, dtype = torch.Generator(), dtype or torch.float32
    out = torch.empty((len(values), *shape), dtype=dtype)
    for row, index in enumerate(values):
        rng.manual_seed(derive_seed(seed, *names, index))
        out[row] = torch.randn(shape, generator=rng, dtype=dtype)
    return out.to(device)
