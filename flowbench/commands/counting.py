"""What an experiment's model costs before it is trained, and how it is printed.

The model is built on the meta device: no data are read, no weights are allocated, no autoencoder is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from flowbench.core.terminal import wrapped
from flowbench.data import DataSpec
from flowbench.data.catalogue import declared_spec
from flowbench.training import Count, TrainingModule
from flowbench.training.count import FLOAT_BYTES, BlockCount

if TYPE_CHECKING:
    from flowbench.config import Experiment

__all__ = ["count", "count_text", "meta_module"]

_META = torch.device("meta")


def count(experiment: Experiment) -> Count:
    """Count an experiment's model.

    Args:
        experiment: validated configuration.

    Raises:
        ValueError: when the data are the user's own and declare no shape, or a class refuses its arguments.
    """
    return meta_module(experiment).count()


def meta_module(experiment: Experiment, spec: DataSpec | None = None) -> TrainingModule:
    """The experiment's model on the meta device, with untrained models on that device for what it requires.

    Args:
        experiment: validated configuration.
        spec: of the data, where they have been read; None takes what is known of them unread.

    Raises:
        ValueError: as :func:`count`.
    """
    with _META:
        spec = spec or _spec(experiment)
        # What is required works on the same data, whatever its own file declares.
        required = {name: meta_module(needed, spec) for name, needed in experiment.requirements.items()}
        module = experiment.build_model(spec, **required)
    if not isinstance(module, TrainingModule):
        raise ValueError(f"model.class_path must name a flowbench module, got {type(module).__name__}")
    return module


def _spec(experiment: Experiment) -> DataSpec:
    data: dict[str, Any] = experiment.resolved["data"]
    return declared_spec(data.get("dataset", "digits"), data.get("shape"), data.get("num_classes"), data.get("levels"))


# ---- text ---------------------------------------------------------------------------------------------


def count_text(found: Count) -> str:
    """A table of the blocks and a line for every number."""
    return "\n".join([*_block_table(found.blocks), *_lines(found)])


def _scaled(number: float, unit: str) -> str:
    """A number with three digits and a prefix, e.g. 1.41 GFLOP."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return (
                f"{number / size:.3g} {prefix}{unit}"
                if number / size < 999.5
                else f"{number / size:.0f} {prefix}{unit}"
            )
    return f"{number:g} {unit}"


def _block_table(blocks: Sequence[BlockCount]) -> list[str]:
    if not blocks:
        return []
    rows = [("block", "layers", "labels", "parameters", "pass", "sampling", "cache")]
    for index, block in enumerate(blocks):
        end = {0: " (data)", len(blocks) - 1: " (noise)"}.get(index, "")
        counts = (_scaled(block.evaluation_flops, "FLOP"), _scaled(block.sampling_flops, "FLOP"))
        labels = "yes" if block.labelled else "no"
        name, cache = f"{index}{end}", _scaled(block.cache_bytes, "B")
        rows.append((name, str(block.layers), labels, f"{block.parameters:,}", *counts, cache))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["  ".join([row[0].ljust(widths[0]), *right[1:]]) for row, right in zip(rows, cells, strict=True)]
    return [*lines, ""]


def _lines(found: Count) -> list[str]:
    size = "x".join(map(str, found.data))
    latent = f", latents {'x'.join(map(str, found.space))}" if found.space != found.data else ""
    classes = "unconditional" if found.num_classes is None else f"{found.num_classes} classes"
    drawn = "depends on the data" if found.sampling_flops is None else _scaled(found.sampling_flops, "FLOP")
    rows = {
        "model": f"{found.family}, {size}{latent}, {classes}",
        "parameters": f"{found.parameters:,}",
        "training step": f"{_scaled(found.training_flops, 'FLOP')} per sample, forward and backward",
    }
    if found.evaluation_flops is not None:
        rows["network evaluation"] = f"{_scaled(found.evaluation_flops, 'FLOP')} per sample"
        rows["drawing a sample"] = drawn + _how_drawn(found)
    if found.cache_bytes is not None:
        rows["key/value cache"] = f"{_scaled(found.cache_bytes, 'B')} per sample in float32; twice under guidance"
    moments = f"AdamW's moments ({_scaled(FLOAT_BYTES * found.moments, 'B')})"
    kept = f"weights, gradients, {moments}" + (", averaged weights" if found.averaged else "")
    rows["training memory"] = f"{_scaled(found.state_bytes, 'B')}: {kept} in float32; activations come on top"
    width = max(map(len, rows))
    return [wrapped(value, f"{name:<{width}}  ", " " * (width + 2)) for name, value in rows.items()]


def _how_drawn(found: Count) -> str:
    if found.blocks:
        return ": token by token with a cache; labelled blocks cost twice under guidance"
    return "" if found.evaluations is None else f": {found.evaluations} evaluations without guidance"
