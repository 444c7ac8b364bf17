"""Semantic-to-image: a map of categories as the condition."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.data import Batch, DataSpec
from flowbench.families.conditioning.base import Conditioner
from flowbench.families.conditioning.condition import SpatialCondition
from flowbench.families.latents.space import Space

__all__ = ["MapSource", "SemanticConditioner", "derived_map"]

MapSource = Literal["derived", "given"]
_ONLY_GIVEN = "given maps cannot be made from held-out images: make conditions with of_map"


def derived_map(x: Tensor, categories: int, blur: int) -> Tensor:
    """A map made from an image for want of a real one: the levels of its blurred grey values.

    Args:
        x: images in model space, shape (B, C, H, W).
        categories: equal bins of [-1, 1].
        blur: side of the box that the grey values (means over channels) are averaged over, odd; borders are repeated.

    Returns:
        int64 in 0..categories-1, shape (B, H, W).
    """
    grey = x.float().mean(1, keepdim=True)
    padded = F.pad(grey, [blur // 2] * 4, mode="replicate")
    smooth = F.avg_pool2d(padded, blur, stride=1)[:, 0]
    return ((smooth + 1) / 2 * categories).long().clamp(0, categories - 1)


class SemanticConditioner(Conditioner):
    """The condition is a semantic map, one channel per category.

    The map is brought to the flow's grid by the share of each category in a cell. LFM draws it as a picture and sends
    that through the autoencoder; one channel per category needs no colours and no encoder.

    A `derived` map is no annotation: it is a coarse view of the image itself (:func:`derived_map`), for data that have
    no maps. It tests the mechanism; its figures do not compare with those of annotated data.

    References:
        Dao et al. (2023), Flow Matching in Latent Space, arXiv 2307.08698, section on conditional generation.

    Args:
        categories: number of categories, 2 to 65,536.
        maps: `derived` from the images, or `given` by the column that ``data.condition`` names, integers (B, H, W).
        blur: side of the box that derived maps are blurred with, odd, 1 to 9,999.
        dropout: see :class:`Conditioner`.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> conditioner, space = SemanticConditioner(categories=2), PixelSpace((1, 2, 2))
        >>> conditioner.of_map(torch.tensor([[[0, 1], [1, 1]]]), space).values[0].tolist()  # one channel each
        [[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 1.0]]]
    """

    def __init__(self, categories: int = 4, maps: MapSource = "derived", blur: int = 3, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        check_count("categories", categories, at_least=2, at_most=2**16)
        if maps not in get_args(MapSource):
            raise ValueError(f"maps must be one of {', '.join(get_args(MapSource))}, got {maps!r}")
        check_count("blur", blur, at_most=9999, hint="the odd side of a box, 1 does not blur")
        if blur % 2 == 0:
            raise ValueError(f"blur is the odd side of a box, e.g. 3, got {blur}; 1 does not blur")
        self.categories, self.maps, self.blur = categories, maps, blur

    @property
    def name(self) -> str:
        """`semantic[4 derived]`, say."""
        return f"semantic[{self.categories} {self.maps}]"

    @property
    def takes_given(self) -> bool:
        """Where `maps` says `given`."""
        return self.maps == "given"

    def channels(self, space: Space) -> int:
        """One per category.

        Raises:
            ValueError: for points.
        """
        if len(space.shape) != 3:
            raise ValueError("a semantic map lies on the grid of an image, the data are points: take no conditioner")
        return self.categories

    def training_condition(self, batch: Batch, space: Space, generator: torch.Generator) -> SpatialCondition:
        """The batch's own maps, or maps of its images.

        Raises:
            ValueError: when `maps` is `given` and there are none, or `derived` and there are some.
        """
        if (batch.condition is None) != (self.maps == "derived"):
            has = "no condition" if batch.condition is None else "a condition"
            other = "derived" if self.maps == "given" else "given"
            raise ValueError(f"maps={self.maps}, but the batch has {has}: set maps={other}")
        if batch.condition is not None:
            return self.of_map(batch.condition, space)
        return self.of_map(derived_map(batch.x, self.categories, self.blur), space)

    def evaluation_condition(self, x: Tensor, index: Tensor, seed: int, space: Space) -> SpatialCondition:
        """Maps of held-out images; nothing is random.

        Raises:
            ValueError: for maps that cannot be made from images.
        """
        if self.maps == "given":
            raise ValueError(_ONLY_GIVEN)
        return self.of_map(derived_map(x, self.categories, self.blur), space)

    def given_condition(self, given: Tensor, space: Space) -> SpatialCondition:
        """See :meth:`of_map`."""
        return self.of_map(given, space)

    def of_map(self, categories: Tensor, space: Space) -> SpatialCondition:
        """The condition of semantic maps.

        Args:
            categories: integers in 0..categories-1, shape (B, H, W).
            space: where the flow lives.

        Raises:
            ValueError: for maps of another kind or with other categories.
        """
        if categories.ndim != 3 or categories.is_floating_point() or categories.dtype == torch.bool:
            raise ValueError(
                f"a semantic map is integers (B, H, W), got {categories.dtype} of shape {tuple(categories.shape)}"
            )
        low, high = int(categories.min()), int(categories.max())
        if low < 0 or high >= self.categories:
            raise ValueError(f"categories must lie in 0..{self.categories - 1}, got {low}..{high}")
        one_hot = F.one_hot(categories.long(), self.categories).movedim(-1, 1).float()
        rows, columns = space.shape[1:]
        return SpatialCondition(F.adaptive_avg_pool2d(one_hot, (rows, columns)), categories=categories.long())

    def scores(self, x: Tensor, condition: SpatialCondition) -> dict[str, tuple[Tensor, str]]:
        """Share of the pixels whose category, derived from the sample, is the condition's; none for given maps."""
        if self.maps == "given" or condition.categories is None:
            return {}
        found = derived_map(x.clamp(-1.0, 1.0), self.categories, self.blur)
        share = (found == condition.categories).flatten(1).double().mean(1)
        return {"semantic_agreement": (share, "share of the pixels")}

    def score_names(self, spec: DataSpec) -> tuple[str, ...]:
        """See :meth:`Conditioner.score_names`."""
        return () if self.maps == "given" else ("semantic_agreement",)
