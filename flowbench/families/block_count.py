"""What one block of an autoregressive flow costs."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from flowbench.flows.autoregressive.affine import told
from flowbench.training.count import BlockCount, forward_flops

__all__ = ["count_block"]


def count_block(block: nn.Module, level: Tensor | None = None) -> BlockCount:
    """Count an affine block, on the meta device or elsewhere; a network without ``blocks`` has no layers by name.

    Args:
        block: the block.
        level: a noise level, shape (1,), for a network that is told it; else None.
    """
    network: Any = block.network
    device = next(network.parameters()).device
    label = None if network.num_classes is None else torch.zeros(1, dtype=torch.int64, device=device)
    tokens = torch.empty(1, network.num_tokens, network.token_dim, device=device)
    cache = network.allocate_cache(1)

    def step(position: int) -> int:
        return forward_flops(lambda: network.step(tokens[:, 0], position, cache, label, **told(level)))

    # Attention sees one token more at every step, so the steps' costs are an arithmetic series.
    first, last = step(network.num_tokens - network.num_slots), step(network.num_tokens - 1)
    return BlockCount(
        layers=len(getattr(network, "blocks", ())),
        labelled=network.num_classes is not None,
        parameters=sum(p.numel() for p in block.parameters()),
        evaluation_flops=forward_flops(lambda: block(tokens, label, level)),
        sampling_flops=network.num_slots * (first + last) // 2,
        cache_bytes=_num_bytes(cache),
    )


def _num_bytes(cache: Any) -> int:
    """Of the tensors in a nest of tuples and dataclasses, or as the cache says itself."""
    if isinstance(cache, torch.Tensor):
        return cache.nbytes
    if isinstance(cache, tuple | list):
        return sum(map(_num_bytes, cache))
    own = getattr(cache, "num_bytes", None)
    return sum(_num_bytes(getattr(cache, field.name)) for field in fields(cache)) if own is None else int(own)
