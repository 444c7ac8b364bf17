"""What a user declares about the values of own data, where the file leaves it open."""

from __future__ import annotations

from dataclasses import dataclass

from flowbench.core.checks import LARGEST, check_count, check_interval

__all__ = ["Declaration"]


@dataclass(frozen=True)
class Declaration:
    """Grid, range or scale of a user's own data; None infers them from the values, and refuses ambiguous ones.

    Attributes:
        levels: the values are integers 0..levels-1, 2 to 256 levels: a grid, as the 17 grey levels of ``digits``.
        value_range: (low, high) of float images, low < high in [-1e12, 1e12]; low and high become -1 and 1.
        standardize: shift and scale every dimension of vectors so that the training split has mean 0 and standard
            deviation 1; False takes them as they are.

    Raises:
        ValueError: for a value out of range, or levels beside an option of continuous values.

    Example:
        >>> Declaration(levels=17).given
        ['levels']
    """

    levels: int | None = None
    value_range: tuple[float, float] | None = None
    standardize: bool | None = None

    def __post_init__(self) -> None:
        check_count("levels", self.levels, at_least=2, at_most=256, or_none=True)
        if self.value_range is not None:
            check_interval(
                "value_range", self.value_range, low=-LARGEST, high=LARGEST, hint="[low, high] of the images"
            )
        continuous = [name for name in ("value_range", "standardize") if getattr(self, name) not in (None, False)]
        if self.levels is not None and continuous:
            raise ValueError(f"levels: means integers, {continuous[0]} is for floats; declare one of them")
        if len(continuous) > 1:
            raise ValueError("standardize: is for vectors, value_range for images; declare one of them")

    @property
    def given(self) -> list[str]:
        """Names of what is declared."""
        return [name for name in ("levels", "value_range", "standardize") if getattr(self, name) is not None]
