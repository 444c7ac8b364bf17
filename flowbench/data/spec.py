"""What a dataset looks like: shape, classes, value grid, and the map between the grid and model space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from flowbench.core.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

__all__ = ["DataSpec"]

# Offsets inside a bin keep this far from its edges, so that float32 cannot round a value into the next bin:
# at 256 levels the nearest x is 2 * 2**-17 / 256 = 6e-8 from an edge, and half a float32 step below 1 is
# 3e-8.
_EDGE = 2.0**-17


@dataclass(frozen=True)
class DataSpec:
    """Shape, classes and value grid of a dataset.

    Quantised data are integers k in 0..levels-1. Model space is [-1, 1): ``x = 2 (k + u) / levels - 1`` with
    u in (0, 1), so a bin is ``2 / levels`` wide (TARFlow's grid for 256 levels: Zhai et al., 2024, arXiv
    2412.06329). Continuous data (``levels`` None) are in model space already.

    Attributes:
        name: name in the catalogue.
        version: changes whenever a value of the dataset changes.
        shape: shape of one sample, (d,) or (C, H, W).
        num_classes: number of classes K, labels are 0..K-1; None for unlabelled data.
        levels: number of grey levels, 2 to 256; None for continuous data.

    Raises:
        ValueError: for a shape that is neither (d,) nor (C, H, W), or levels or classes out of range.
    """

    name: str
    version: str
    shape: tuple[int, ...]
    num_classes: int | None = None
    levels: int | None = None

    def __post_init__(self) -> None:
        if len(self.shape) not in (1, 3) or min(self.shape) < 1:
            raise ValueError(f"{self.name}: shape must be (d,) or (C, H, W), got {self.shape}")
        if self.levels is not None and not 2 <= self.levels <= 256:
            raise ValueError(f"{self.name}: levels must be 2 to 256 or None, got {self.levels}")
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"{self.name}: num_classes must be at least 1 or None, got {self.num_classes}")

    @property
    def modality(self) -> Literal["image", "vector"]:
        """``image`` for shape (C, H, W), ``vector`` for shape (d,)."""
        return "image" if len(self.shape) == 3 else "vector"

    @property
    def num_dims(self) -> int:
        """Number of scalar values of one sample."""
        return math.prod(self.shape)

    @property
    def bin_width(self) -> float:
        """Width of a grey level in model units, ``2 / levels``; ValueError for continuous data."""
        return 2.0 / self._levels()

    def _levels(self) -> int:
        if self.levels is None:
            raise ValueError(f"{self.name}: continuous data have no grey levels (spec.levels is None)")
        return self.levels

    def to_model(self, k: Tensor, offset: Tensor | float = 0.5) -> Tensor:
        """Place grey levels in model space.

        Args:
            k: grey levels 0..levels-1, any integer type, shape (..., *D).
            offset: u in [0, 1], where in its bin a value lies; 0.5 is the centre.

        Returns:
            ``2 (k + u) / levels - 1`` in (-1, 1), float32, shape of k.
        """
        levels = self._levels()
        if isinstance(offset, torch.Tensor) and offset.dtype == torch.float32 and levels & (levels - 1) == 0:
            # Ten times faster, and the same number: (k - levels / 2) + u is the only rounding, as float() is below.
            centred = k.float().sub_(levels / 2)
            return centred.add_(offset.clamp(_EDGE, 1.0 - _EDGE)).mul_(2.0 / levels)
        inside = torch.as_tensor(offset, dtype=torch.float64).clamp(_EDGE, 1.0 - _EDGE)
        return (2.0 * (k.double() + inside) / levels - 1.0).float()

    def dequantize(self, k: Tensor, generator: torch.Generator) -> Tensor:
        """Uniform dequantisation (Theis et al., 2016, arXiv 1511.01844, section 3.1).

        Args:
            k: grey levels 0..levels-1, on the generator's device, shape (..., *D).
            generator: source of u ~ U(0, 1).

        Returns:
            ``2 (k + u) / levels - 1``, float32, shape of k.
        """
        return self.to_model(k, torch.rand(k.shape, generator=generator, device=generator.device))

    def quantize(self, x: Tensor) -> Tensor:
        """The grey level of every value: the inverse of :meth:`dequantize`, for any x.

        Args:
            x: values in model space, floating, any shape; values outside [-1, 1) go to the nearest level.

        Returns:
            Grey levels 0..levels-1, uint8, shape of x.

        Raises:
            ValueError: for NaN, which has no level, and for continuous data.
        """
        levels = self._levels()
        if torch.isnan(x).any():
            raise ValueError(f"{self.name}: cannot quantise NaN; the samples are broken")
        return ((x.double() + 1.0) * (levels / 2.0)).floor().clamp(0, levels - 1).to(torch.uint8)

    def to_uint8(self, x: Tensor) -> Tensor:
        """An 8-bit picture, for files and feature networks.

        Args:
            x: images in model space, shape (..., C, H, W).

        Returns:
            uint8 of the same shape: ``k * 255 // (levels - 1)``; for continuous images ``round(127.5 (x +
            1))``.

        Raises:
            ValueError: for vectors and for NaN.
        """
        if self.modality != "image":
            raise ValueError(f"{self.name}: only images have a picture, this is a {self.shape} vector")
        if self.levels is not None:
            return self.grid_to_uint8(self.quantize(x))
        if torch.isnan(x).any():
            raise ValueError(f"{self.name}: cannot make a picture of NaN; the samples are broken")
        return ((x + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def grid_to_uint8(self, k: Tensor) -> Tensor:
        """What :meth:`to_uint8` makes of any dequantisation of k, without going through model space.

        Args:
            k: grey levels 0..levels-1, uint8, shape (..., C, H, W).

        Returns:
            ``k * 255 // (levels - 1)``, uint8 of the same shape.

        Raises:
            ValueError: for vectors and for continuous data.
        """
        levels = self._levels()
        if self.modality != "image":
            raise ValueError(f"{self.name}: only images have a picture, this is a {self.shape} vector")
        return k.clone() if levels == 256 else (k.int() * 255 // (levels - 1)).to(torch.uint8)
