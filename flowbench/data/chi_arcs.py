"""Three short arcs on a circle inside a wider one: the plane version of images inside the sphere of their noise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from flowbench.core.lazy import lazy_module
from flowbench.core.seeds import generator as keyed_generator
from flowbench.data.dataset_entry import DatasetEntry
from flowbench.data.spec import DataSpec
from flowbench.data.split import Split

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

__all__ = ["CHI_ARCS", "SCALE", "draw_chi_arcs"]

NUM_POINTS = 1024
BASE_ANGLES = (4.4956, 5.9167, 1.1018)  # radians
SHARES = (0.05, 0.30, 0.65)
HALF_WIDTH, ANGLE_STD = math.radians(10.0), math.radians(1.0)
DEGREES_OF_FREEDOM = 625
SCALE = 30.0
"""Published units in one unit here: radii near 25 and 55 would be raw inputs of the network."""


def draw_chi_arcs(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points on three arcs: radius chi(625) / 30, angles evenly spread over 20 degrees with noise of 1 degree.

    Args:
        num: number of points N, shared out 5 : 30 : 65 among arcs about the angles 4.4956, 5.9167 and 1.1018.
        generator: a CPU generator.

    Returns:
        Points, float32, shape (N, 2), and the arc of each, int64, shape (N,).
    """
    counts = [round(share * num) for share in SHARES[:-1]]
    counts.append(num - sum(counts))
    spread = [torch.linspace(-HALF_WIDTH, HALF_WIDTH, count, dtype=torch.float64) for count in counts]
    angle = torch.cat([base + part for base, part in zip(BASE_ANGLES, spread, strict=True)])
    angle += ANGLE_STD * torch.randn(num, generator=generator, dtype=torch.float64)
    radius = torch.randn(num, DEGREES_OF_FREEDOM, generator=generator, dtype=torch.float64).norm(dim=1) / SCALE
    points = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    return points.float(), torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def _load(root: Path) -> dict[str, Split]:
    """The fixed points twice, and as many fresh ones: a floor for distances to the nearest fixed point."""
    fixed = Split(*draw_chi_arcs(NUM_POINTS, keyed_generator(0, "chi_arcs", "1", "train")))
    fresh = Split(*draw_chi_arcs(NUM_POINTS, keyed_generator(0, "chi_arcs", "1", "val")))
    return {"train": fixed, "val": fresh, "test": fixed}


CHI_ARCS = DatasetEntry(
    spec=DataSpec("chi_arcs", "1", (2,), 3, levels=None),
    description="2-D: 1,024 fixed points on three unequal arcs; train and test are the same points, val is fresh",
    licence="none needed (synthetic)",
    citation="Lee, Kim, Lee (2025), arXiv 2512.18184, 2-D simulation (constants), here in units of 30",
    load=_load,
    num_samples={"train": NUM_POINTS, "val": NUM_POINTS, "test": NUM_POINTS},
)
"""The 2-D simulation of the paper: its source has radius chi(3072) / 30, see :class:`flowbench.flows.RadialSource`.

The paper measures distances to the 1,024 target points that it trains on, so training and test split are the same.
"""
