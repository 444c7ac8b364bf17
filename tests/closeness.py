"""How near a computed result must be to the expected one: relative to the size of what is compared, never to one.

Processors, libraries and threads add up the same products in another order, so that results differ by some units in
the last place *of the largest numbers that were added*. An entry that is small because large ones cancelled differs by
as much as a large one does. The measure is therefore the largest expected magnitude of the whole, not each entry's own.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def magnitude(tensors: Iterable[Tensor]) -> float:
    """The largest finite magnitude in all of them, 0 where there are no numbers."""
    numbers = torch.cat([x.detach().double().flatten() for x in tensors])
    return max(numbers[numbers.isfinite()].abs().tolist(), default=0.0)


def deviation(found: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """The largest difference, as a share of the largest expected magnitude or of `scale` where that is larger.

    It is infinite where shapes differ, or where one of the two is not a number.
    """
    if found.shape != expected.shape:
        return float("inf")
    first, second = found.detach().double(), expected.detach().double()
    differences = torch.where(first == second, 0.0, (first - second).abs())  # equal infinities are equal
    largest = differences.amax().item() if differences.numel() else 0.0
    return 0.0 if largest == 0 else largest / max(magnitude([second]), scale) if largest == largest else float("inf")


def assert_near(found: Tensor, expected: Tensor, ulps: float = 256, *, scale: float = 0.0, label: str = "") -> None:
    """Assert that no entry is off by more than `ulps` units in the last place of the largest expected magnitude.

    Args:
        found: what was computed, of any floating dtype, whose units count: 256 are 3e-5 of the largest magnitude in
            float32 and 6e-14 in float64. Give more where the computation amplifies rounding, as deep networks,
            inverses and ill-conditioned systems do.
        expected: the same shape and dtype.
        ulps: units in the last place.
        scale: a magnitude to compare with where that of `expected` is smaller: a parameter whose gradient vanishes
            but for rounding has none of its own.
        label: what is compared, for the message.
    """
    assert found.dtype == expected.dtype, f"{label}: {found.dtype} is not {expected.dtype}"
    allowed = ulps * torch.finfo(found.dtype).eps
    measured = deviation(found, expected, scale)
    assert measured <= allowed, (
        f"{label}: off by {measured:.2e} of the largest expected magnitude, allowed {allowed:.2e}"
    )
