"""Inpainting as a condition: a flow learns to fill masked data in (Dao et al., 2023, arXiv 2307.08698, LFM)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flowbench.data import Batch, DataSpec
from flowbench.data.split_dataset import indexed_uniform
from flowbench.families.conditioning.base import Conditioner
from flowbench.families.conditioning.condition import SpatialCondition
from flowbench.families.conditioning.masks import make_mask
from flowbench.families.latents.space import Space
from flowbench.metrics import psnr

__all__ = ["InpaintingConditioner", "draw_masks"]

_HALVES = ("left", "right", "top", "bottom")
_NAMED = (*_HALVES, "center")
_SCORES = ("inpainting_psnr", "known_psnr")  # of the unknown and of the known values
_CHOICES = "half, square, random-SHARE (e.g. random-0.5), left, right, top, bottom, center, or a PNG file"


def draw_masks(name: str, uniform: Tensor, sides: tuple[int, ...]) -> Tensor:
    """One mask per sample, as a function of uniform numbers.

    Args:
        name: `half` (left, right, top or bottom, each as often as the others), `square` (half of both sides, anywhere
            inside), `random-SHARE` (that share of the pixels), or a fixed mask of
            :func:`~flowbench.families.conditioning.masks.make_mask`. Points take `half` (the first or the last
            coordinates), `left`, `right` and `random-SHARE`.
        uniform: in [0, 1), shape (B, *sides).
        sides: (H, W), or (d,) for points.

    Returns:
        bool, shape (B, *sides), True where unknown.

    Raises:
        ValueError: for a name that does not suit the data.
    """
    flat = uniform.flatten(1)
    if name == "half":
        names = _HALVES if len(sides) == 2 else _HALVES[:2]
        table = torch.stack([_fixed(half, sides) for half in names]).to(uniform.device)
        return table[(flat[:, 0] * len(names)).long()]
    if name == "square":
        return _squares(flat, sides)
    if name.startswith("random-"):
        hidden = min(max(1, round(_share(name) * flat.shape[1])), flat.shape[1])
        rank = flat.argsort(1).argsort(1)
        return (rank < hidden).view(-1, *sides)
    return _fixed(name, sides).to(uniform.device).expand(len(uniform), *sides)


def _fixed(name: str, sides: tuple[int, ...]) -> Tensor:
    return make_mask(name, (1, *sides) if len(sides) == 2 else sides)


def _squares(uniform: Tensor, sides: tuple[int, ...]) -> Tensor:
    if len(sides) != 2 or uniform.shape[1] < 2:
        raise ValueError("the mask square hides a part of an image, the data are points: take half or random-SHARE")
    inside = []
    for axis, side in enumerate(sides):
        size = max(1, side // 2)
        start = (uniform[:, axis] * (side - size + 1)).long()[:, None]
        place = torch.arange(side, device=uniform.device)[None]
        inside.append((place >= start) & (place < start + size))
    rows, columns = inside
    return rows[:, :, None] & columns[:, None, :]


def _share(name: str) -> float:
    try:
        share = float(name.removeprefix("random-"))
    except ValueError:
        share = math.nan
    if not 0.0 < share <= 1.0:
        raise ValueError(f"a random mask hides a share in (0, 1], e.g. random-0.5, got {name!r}")
    return share


class InpaintingConditioner(Conditioner):
    """The condition is masked data in the flow's space, and the mask.

    The unknown values are set to 0, mid-grey, and the masked data encoded to the mean of the posterior. The mask is
    brought to the grid by the share of unknown pixels in each cell; in LFM it is the value at one of them. Latents of C
    channels thus get C + 1 channels: 4 + 4 + 1 for the network in all. Points of d coordinates get 2 d.

    A new mask is drawn for every sample of every batch. The autoencoder was trained on whole images: how a hole looks
    to it, and how far around, is part of what the flow learns.

    References:
        Dao et al. (2023), Flow Matching in Latent Space, arXiv 2307.08698, section on conditional generation.

    Args:
        mask: `half`, `square`, `random-SHARE` or a fixed mask, see :func:`draw_masks`.
        paste: put the known values back into the samples; their row names it. The likelihood is that of the flow,
            which this leaves as it is.
        dropout: see :class:`Conditioner`.

    Raises:
        ValueError: for an unknown mask or a share out of range.

    Example:
        >>> conditioner, space = InpaintingConditioner(), PixelSpace((1, 4, 4))
        >>> unknown = torch.zeros(2, 4, 4, dtype=torch.bool)
        >>> unknown[:, :, 2:] = True  # the right half
        >>> condition = conditioner.masked(torch.ones(2, 1, 4, 4), unknown, space)
        >>> condition.values[0, :, 0]  # the first row of the masked image and of the mask
        tensor([[1., 1., 0., 0.],
                [0., 0., 1., 1.]])
    """

    def __init__(self, mask: str = "square", paste: bool = True, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        if mask.startswith("random-"):
            _share(mask)
        elif mask not in ("half", "square", *_NAMED) and not mask.lower().endswith(".png"):
            raise ValueError(f"unknown mask {mask!r}: choose {_CHOICES}")
        self.mask = mask
        self.paste = paste

    @property
    def name(self) -> str:
        """`inpainting[square]`, say."""
        return f"inpainting[{self.mask}]"

    @property
    def sampler_name(self) -> str:
        """With `pasted` where known values are put back."""
        return f"inpainting[{self.mask},pasted]" if self.paste else self.name

    def channels(self, space: Space) -> int:
        """Those of the flow's points, and the mask's."""
        return space.shape[0] + (1 if len(space.shape) == 3 else space.shape[0])

    def check(self, spec: DataSpec) -> None:
        """Refuse a mask that does not suit the data: of another size, of images for points, or a missing file."""
        sides = spec.grid or spec.shape
        draw_masks(self.mask, torch.zeros(1, *sides, device="cpu"), sides)

    def training_condition(self, batch: Batch, space: Space, generator: torch.Generator) -> SpatialCondition:
        """New masks for the batch.

        Raises:
            ValueError: when the batch brings a condition of its own.
        """
        if batch.condition is not None:
            raise ValueError("inpainting makes its conditions from the data, but the batch has one: leave it out")
        x, sides = batch.x, _sides(batch.x)
        uniform = torch.rand((len(x), *sides), generator=generator, device=x.device)
        return self.masked(x, draw_masks(self.mask, uniform, sides), space)

    def evaluation_condition(self, x: Tensor, index: Tensor, seed: int, space: Space) -> SpatialCondition:
        """Masks keyed by (seed, index)."""
        sides = _sides(x)
        uniform = indexed_uniform(index.cpu(), sides, seed, "conditioner-mask")
        return self.masked(x, draw_masks(self.mask, uniform, sides).to(x.device), space)

    def masked(self, x: Tensor, unknown: Tensor, space: Space) -> SpatialCondition:
        """The condition of data under masks of one's own.

        Args:
            x: data in model space, shape (B, *D); unknown values are never looked at.
            unknown: True where unknown, shape (B, H, W), or (B, d) for points.
            space: where the flow lives.
        """
        hidden = unknown[:, None] if x.ndim == 4 else unknown
        encoded = space.encode_mean(torch.where(hidden, 0.0, x))
        mask = hidden.to(encoded)
        if mask.ndim == 4 and mask.shape[2:] != encoded.shape[2:]:
            mask = F.adaptive_avg_pool2d(mask, (encoded.shape[2], encoded.shape[3]))
        return SpatialCondition(torch.cat([encoded, mask], 1), original=x, unknown=unknown)

    def finish(self, x: Tensor, condition: SpatialCondition) -> Tensor:
        """Known values put back, where `paste` says so."""
        if not self.paste or condition.original is None or condition.unknown is None:
            return x
        hidden = condition.unknown[:, None] if x.ndim == 4 else condition.unknown
        return torch.where(hidden, x, condition.original.to(x))

    def scores(self, x: Tensor, condition: SpatialCondition) -> dict[str, tuple[Tensor, str]]:
        """PSNR over unknown and over known values against the original, samples clamped to [-1, 1]; images only.

        An inpainting need not be the original: the first is a figure of agreement, not of quality.
        """
        if x.ndim != 4 or condition.original is None or condition.unknown is None:
            return {}
        parts = zip(_SCORES, (condition.unknown, ~condition.unknown), strict=True)
        found = x.clamp(-1.0, 1.0)
        return {name: (psnr(condition.original, found, where=where[:, None]), "dB") for name, where in parts}

    def score_names(self, spec: DataSpec) -> tuple[str, ...]:
        """See :meth:`Conditioner.score_names`."""
        return _SCORES if spec.grid else ()


def _sides(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape[2:]) if x.ndim == 4 else tuple(x.shape[1:])
