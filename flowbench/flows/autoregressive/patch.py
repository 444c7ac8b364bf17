"""Images to tokens and back: a reordering of the pixels, so it changes no density."""

from __future__ import annotations

from torch import Tensor

from flowbench.core.checks import check_count, check_counts

__all__ = ["patchify", "unpatchify"]


def patchify(x_BCHW: Tensor, patch_size: int) -> Tensor:
    """Cut images into square patches.

    Args:
        x_BCHW: images, shape (B, C, H, W).
        patch_size: side p >= 1 of a patch; divides H and W.

    Returns:
        Tokens of shape (B, H W / p^2, C p^2): patches in raster order, channel-major within a patch.

    Raises:
        ValueError: if p does not divide H and W.
    """
    _check(x_BCHW.shape[2], x_BCHW.shape[3], patch_size)
    patches = x_BCHW.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens_BND: Tensor, patch_size: int, shape: tuple[int, int, int]) -> Tensor:
    """Undo :func:`patchify`.

    Args:
        tokens_BND: tokens, shape (B, H W / p^2, C p^2).
        patch_size: side p of a patch.
        shape: (C, H, W) of the images.

    Returns:
        Images of shape (B, C, H, W).

    Raises:
        ValueError: if the tokens do not make images of this shape.
    """
    check_counts("shape", shape, length=3)
    channels, height, width = shape
    _check(height, width, patch_size)
    rows, columns = height // patch_size, width // patch_size
    expected = (rows * columns, channels * patch_size**2)
    if tokens_BND.shape[1:] != expected:
        raise ValueError(
            f"tokens of {shape} images must be (B, {expected[0]}, {expected[1]}), got {tuple(tokens_BND.shape)}"
        )
    patches = tokens_BND.unflatten(2, (channels, patch_size, patch_size)).unflatten(1, (rows, columns))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _check(height: int, width: int, patch_size: int) -> None:
    check_count("patch_size", patch_size, hint=f"it must divide the image size {height} x {width}")
    if height % patch_size or width % patch_size:
        raise ValueError(f"patch_size must divide the image size {height} x {width}, got {patch_size}")
