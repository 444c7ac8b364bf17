"""Kinds of data beside vectors and images: clips of video, tokens, triples of a knowledge graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flowbench.core.checks import check_count
from flowbench.data.spec import DataSpec
from flowbench.data.spec_base import Spec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GraphSpec", "TokenSpec", "VideoSpec"]


@dataclass(frozen=True)
class VideoSpec(DataSpec):
    """Clips of as many frames each: values, levels and units are those of images, see :class:`DataSpec`.

    Attributes:
        name: name in the catalogue.
        version: changes whenever a value of the dataset changes.
        shape: shape of one clip, (T, C, H, W), of sizes up to 1e6.
        num_classes: number of classes K, 1 to 1e6, labels are 0..K-1; None for unlabelled data.
        levels: number of grey levels, 2 to 256; None for continuous data.
        units: see :class:`DataSpec`.

    Raises:
        ValueError: for a shape that is not (T, C, H, W), or levels or classes out of range.

    Example:
        >>> VideoSpec("clips", "1", (16, 3, 64, 64), levels=256).summary
        'clips 16x3x64x64'
    """

    shapes: ClassVar[dict[int, str]] = {4: "(T, C, H, W)"}

    @property
    def modality(self) -> Literal["image", "vector", "video"]:
        """``video``."""
        return "video"

    @property
    def summary(self) -> str:
        """``clips 16x3x64x64``."""
        return f"clips {self.sizes}"

    @property
    def identity(self) -> dict[str, Any]:
        """See :attr:`Spec.identity`."""
        return {**super().identity, "kind": self.modality}

    def to_picture(self, x: Tensor) -> Tensor:
        """The frames side by side, from the first to the last.

        Args:
            x: clips in model space, shape (..., T, C, H, W).

        Returns:
            uint8, shape (..., C, H, T W).
        """
        return self.to_uint8(x).movedim(-4, -2).flatten(-2)


@dataclass(frozen=True)
class TokenSpec(Spec):
    """Sequences, or grids, of as many tokens each.

    Attributes:
        name: name in the catalogue.
        version: changes whenever a value of the dataset changes.
        shape: shape of one sample, (L,) or (H, W), of sizes up to 1e6.
        num_classes: number of classes K of whole samples, 1 to 1e6, labels are 0..K-1; None for unlabelled data.
        num_values: size of the vocabulary V, 2 to 1e9; tokens are 0..V-1; what a model adds is not counted.

    Raises:
        ValueError: for a shape that is neither (L,) nor (H, W), or a number out of range.

    Example:
        >>> TokenSpec("text", "1", (256,), num_values=27).summary
        'tokens 256'
    """

    num_values: int = field(kw_only=True)

    shapes: ClassVar[dict[int, str]] = {1: "(L,)", 2: "(H, W)"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(f"{self.name}: num_values", self.num_values, at_least=2)

    @property
    def modality(self) -> str:
        """``tokens``."""
        return "tokens"

    @property
    def summary(self) -> str:
        """``tokens 256``."""
        return f"tokens {self.sizes}"

    @property
    def identity(self) -> dict[str, Any]:
        """See :attr:`Spec.identity`."""
        return {
            "dataset": self.name,
            "version": self.version,
            "kind": self.modality,
            "shape": list(self.shape),
            "classes": self.num_classes,
            "values": self.num_values,
        }

    def check_values(self, values: Tensor) -> None:
        """See :meth:`Spec.check_values`: int64 in 0..num_values-1, all of them read."""
        self.check_entries(values, "int64")
        self.check_range(values, self.num_values, "tokens")


@dataclass(frozen=True)
class GraphSpec(Spec):
    """Triples (head, relation, tail) of a knowledge graph; the entities and relations of all splits are the same.

    Attributes:
        name: name in the catalogue.
        version: changes whenever a value of the dataset changes.
        shape: (3,).
        num_classes: None.
        num_entities: number of entities, 2 to 1e9; heads and tails are 0..num_entities-1.
        num_relations: number of relations, 1 to 1e9, without inverses that a model adds.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> GraphSpec("family", "1", num_entities=104, num_relations=25).summary
        'triples of 104 entities in 25 relations'
    """

    shape: tuple[int, ...] = field(default=(3,), init=False)
    num_classes: int | None = field(default=None, init=False)
    num_entities: int = field(kw_only=True)
    num_relations: int = field(kw_only=True)

    shapes: ClassVar[dict[int, str]] = {1: "(3,)"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(f"{self.name}: num_entities", self.num_entities, at_least=2)
        check_count(f"{self.name}: num_relations", self.num_relations)

    @property
    def modality(self) -> str:
        """``graph``."""
        return "graph"

    @property
    def summary(self) -> str:
        """``triples of 104 entities in 25 relations``."""
        return f"triples of {self.num_entities} entities in {self.num_relations} relations"

    @property
    def identity(self) -> dict[str, Any]:
        """See :attr:`Spec.identity`."""
        return {
            "dataset": self.name,
            "version": self.version,
            "kind": self.modality,
            "entities": self.num_entities,
            "relations": self.num_relations,
        }

    def check_values(self, values: Tensor) -> None:
        """See :meth:`Spec.check_values`: int64 in range, all of them read."""
        self.check_entries(values, "int64")
        self.check_range(values[:, ::2], self.num_entities, "heads and tails")
        self.check_range(values[:, 1], self.num_relations, "relations")
