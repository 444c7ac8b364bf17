"""Specification of vectors and images: shape, classes, value grid, and the map to model space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flowbench.core.checks import SMALLEST, check_count, check_numbers
from flowbench.core.lazy import lazy_module
from flowbench.data.spec_base import Spec

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


__all__ = ["DataSpec", "Units"]

# Offsets inside a bin keep this far from its edges, so that float32 cannot round a value into the next bin:
# at 256 levels the nearest x is 2 * 2**-17 / 256 = 6e-8 from an edge, and half a float32 step below 1 is
# 3e-8.
_EDGE = 2.0**-17


@dataclass(frozen=True)
class Units:
    """The units of continuous data where they are not those of model space: ``data = shift + scale * model``.

    Attributes:
        shift: one number for all values, or one for each dimension of a vector, in [-1e12, 1e12].
        scale: likewise, in [1e-12, 1e12].

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> celsius = Units(shift=(15.0,), scale=(10.0,))
        >>> celsius.to_data(torch.tensor([[0.0], [2.0]])).flatten().tolist()
        [15.0, 35.0]
    """

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self) -> None:
        check_numbers("shift", self.shift)
        check_numbers("scale", self.scale, at_least=SMALLEST)

    def to_data(self, x: Tensor) -> Tensor:
        """Values in the data's units, float64, shape of x: (..., d), or any for a single shift and scale."""
        return x.double() * torch.tensor(self.scale, dtype=torch.float64, device=x.device) + self._shift(x)

    def from_data(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`to_data`, float64."""
        scale = torch.tensor(self.scale, dtype=torch.float64, device=values.device)
        return (values.double() - self._shift(values)) / scale

    def _shift(self, like: Tensor) -> Tensor:
        return torch.tensor(self.shift, dtype=torch.float64, device=like.device)

    def log_volume(self, num_dims: int) -> float:
        """Log-determinant of :meth:`to_data` for points of so many dimensions, in nats."""
        return sum(math.log(scale) for scale in self.scale) * num_dims / len(self.scale)


@dataclass(frozen=True)
class DataSpec(Spec):
    """Shape, classes and value grid of vectors or images.

    Quantised data are integers k in 0..levels-1. Model space is [-1, 1): ``x = 2 (k + u) / levels - 1`` with
    u in (0, 1), so a bin is ``2 / levels`` wide (TARFlow's grid for 256 levels: Zhai et al., 2024, arXiv
    2412.06329). Continuous data (``levels`` None) are in model space already.

    Attributes:
        name: name in the catalogue.
        version: changes whenever a value of the dataset changes.
        shape: shape of one sample, (d,) or (C, H, W), of sizes up to 1e6.
        num_classes: number of classes K, 1 to 1e6, labels are 0..K-1; None for unlabelled data.
        levels: number of grey levels, 2 to 256; None for continuous data.
        units: of continuous data whose units are not those of model space: likelihoods and samples are given in them.

    Raises:
        ValueError: for a shape that is neither (d,) nor (C, H, W), or levels or classes out of range.

    Example:
        >>> spec = DataSpec("tiny", "1", (1, 2, 2), num_classes=10, levels=4)
        >>> spec.summary, spec.num_dims
        ('images 1x2x2', 4)
        >>> grey = torch.tensor([[[0, 1], [2, 3]]], dtype=torch.uint8)
        >>> x = spec.dequantize(grey, torch.Generator().manual_seed(0))  # in [-1, 1)
        >>> spec.quantize(x).tolist()
        [[[0, 1], [2, 3]]]
    """

    levels: int | None = None
    units: Units | None = None

    shapes: ClassVar[dict[int, str]] = {1: "(d,)", 3: "(C, H, W)"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(f"{self.name}: levels", self.levels, at_least=2, at_most=256, or_none=True)

    @property
    def modality(self) -> Literal["image", "vector", "video"]:
        """``image`` for shape (C, H, W), ``vector`` for shape (d,); ``video`` of a :class:`VideoSpec`."""
        return "image" if len(self.shape) == 3 else "vector"

    @property
    def summary(self) -> str:
        """``images 3x32x32`` or ``vectors of 2``."""
        return f"images {self.sizes}" if self.grid else f"vectors of {self.sizes}"

    @property
    def grid(self) -> tuple[int, ...]:
        """Rows and columns (H, W) of an image; () of a vector."""
        return tuple(self.shape[-2:]) if len(self.shape) > 2 else ()

    @property
    def identity(self) -> dict[str, Any]:
        """See :attr:`Spec.identity`."""
        units = None if self.units is None else [list(self.units.shift), list(self.units.scale)]
        return {
            "dataset": self.name,
            "version": self.version,
            "shape": list(self.shape),
            "classes": self.num_classes,
            "levels": self.levels,
            "units": units,
        }

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

    @property
    def unit_name(self) -> str:
        """Unit of distances between samples: ``data`` units, or ``model`` units where those differ."""
        return "data" if self.units is None else "model"

    @property
    def log_volume(self) -> float:
        """Log-determinant of the map from model space to the data's units, in nats: subtract it from a log-density."""
        return 0.0 if self.units is None else self.units.log_volume(self.num_dims)

    def to_data(self, x: Tensor) -> Tensor:
        """Values as the user's file holds them: levels, or floats in the data's units.

        Args:
            x: values in model space, shape (..., *D).

        Returns:
            uint8 levels of quantised data, else float32, shape of x.
        """
        if self.levels is not None:
            return self.quantize(x)
        return x.float() if self.units is None else self.units.to_data(x).float()

    def to_saved(self, x: Tensor) -> Tensor:
        """Samples as they are written for the reader: 8-bit pictures of images, else :meth:`to_data`; black for NaN."""
        return self.to_uint8(x.nan_to_num(-1.0, -1.0, -1.0)) if self.grid else self.to_data(x)

    def from_data(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`to_data`; levels go to the centres of their bins.

        Raises:
            ValueError: for levels out of range.
        """
        if self.levels is None:
            return values.float() if self.units is None else self.units.from_data(values).float()
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < self.levels:
            found = f"{int(values.min())} to {int(values.max())}"
            raise ValueError(f"{self.name}: levels must lie in 0..{self.levels - 1}, got {found}")
        return self.to_model(values)

    def check_values(self, values: Tensor) -> None:
        """See :meth:`Spec.check_values`: uint8 levels of quantised data, else float32; ranges below 256 are read."""
        self.check_entries(values, "float32" if self.levels is None else "uint8")
        if self.levels is not None and self.levels < 256:
            self.check_range(values, self.levels, "levels")

    def to_picture(self, x: Tensor) -> Tensor:
        """See :meth:`Spec.to_picture`: :meth:`to_uint8` of an image."""
        return self.to_uint8(x)

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
        if not self.grid:
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
        if not self.grid:
            raise ValueError(f"{self.name}: only images have a picture, this is a {self.shape} vector")
        return k.clone() if levels == 256 else (k.int() * 255 // (levels - 1)).to(torch.uint8)
