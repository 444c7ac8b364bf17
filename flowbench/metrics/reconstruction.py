"""How close reconstructions are to their originals, pixel by pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from flowbench.core.checks import check_scale

__all__ = ["psnr"]


def psnr(x: Tensor, x_hat: Tensor, data_range: float = 2.0, where: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio of every image, 10 log10(data_range^2 / mean squared error).

    Pictures are compared as they would be shown: clamp unbounded reconstructions before. The mean over images is
    the usual figure; it is at least the ratio of the mean error, because the logarithm is convex in it.

    Args:
        x: originals, shape (B, *D).
        x_hat: reconstructions, same shape.
        data_range: largest minus smallest possible value, in [1e-12, 1e12]: 2 for model space [-1, 1].
        where: bool, the values that count, of a shape that broadcasts to that of `x`; None counts all.

    Returns:
        Decibels, float64, shape (B,); infinity where nothing differs, NaN where no value counts.

    Raises:
        ValueError: shapes that differ, or a range out of range.
    """
    if x.shape != x_hat.shape or x.ndim < 2:
        raise ValueError(f"psnr compares (B, *D) with the same shape, got {tuple(x.shape)} and {tuple(x_hat.shape)}")
    check_scale("data_range", data_range, hint="2 for images in [-1, 1]")
    # torchmetrics' function, the oracle of the tests, rounds its constants to float32, knows no mask, and copies the
    # number of values to the device at every call, for which each step of a training would wait.
    error = (x.double() - x_hat.double()).square()
    if where is None:
        mean = error.flatten(1).mean(1)
    else:
        counts = where.expand_as(error).flatten(1)
        mean = error.flatten(1).where(counts, 0.0).sum(1) / counts.sum(1)
    return 10.0 * torch.log10(data_range**2 / mean)
