"""Sizes of networks: what can be built at all, checked before any memory is asked for."""

from __future__ import annotations

from flowbench.core.checks import check_count, check_counts, check_number

__all__ = ["check_classes", "check_layers", "check_mlp_ratio", "check_shape", "check_width"]

LARGEST_SIDE = 10**6
MOST_CHANNELS = 2**16
MOST_LAYERS = 1000
MOST_CLASSES = 10**6


def check_shape(shape: object, length: int | None = None) -> None:
    """Raise ValueError unless this is the shape of one sample, (d,) or (C, H, W), of sizes from 1 to 1e6.

    Raises:
        ValueError: one line with the range, the value and what to give.
    """
    forms = {None: "the sizes of one sample, (d,) or (C, H, W)", 1: "vectors (d,)", 3: "images (C, H, W)"}
    check_counts("shape", shape, length=length, at_most=LARGEST_SIDE, hint=f"give {forms.get(length, 'the sizes')}")


def check_width(name: str, value: object) -> None:
    """Raise ValueError unless this is a number of channels, 1 to 65,536."""
    check_count(name, value, at_most=MOST_CHANNELS)


def check_layers(name: str, value: object, *, at_least: int = 1, hint: str = "", or_none: bool = False) -> None:
    """Raise ValueError unless this is a number of layers, `at_least` to 1,000."""
    check_count(name, value, at_least=at_least, at_most=MOST_LAYERS, hint=hint, or_none=or_none)


def check_classes(num_classes: object) -> None:
    """Raise ValueError unless this is a number of classes, 1 to 1e6, or None."""
    hint = "None is an unconditional network"
    check_count("num_classes", num_classes, at_most=MOST_CLASSES, or_none=True, hint=hint)


def check_mlp_ratio(mlp_ratio: float, width: int) -> None:
    """Refuse a ratio of hidden channels to `width` that leaves none, or more than a thousandfold."""
    hint = f"times the width {width} it must be at least 1"
    check_number("mlp_ratio", mlp_ratio, at_least=1 / width, at_most=1000, hint=hint)
