"""What a training needed before its first step."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Preparation"]


@dataclass(frozen=True)
class Preparation:
    """Cost of what is made of the training data before the first step, and is a part of the training.

    Attributes:
        flops: operations, over all processes.
        seconds: wall time; of what lies in the cache, those of the run that made it.

    Example:
        >>> Preparation(2e9, 1.0) + Preparation(1e9)
        Preparation(flops=3000000000.0, seconds=1.0)
    """

    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Preparation) -> Preparation:
        """Both."""
        return Preparation(self.flops + other.flops, self.seconds + other.seconds)
