"""Shares of a bench's budget: what contenders leave to the models that they require."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["shares_text"]


def shares_text(shares: Mapping[str, float]) -> str:
    """What follows a budget where contenders are trained on a part of it; empty where none is.

    Example:
        >>> shares_text({"reflow": 0.5, "distilled": 0.25})
        '; of it reflow 0.5, distilled 0.25, the rest for what they require'
    """
    parts = ", ".join(f"{name} {share:g}" for name, share in shares.items())
    return f"; of it {parts}, the rest for what they require" if parts else ""
