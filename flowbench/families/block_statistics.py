"""What the blocks of an autoregressive flow do to the data, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from flowbench.flows import AffineBlock, AutoregressiveFlow

__all__ = ["BlockRecord", "recorded"]


@dataclass
class BlockRecord:
    """One pass through a flow, data to noise.

    Attributes:
        blocks: the flow's blocks, from the data end to the noise end.
        states: tokens (B, N, D) after each block, with the graph of the pass.
        params: output (B, N, 2 D) of each block's network.
    """

    blocks: list[AffineBlock]
    states: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def statistics(self) -> dict[str, Tensor]:
        """Variance of the state after each block, and the smallest and largest scale that the block divides by.

        A flow that fits ends at variance 1. Scales near the bounds of a soft clip, or variances far from 1, come before
        inverses that are not finite.

        Returns:
            Scalars named ``block<k>/variance``, ``block<k>/min_std`` and ``block<k>/max_std``; block 0 is nearest the
            data.
        """
        found: dict[str, Tensor] = {}
        for k, (block, state_BND, params_BNP) in enumerate(zip(self.blocks, self.states, self.params, strict=True)):
            found[f"block{k}/variance"] = state_BND.var(correction=0)
            found[f"block{k}/min_std"], found[f"block{k}/max_std"] = block.moments(params_BNP)[1].aminmax()
        return found


@contextmanager
def recorded(flow: AutoregressiveFlow) -> Iterator[BlockRecord]:
    """Record the one pass forward that is made within the context.

    It listens to the modules instead of calling the blocks itself, which would pass by what wraps them (sharding).
    """
    record = BlockRecord(cast("list[AffineBlock]", list(flow.blocks)))
    handles = []
    for block in record.blocks:
        network = cast("torch.nn.Module", block.network)
        handles.append(network.register_forward_hook(lambda _module, _inputs, output: record.params.append(output)))
        handles.append(block.register_forward_hook(lambda _module, _inputs, output: record.states.append(output[0])))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
