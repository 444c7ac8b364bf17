"""The base of all kinds of data: a name, a version, a shape, classes, and an identity."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from flowbench.core.checks import check_count, check_counts

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Spec"]


@dataclass(frozen=True)
class Spec(ABC):
    """Specification of one sample. Each kind of data is a subclass; differences between kinds are its methods.

    Attributes:
        name: name in the catalogue.
        version: changes whenever a value of the dataset changes.
        shape: shape of one sample, of sizes up to 1e6.
        num_classes: number of classes K, 1 to 1e6, labels are 0..K-1; None for unlabelled data.

    Raises:
        ValueError: for a shape that this kind does not have, or classes out of range.

    Example:
        >>> spec = DataSpec("photographs", "2", (3, 32, 32), num_classes=10, levels=256)
        >>> isinstance(spec, Spec), spec.modality, spec.sizes, spec.grid
        (True, 'image', '3x32x32', (32, 32))
    """

    name: str
    version: str
    shape: tuple[int, ...]
    num_classes: int | None = None

    shapes: ClassVar[dict[int, str]] = {}
    """Number of axes -> how such a shape is written, of all that this kind takes; empty takes any."""

    def __post_init__(self) -> None:
        wanted = " or ".join(self.shapes.values()) or "of one sample"
        check_counts(f"{self.name}: shape", self.shape, at_most=10**6, hint=wanted)
        if self.shapes and len(self.shape) not in self.shapes:
            raise ValueError(f"{self.name}: shape must be {wanted}, got {self.shape}")
        check_count(f"{self.name}: num_classes", self.num_classes, at_most=10**6, or_none=True)

    @property
    @abstractmethod
    def modality(self) -> str:
        """The kind, in a word."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What identifies a data set's values, as JSON values: the key of everything that is cached for them."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """Kind and size of the samples: ``images 3x32x32``."""

    @abstractmethod
    def check_values(self, values: Tensor) -> None:
        """Refuse values of a split (N, *shape) that are not of this kind, without reading them all where they are many.

        Raises:
            ValueError: one line: another shape or type, or values out of range.
        """

    @property
    def num_dims(self) -> int:
        """Number of scalar values of one sample."""
        return math.prod(self.shape)

    @property
    def sizes(self) -> str:
        """The shape as text: ``3x32x32``."""
        return "x".join(map(str, self.shape))

    @property
    def grid(self) -> tuple[int, ...]:
        """Rows and columns (H, W) where samples are images or consist of them, which then may be mirrored; else ()."""
        return ()

    @property
    def levels(self) -> int | None:
        """Number of levels of values that are dequantised on the way to model space; None for all others."""
        return None

    def to_picture(self, x: Tensor) -> Tensor:
        """One 8-bit picture of each sample, for the eye.

        Args:
            x: samples in model space, shape (..., *shape).

        Returns:
            uint8, shape (..., C, H, W).

        Raises:
            ValueError: for data that have no picture.
        """
        raise ValueError(f"{self.name}: {self.summary} have no picture")

    def check_entries(self, values: Tensor, dtype: str) -> None:
        """Refuse another shape or type than that of this kind.

        Args:
            values: of a split.
            dtype: name of the type, e.g. ``uint8``.

        Raises:
            ValueError: one line with what was found.
        """
        found = str(values.dtype).removeprefix("torch.")
        if tuple(values.shape[1:]) != tuple(self.shape) or found != dtype:
            wanted = ("N", *self.shape)
            raise ValueError(
                f"{self.name}: {self.summary} are {dtype} of shape ({', '.join(map(str, wanted))}), but the data hold "
                f"{found} of shape {tuple(values.shape)}"
            )

    def check_range(self, values: Tensor, number: int, what: str) -> None:
        """Refuse integers outside of 0..number-1.

        Args:
            values: integers of any shape.
            number: how many there are, >= 1.
            what: they are, for the message.

        Raises:
            ValueError: one line with the range that was found.
        """
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < number:
            found = f"{int(values.min())}..{int(values.max())}"
            raise ValueError(f"{self.name}: {what} must lie in 0..{number - 1}, got {found}")
