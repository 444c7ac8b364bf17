"""Sizes of autoregressive flows in their papers' notation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from flowbench.core.checks import check_count, check_counts

__all__ = ["Architecture", "deep_shallow_layers", "flow_sizes", "parse_architecture"]

SHALLOW_LAYERS = 2
DEFAULT_LAYERS = (2, 2, 2, 2)
DEFAULT_WIDTH = 128

_TARFLOW = re.compile(r"\[?(\d+)-(\d+)-(\d+)-(\d+)\]?")
_DEEP_SHALLOW = re.compile(r"(\d+)\((\d+)\)")


@dataclass(frozen=True)
class Architecture:
    """Depth and, where the notation tells them, width and patch size.

    Attributes:
        layers: transformer layers of each block, from the data end to the noise end.
        width: channels of the transformers, or None where the notation leaves them open.
        patch_size: side of a patch, or None.
    """

    layers: tuple[int, ...]
    width: int | None = None
    patch_size: int | None = None


def parse_architecture(text: str) -> Architecture:
    """Read a size in the notation of TARFlow or of STARFlow.

    ``2-768-8-8`` is TARFlow's: patch size, width, blocks and layers of each block (Zhai et al., 2024, arXiv 2412.06329,
    sec. 3). ``18(6)`` is STARFlow's: a deep block of 18 layers nearest the noise, six blocks in all, hence five shallow
    ones of 2 layers (Gu et al., 2025, arXiv 2506.06276, sec. 3).

    Args:
        text: one of the two; TARFlow's may stand in brackets.

    Raises:
        ValueError: for another notation, or a size that is zero.
    """
    blank_free = text.replace(" ", "")
    tarflow, deep_shallow = _TARFLOW.fullmatch(blank_free), _DEEP_SHALLOW.fullmatch(blank_free)
    numbers = [int(group) for match in (tarflow, deep_shallow) if match for group in match.groups()]
    if not numbers or min(numbers) < 1:
        raise ValueError(
            f"architecture {text!r} is not understood: give patch-width-blocks-layers as in 2-768-8-8 (TARFlow), "
            "or deep(blocks) as in 18(6) (STARFlow), all at least 1"
        )
    for number in numbers:
        check_count(f"every number of architecture {text!r}", number, at_most=2**16)
    if tarflow:
        patch_size, width, blocks, layers = numbers
        return Architecture((layers,) * blocks, width, patch_size)
    deep, blocks = numbers
    return Architecture((SHALLOW_LAYERS,) * (blocks - 1) + (deep,))


def flow_sizes(
    architecture: str | None,
    layers: Sequence[int] | None,
    width: int | Sequence[int] | None,
    patch_size: int | None,
) -> tuple[list[int], list[int], int]:
    """Settle the sizes of a flow from a notation and explicit arguments.

    Args:
        architecture: see :func:`parse_architecture`, or None.
        layers: layers of each block, 1 to 1,000, or None: the architecture's, else [2, 2, 2, 2].
        width: channels, 1 to 65,536, one number or one for each block, or None: the architecture's, else 128.
        patch_size: side of a patch, >= 1, or None: the architecture's, else 1.

    Returns:
        Layers of each block, channels of each block, and the patch size.

    Raises:
        ValueError: when an argument contradicts the architecture, or is empty or of another length.
    """
    if layers is not None:
        check_counts("layers", layers, at_most=1000, hint="one for each block, e.g. [2, 2, 2, 2]")
    if isinstance(width, Sequence):
        check_counts("width", width, at_most=2**16)
    else:
        check_count("width", width, at_most=2**16, or_none=True)
    check_count("patch_size", patch_size, or_none=True)
    named = Architecture(DEFAULT_LAYERS) if architecture is None else parse_architecture(architecture)
    if architecture is not None:
        _check_agreement("layers", layers, named.layers, architecture)
        _check_agreement("width", width, named.width, architecture)
        _check_agreement("patch_size", patch_size, named.patch_size, architecture)
    depths = list(named.layers if layers is None else layers)
    channels = next(size for size in (width, named.width, DEFAULT_WIDTH) if size is not None)
    widths = list(channels) if isinstance(channels, Sequence) else [channels] * len(depths)
    if len(widths) != len(depths):
        raise ValueError(f"width must be one number or one for each of {len(depths)} blocks, got {len(widths)}")
    return depths, widths, named.patch_size or 1 if patch_size is None else patch_size


def _check_agreement(
    name: str, given: int | Sequence[int] | None, named: int | Sequence[int] | None, text: str
) -> None:
    if given is None or named is None:
        return
    shown, found = (value if isinstance(value, int) else list(value) for value in (named, given))
    if shown != found:
        raise ValueError(f"architecture {text} says {name} {shown}, but {name} is {found}: leave one of them out")


def deep_shallow_layers(
    architecture: str | None, deep_layers: int | None, shallow_blocks: int | None, shallow_layers: int | None
) -> list[int]:
    """Layers of each block of a deep-shallow flow, from the data end to the noise end.

    Args:
        architecture: in STARFlow's notation, ``18(6)``, or None.
        deep_layers: layers of the block nearest the noise, 1 to 1,000, or None: the architecture's, else 6.
        shallow_blocks: blocks near the data, 1 to 1,000, or None: the architecture's, else 2.
        shallow_layers: layers of each of them, 1 to 1,000, or None: 2.

    Raises:
        ValueError: for TARFlow's notation, a contradiction, or no shallow block.
    """
    check_count("deep_layers", deep_layers, at_most=1000, or_none=True)
    mixing = "one order alone cannot mix the tokens"
    check_count("shallow_blocks", shallow_blocks, at_most=1000, or_none=True, hint=mixing)
    check_count("shallow_layers", shallow_layers, at_most=1000, or_none=True)
    named = Architecture((SHALLOW_LAYERS,) * 2 + (6,)) if architecture is None else parse_architecture(architecture)
    if named.width is not None:
        raise ValueError(f"architecture {architecture} is TARFlow's notation: STARFlow's names layers, as in 18(6)")
    if architecture is not None:
        _check_agreement("deep_layers", deep_layers, named.layers[-1], architecture)
        _check_agreement("shallow_blocks", shallow_blocks, len(named.layers) - 1, architecture)
        _check_agreement("shallow_layers", shallow_layers, SHALLOW_LAYERS, architecture)
    num_shallow = len(named.layers) - 1 if shallow_blocks is None else shallow_blocks
    if num_shallow < 1:
        raise ValueError(f"shallow_blocks must be >= 1, got {num_shallow}: one order alone cannot mix the tokens")
    shallow = SHALLOW_LAYERS if shallow_layers is None else shallow_layers
    return [shallow] * num_shallow + [named.layers[-1] if deep_layers is None else deep_layers]
