"""From where to where a flow map is trained to jump: distributions of pairs of times."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.flows.time import LogitNormalTimes

__all__ = ["SHORTEST", "BothWays", "DyadicPairs", "JumpTimes", "LogitNormalPairs", "UniformPairs"]

# Jumps are never shorter, so that quotients by their length keep three digits in float32.
SHORTEST = 1e-3


class JumpTimes(ABC):
    """A distribution of the times (s, t) between which a flow map is trained, in [0, 1]: s < t but for `BothWays`.

    It weights jumps in the loss: the same map is optimal under all of them, at the jumps that they cover.

    Attributes:
        covered: which jumps :meth:`covers`, for messages.

    Example:
        >>> class WholeJumps(JumpTimes):
        ...     def sample(self, num, generator, device="cpu"):
        ...         return torch.zeros(num, device=device), torch.ones(num, device=device)
        ...     def covers(self, start, end):
        ...         return (start, end) == (0, 1)
        ...     covered = "the whole jump"
        >>> WholeJumps().sample(2, torch.Generator())
        (tensor([0., 0.]), tensor([1., 1.]))
    """

    covered: str = "all jumps to later times"

    @abstractmethod
    def sample(self, num: int, generator: torch.Generator, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Draw ``num`` independent pairs on the generator's device and move them: starts and ends, (num,) float32."""

    @abstractmethod
    def covers(self, start: float, end: float) -> bool:
        """Whether the jump between two times, start != end, is drawn, or others as near to it as one likes."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class UniformPairs(JumpTimes):
    """Two uniform times, the smaller first.

    References:
        Boffi, Albergo and Vanden-Eijnden 2025, arXiv 2505.18825 (flow maps by self-distillation).

    Example:
        >>> start, end = UniformPairs().sample(1000, torch.Generator().manual_seed(0))
        >>> bool((start < end).all()), round((end - start).mean().item(), 1)  # a third on average
        (True, 0.3)
    """

    def sample(self, num: int, generator: torch.Generator, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Draw with ``torch.rand``."""
        first, second = torch.rand(2, num, generator=generator, device=generator.device).to(device)
        return _ordered(first, second)

    def covers(self, start: float, end: float) -> bool:
        """All jumps."""
        return start < end


class LogitNormalPairs(JumpTimes):
    """Two logit-normal times, the smaller first: jumps from near the source to near the data count more.

    Args:
        start: distribution of one of the two; None is ``LogitNormalTimes(0.4, 1.0)``.
        end: of the other; None is the same.

    References:
        Geng et al. 2025, arXiv 2505.13447 (MeanFlow); in our direction of time.

    Example:
        >>> pairs = LogitNormalPairs(start=LogitNormalTimes(-2.0), end=LogitNormalTimes(2.0))
        >>> start, end = pairs.sample(1000, torch.Generator().manual_seed(0))
        >>> bool((start < end).all()), bool((end - start).mean() > 0.6)
        (True, True)
    """

    def __init__(self, start: LogitNormalTimes | None = None, end: LogitNormalTimes | None = None) -> None:
        self.start = start or LogitNormalTimes(0.4, 1.0)
        self.end = end or LogitNormalTimes(0.4, 1.0)

    def sample(self, num: int, generator: torch.Generator, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """A time of each, sorted."""
        first = self.start.sample(num, generator, device)
        return _ordered(first, self.end.sample(num, generator, device))

    def covers(self, start: float, end: float) -> bool:
        """All jumps."""
        return start < end

    def __repr__(self) -> str:
        return f"LogitNormalPairs(start={self.start!r}, end={self.end!r})"


class DyadicPairs(JumpTimes):
    """Jumps of length 1, 1/2, 1/4, ..., 2^-levels that start at multiples of their length; all lengths alike likely.

    Args:
        levels: of the shortest jump, 1 to 9.

    References:
        Frans et al. 2024, One Step Diffusion via Shortcut Models.

    Example:
        >>> start, end = DyadicPairs(levels=2).sample(1000, torch.Generator().manual_seed(0))
        >>> sorted(set((end - start).tolist())), sorted(set(start.tolist()))
        ([0.25, 0.5, 1.0], [0.0, 0.25, 0.5, 0.75])
        >>> pairs = DyadicPairs(levels=3)
        >>> pairs.covers(0.25, 0.5), pairs.covers(0.0, 1 / 3), pairs.covers(0.25, 0.75)
        (True, False, False)
    """

    def __init__(self, levels: int = 6) -> None:
        check_count("levels", levels, at_most=9, hint="the shortest jump has length 2^-levels")
        self.levels = levels

    def sample(self, num: int, generator: torch.Generator, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """A length, then one of its multiples; exact in float32."""
        on = generator.device
        level = torch.randint(self.levels + 1, (num,), generator=generator, device=on)
        place = torch.rand(num, generator=generator, device=on)
        number = torch.exp2(level.float())
        start = (place * number).floor() / number
        return start.to(device), (start + 1 / number).to(device)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), self.levels))

    def covers(self, start: float, end: float) -> bool:
        """Jumps of the grid."""
        number = 1 / (end - start)
        return number in (2.0**level for level in range(self.levels + 1)) and (start * number).is_integer()

    @property
    def covered(self) -> str:  # type: ignore[override]
        """See :class:`JumpTimes`."""
        return f"those of a grid of 1, 2, 4, ..., {2**self.levels} equal jumps"

    def __repr__(self) -> str:
        return f"DyadicPairs(levels={self.levels})"


class BothWays(JumpTimes):
    """The pairs of another distribution, half of them turned round: jumps to the data, and back to the source.

    Densities of a divergence head jump from the data to the source, so its flow map needs both.

    Args:
        times: the distribution; None is :class:`UniformPairs`, which fills the whole square then.

    Example:
        >>> start, end = BothWays().sample(1000, torch.Generator().manual_seed(0))
        >>> round((start < end).float().mean().item(), 1), UniformPairs().covers(1.0, 0.0), BothWays().covers(1.0, 0.0)
        (0.5, False, True)
    """

    def __init__(self, times: JumpTimes | None = None) -> None:
        self.times = times or UniformPairs()

    def sample(self, num: int, generator: torch.Generator, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """A pair, then whether it is turned round."""
        start, end = self.times.sample(num, generator, device)
        turned = (torch.rand(num, generator=generator, device=generator.device) < 0.5).to(device)
        return torch.where(turned, end, start), torch.where(turned, start, end)

    def covers(self, start: float, end: float) -> bool:
        """Jumps whose times, in one order or the other, are drawn."""
        return self.times.covers(start, end) or self.times.covers(end, start)

    @property
    def covered(self) -> str:  # type: ignore[override]
        """See :class:`JumpTimes`."""
        return f"{self.times.covered}, and back"

    def __repr__(self) -> str:
        return f"BothWays(times={self.times!r})"


def _ordered(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The smaller and the larger of two times, at least :data:`SHORTEST` apart, within [0, 1]."""
    start = torch.minimum(first, second).clamp(max=1 - SHORTEST)
    return start, torch.maximum(torch.maximum(first, second), start + SHORTEST).clamp(max=1)
