"""The orders in which the blocks of an autoregressive flow visit their tokens."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from flowbench.core.checks import check_count, check_counts

__all__ = ["Permutation", "alternating", "network_grid", "permute"]

Permutation = Literal["identity", "flip", "reverse-columns", "reverse-rows", "transpose", "transpose-flip"]

# The same walk backwards. All orders are rasters of the grid or of its transpose, so that the offsets of 2-D positions
# keep their meaning up to signs.
_OPPOSITE: dict[Permutation, Permutation] = {
    "identity": "flip",
    "reverse-columns": "reverse-rows",
    "transpose": "transpose-flip",
}
_OPPOSITE |= {second: first for first, second in _OPPOSITE.items()}


def permute(
    x_BND: Tensor, permutation: Permutation, grid: tuple[int, int] | None = None, *, inverse: bool = False
) -> Tensor:
    """Put tokens into the order in which a block visits them, or back.

    Args:
        x_BND: tokens, shape (B, N, D); in raster order of the grid, or in the block's order for the inverse.
        permutation: "identity"; "flip", last token first; "reverse-columns", rows from the right to the left;
            "reverse-rows", the bottom row first; "transpose", column after column; "transpose-flip", its reverse.
        grid: (rows, columns) of the tokens, rows * columns = N; only "identity" and "flip" do without.
        inverse: the way back.

    Raises:
        ValueError: for an unknown permutation, or a grid that is missing or does not hold the tokens.
    """
    if permutation == "identity":
        return x_BND
    if permutation == "flip":
        return x_BND.flip(1)
    check_permutation(permutation, grid, x_BND.shape[1])
    assert grid is not None
    if permutation in ("reverse-columns", "reverse-rows"):
        axis = 2 if permutation == "reverse-columns" else 1
        return x_BND.unflatten(1, grid).flip(axis).flatten(1, 2)
    # Reversing a transposed raster is transposing the reversed one, so the flip commutes with the way back.
    shape = grid[::-1] if inverse else grid
    transposed = x_BND.unflatten(1, shape).transpose(1, 2).flatten(1, 2)
    return transposed.flip(1) if permutation == "transpose-flip" else transposed


def network_grid(permutation: Permutation, grid: tuple[int, int]) -> tuple[int, int]:
    """Grid whose raster is the block's order, for the 2-D positions of its network (reflections change only signs).

    Raises:
        ValueError: for a grid that is not two whole numbers >= 1.
    """
    check_counts("grid", grid, length=2)
    return grid[::-1] if permutation.startswith("transpose") else grid


def alternating(num_blocks: int, *, last: Permutation) -> list[Permutation]:
    """Orders of a stack of blocks, data to noise, each the opposite of its neighbours.

    The order of the last block is named because it leads the sampling: counted from the data end, it would
    change silently with the number of blocks. STARFlow's is "identity"; TARFlow's, with an even number of
    blocks, "flip".

    Raises:
        ValueError: if num_blocks < 1 or the order is unknown.
    """
    check_count("num_blocks", num_blocks)
    if last not in _OPPOSITE:
        raise ValueError(_unknown(last))
    return [last if (num_blocks - 1 - block) % 2 == 0 else _OPPOSITE[last] for block in range(num_blocks)]


def check_permutation(permutation: str, grid: tuple[int, int] | None, num_tokens: int) -> None:
    """Raise ValueError unless the name is that of a permutation of the tokens."""
    if permutation not in _OPPOSITE:
        raise ValueError(_unknown(permutation))
    if grid is None and permutation not in ("identity", "flip"):
        raise ValueError(f"permutation {permutation!r} needs the grid (rows, columns) of the tokens, got none")
    if grid is not None:
        check_counts("grid", grid, length=2)
    if grid is not None and grid[0] * grid[1] != num_tokens:
        raise ValueError(f"grid must hold {num_tokens} tokens, got {grid[0]} x {grid[1]}")


def _unknown(permutation: str) -> str:
    *names, last = map(repr, get_args(Permutation))
    return f"permutation must be {', '.join(names)} or {last}, got {permutation!r}"
