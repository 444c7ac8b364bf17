"""Samples of a flow map by a given number of jumps: one after another, or to the data and back to the path."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from flowbench.core.checks import check_count, check_seed
from flowbench.core.seeds import generator
from flowbench.flows.source.base import Source

__all__ = ["Composition", "Jump", "Jumps", "Renoise"]

Jump = Callable[[Tensor, float, float], Tensor]
"""``jump(x, s, t)``: states (B, *D) at time s to states at time t."""

MOST_JUMPS = 10**6


class Jumps(ABC):
    """A sampler of flow maps whose jumps start at equal distances in time, one network evaluation each.

    Attributes:
        adds_noise: whether fresh noise enters on the way; right only where source and data are paired as drawn.

    Args:
        num_jumps: how many, 1 to 1e6.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> jumps: Jumps = Composition(num_jumps=1)
        >>> jumps.with_number(2).intervals
        [(0.0, 0.5), (0.5, 1.0)]
    """

    adds_noise: bool = False

    def __init__(self, num_jumps: int) -> None:
        check_count("num_jumps", num_jumps, at_most=MOST_JUMPS)
        self.num_jumps = num_jumps

    def with_number(self, num_jumps: int) -> Self:
        """The same sampler with another number of jumps."""
        check_count("num_jumps", num_jumps, at_most=MOST_JUMPS)
        changed = copy.copy(self)
        changed.num_jumps = num_jumps
        return changed

    @property
    @abstractmethod
    def intervals(self) -> list[tuple[float, float]]:
        """From where to where it jumps, in order."""

    @abstractmethod
    def sample(self, jump: Jump, noise: Tensor, source: Source) -> Tensor:
        """The samples that start from source points.

        Args:
            jump: the flow map.
            noise: source points, shape (B, *D).
            source: where fresh noise comes from.

        Returns:
            Shape (B, *D).
        """

    @property
    def _starts(self) -> list[float]:
        return [number / self.num_jumps for number in range(self.num_jumps)]


class Composition(Jumps):
    """Jumps one after the other from the source to the data: deterministic; every jump keeps the error of the last.

    Args:
        num_jumps: how many, 1 to 1e6.

    Example:
        >>> halves = lambda x, s, t: x / 2
        >>> Composition(num_jumps=2).sample(halves, torch.ones(1, 1), source=None)
        tensor([[0.2500]])
    """

    def __init__(self, num_jumps: int = 1) -> None:
        super().__init__(num_jumps)

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """Neighbours of a uniform grid."""
        return list(pairwise([*self._starts, 1.0]))

    def sample(self, jump: Jump, noise: Tensor, source: Source) -> Tensor:
        """See :meth:`Jumps.sample`."""
        x = noise
        for start, end in self.intervals:
            x = jump(x, start, end)
        return x

    def __repr__(self) -> str:
        return f"Composition(num_jumps={self.num_jumps})"


class Renoise(Jumps):
    """Jumps to the data, each followed by a return to the path with fresh noise: ``(1 - t) e + t X(x, s, 1)``.

    Fresh noise is independent of the sample, so the return is to the path of the training only where pairs were
    independent. Noise is keyed by `seed` and the bytes of the initial state in float32: it depends neither on the batch
    nor on the device, and equal initial states get equal noise.

    Args:
        num_jumps: how many, 1 to 1e6.
        seed: of the fresh noise, >= 0.

    References:
        Song et al. 2023, Consistency Models (multistep sampling).

    Example:
        >>> to_three = lambda x, s, t: torch.full_like(x, 3.0)
        >>> jumps = Renoise(num_jumps=2)
        >>> jumps.intervals, jumps.sample(to_three, torch.zeros(1, 1), GaussianSource())
        ([(0.0, 1.0), (0.5, 1.0)], tensor([[3.]]))
    """

    adds_noise = True

    def __init__(self, num_jumps: int = 1, seed: int = 0) -> None:
        super().__init__(num_jumps)
        check_seed("seed", seed)
        self.seed = seed

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """From each point of a uniform grid to the data."""
        return [(start, 1.0) for start in self._starts]

    def sample(self, jump: Jump, noise: Tensor, source: Source) -> Tensor:
        """See :meth:`Jumps.sample`."""
        x, fresh = noise, self._noise(noise, source) if self.num_jumps > 1 else []
        for number, (start, end) in enumerate(self.intervals):
            if number:
                x = (1 - start) * fresh[number - 1] + start * x
            x = jump(x, start, end)
        return x

    def _noise(self, noise: Tensor, source: Source) -> list[Tensor]:
        """Source points for all returns, each of the shape of `noise`."""
        if noise.is_meta:  # holds no bytes
            return [noise] * (self.num_jumps - 1)
        # Adding zero turns -0.0 into 0.0, which is the same point.
        rows = (noise.detach().float() + 0.0).cpu().contiguous()
        drawn = []
        for row in rows:
            digest = hashlib.blake2b(row.numpy().tobytes(), digest_size=16).hexdigest()
            rng = generator(self.seed, "renoise", digest)
            drawn.append(source.sample(self.num_jumps - 1, tuple(row.shape), rng))
        return list(torch.stack(drawn, 1).to(noise)) if drawn else [noise] * (self.num_jumps - 1)

    def __repr__(self) -> str:
        return f"Renoise(num_jumps={self.num_jumps}{f', seed={self.seed}' if self.seed else ''})"
