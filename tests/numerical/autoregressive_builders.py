"""Small autoregressive flows whose output weights are not zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flowbench.flows import AffineBlock, AutoregressiveFlow, alternating, permute
from flowbench.networks.causal_transformer import CausalTransformer


def make_network(num_tokens=6, token_dim=2, num_classes=3, *, std=0.05, **options) -> CausalTransformer:
    """A small double-precision network; its output layer is drawn from N(0, std^2)."""
    net = CausalTransformer(num_tokens, token_dim, num_classes, **({"width": 16, "depth": 2, "head_dim": 8} | options))
    nn.init.normal_(net.out.weight, std=std)
    nn.init.normal_(net.out.bias, std=std)
    if net.label_embedding is not None:
        nn.init.normal_(net.label_embedding.weight)
    return net.double()


def make_flow(
    num_blocks=2, seed=0, scale="exp", soft_clip=None, last="identity", tokens_grid=None, **options
) -> AutoregressiveFlow:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoregressiveFlow(
            AffineBlock(make_network(**options), order, scale, soft_clip, tokens_grid)
            for order in alternating(num_blocks, last=last)
        )


def starflow() -> AutoregressiveFlow:
    """A conditional deep block above two unconditional shallow ones."""
    torch.manual_seed(0)
    return AutoregressiveFlow(
        AffineBlock(make_network(num_classes=classes, depth=depth), order, "softplus", 4.0)
        for classes, depth, order in [(None, 1, "identity"), (None, 1, "flip"), (3, 4, "identity")]
    )


def normal(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive_inverse(block: AffineBlock, z: Tensor, label: Tensor | None = None) -> Tensor:
    """Run the whole network again for every token; the order comes from permuting the token numbers."""
    order = permute(torch.arange(z.shape[1])[None, :, None], block.permutation, block.grid).flatten()
    z = z[:, order]
    x = torch.zeros_like(z)
    for i in range(z.shape[1]):
        out = block.network(x, label)[:, i]
        if block.soft_clip is not None:
            out = block.soft_clip * (out / block.soft_clip).tanh()
        mean, raw = out.split(z.shape[2], dim=-1)
        std = raw.exp() if block.scale == "exp" else (1 + (math.e - 1) * raw.exp()).log()
        x[:, i] = mean + std * z[:, i]
    return x[:, order.argsort()]
