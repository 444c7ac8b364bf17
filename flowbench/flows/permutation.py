"""The orders in which the blocks of an autoregressive flow visit their tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

__all__ = ["Permutation", "alternating", "permute"]

Permutation = Literal["identity", "flip"]


def permute(x_BND: Tensor, permutation: Permutation) -> Tensor:
    """Reorder tokens; each of the permutations is its own inverse.

    Args:
        x_BND: tokens, shape (B, N, D).
        permutation: "identity", or "flip" for last token first.
    """
    return x_BND if permutation == "identity" else x_BND.flip(1)


def alternating(num_blocks: int, *, last: Permutation) -> list[Permutation]:
    """Orders of a stack of blocks, data to noise, each the opposite of its neighbours.

    The order of the last block is named because it leads the sampling: counted from the data end, it would
    change silently with the number of blocks. STARFlow's is "identity"; TARFlow's, with an even number of
    blocks, "flip".

    Raises:
        ValueError: if num_blocks < 1 or the order is unknown.
    """
    if num_blocks < 1:
        raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
    check_permutation(last)
    other: Permutation = "flip" if last == "identity" else "identity"
    return [last if (num_blocks - 1 - block) % 2 == 0 else other for block in range(num_blocks)]


def check_permutation(permutation: str) -> None:
    """Raise ValueError unless the name is that of a permutation."""
    if permutation not in ("identity", "flip"):
        raise ValueError(f"permutation must be 'identity' or 'flip', got {permutation!r}")
