"""What one block of an autoregressive flow costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flowbench.training.count import BlockCount, forward_flops

__all__ = ["count_block"]


def count_block(block: nn.Module) -> BlockCount:
    """Count an affine block with a causal transformer, on the meta device or elsewhere."""
    network: Any = block.network
    device = next(network.parameters()).device
    label = None if network.num_classes is None else torch.zeros(1, dtype=torch.int64, device=device)
    tokens = torch.empty(1, network.num_tokens, network.token_dim, device=device)
    cache = network.allocate_cache(1)
    level = torch.ones(1, device=device) if network.level_embedding is not None else None

    def step(position: int) -> int:
        return forward_flops(lambda: network.step(tokens[:, 0], position, cache, label, level=level))

    # Attention sees one token more at every step, so the steps' costs are an arithmetic series.
    first, last = step(network.num_tokens - network.num_slots), step(network.num_tokens - 1)
    return BlockCount(
        layers=len(network.blocks),
        labelled=network.num_classes is not None,
        parameters=sum(p.numel() for p in block.parameters()),
        evaluation_flops=forward_flops(lambda: block(tokens, label, level)),
        sampling_flops=network.num_slots * (first + last) // 2,
        cache_bytes=cache.num_bytes,
    )
