"""Small autoregressive flows whose output weights are not zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowbench.flows.autoregressive import AffineBlock, AutoregressiveFlow
from flowbench.flows.permutation import alternating
from flowbench.networks.causal_transformer import CausalTransformer


def make_network(num_tokens=6, token_dim=2, num_classes=3, *, std=0.05, **options) -> CausalTransformer:
    """A small double-precision network; its output layer is drawn from N(0, std^2)."""
    net = CausalTransformer(num_tokens, token_dim, num_classes, **({"width": 16, "depth": 2, "head_dim": 8} | options))
    nn.init.normal_(net.out.weight, std=std)
    nn.init.normal_(net.out.bias, std=std)
    if net.label_embedding is not None:
        nn.init.normal_(net.label_embedding.weight)
    return net.double()


def make_flow(num_blocks=2, seed=0, scale="exp", soft_clip=None, last="identity", **options) -> AutoregressiveFlow:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoregressiveFlow(
            AffineBlock(make_network(**options), order, scale, soft_clip)
            for order in alternating(num_blocks, last=last)
        )


def normal(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
