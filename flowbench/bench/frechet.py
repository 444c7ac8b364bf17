"""Frechet distances: which metrics they are, and how far apart two must lie to be more than luck of training."""

from __future__ import annotations

__all__ = ["LOTTERY", "LOTTERY_SOURCE", "is_frechet", "is_inside_lottery"]

LOTTERY = 0.013
"""Gaps below this share are within what another training seed moves."""

LOTTERY_SOURCE = "arXiv 2606.20536, for FID"


def is_frechet(metric: str) -> bool:
    """Whether a metric is a Frechet distance, whose bias depends on N."""
    return metric.partition("[")[0] in ("fd", "fid")


def is_inside_lottery(metric: str, left: float, right: float) -> bool:
    """Whether two mean Frechet distances lie closer than trainings of one configuration do.

    Args:
        metric: its name; other metrics have no such bound, and are never inside it.
        left: one mean.
        right: the other, of which the gap is a share.
    """
    return is_frechet(metric) and left != right and abs(left - right) < LOTTERY * abs(right)
