"""The integral of the density that a divergence head gives, over a part of the plane."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from flowbench.evaluation.failures import agreed
from flowbench.evaluation.gather import gather_by_index
from flowbench.evaluation.probe import Probe, Setup
from flowbench.families import Condition, FlowModule, PixelSpace

__all__ = ["HeadMass", "Mass", "has_mass"]

# The rectangle's distance from the outermost test points, over their range.
MARGIN = 0.5


def has_mass(module: object) -> TypeGuard[FlowModule]:
    """Whether a module has a divergence head over the plane and one density: no labels and no conditions."""
    return (
        isinstance(module, FlowModule)
        and tuple(module.spec.shape) == (2,)
        and isinstance(module.space, PixelSpace)
        and module.num_classes is None
        and module.conditioner is None
        and module.head_density() is not None
    )


@dataclass(frozen=True)
class Mass:
    """An integral over a rectangle.

    Attributes:
        value: the integral; a density has at most 1.
        num_points: of the grid.
        protocol: grid, rectangle and method.
    """

    value: float
    num_points: int
    protocol: str


@dataclass(frozen=True)
class HeadMass(Probe[Mass]):
    """The integral over the rectangle of the test points, widened by half of their range on each side.

    Attributes:
        num_points: of the grid along each axis.
    """

    num_points: int
    stage = "mass of the head's density"
    follows_sampler = True

    def key(self) -> Hashable:
        """Other grids have other answers."""
        return self

    def ask(self, setup: Setup) -> Mass | None:
        """Cell by cell; a collective."""
        flow = setup.module
        if not has_mass(flow) or setup.override.guidance is not None:
            return None
        density = flow.head_density(setup.override.network_evaluations)
        assert density is not None, "asked above"
        test = setup.data.model_values("test").double()
        low, high = test.amin(0), test.amax(0)
        low, high = low - MARGIN * (high - low), high + MARGIN * (high - low)
        points, area = _grid(low, high, self.num_points)
        index = setup.shard(len(points))
        found: list[Tensor] = []
        with agreed(), flow.full_precision():
            for chunk in setup.batches(index):
                x = points[chunk].to(flow.device, torch.float32)
                found.append(density.solve(x, Condition(), chunk, setup.seed).log_prob.double().exp().cpu())
        values = gather_by_index(index, torch.cat(found))
        protocol = f"{self.num_points}x{self.num_points}-grid/test range widened by half each way/{density.method}"
        return Mass(float(values.sum() * area), len(points), protocol)


def _grid(low: Tensor, high: Tensor, num: int) -> tuple[Tensor, float]:
    """Centres of equal cells of a rectangle, shape (num^2, 2), and the area of one."""
    shares = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    axes = [first + shares * (last - first) for first, last in zip(low, high, strict=True)]
    return torch.cartesian_prod(*axes), float(((high - low) / num).prod())
