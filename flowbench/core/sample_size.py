"""Warnings about too few samples for an estimate; free of torch, because the report uses it too."""

from __future__ import annotations

__all__ = ["sample_size_warning"]

# Below it, published Frechet distances at 50,000 samples are out of reach of any comparison.
_PUBLISHED = 10_000


def sample_size_warning(count: int | None, dimension: int) -> str | None:
    """One line with the estimate that N samples of D features are too few for; None when they are enough.

    Args:
        count: N of the smaller side; None where it is not known.
        dimension: D.
    """
    if count is None:
        return "the number of samples behind these statistics is not known: the bias of the distance cannot be judged"
    if count <= dimension:
        return (
            f"N={count} samples of {dimension} features: the covariance is singular and most of the distance may be "
            "bias; compare only rows with the same N"
        )
    if count < _PUBLISHED:
        return (
            f"N={count} samples: the distance is biased upwards; compare only rows with the same N, and not with "
            "published values at 50,000"
        )
    return None
