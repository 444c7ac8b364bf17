"""A transformer over tokens whose hidden states are read between its blocks.

Shape suffixes: B batch, N tokens, D token dimension, S states, W width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from flowbench.networks.attention import LayerNorm
from flowbench.networks.linear import Linear
from flowbench.networks.token_transformer import TokenNetwork

__all__ = ["ReadOutTransformer"]


class ReadOutTransformer(TokenNetwork):
    """Blocks of transformer layers in which every token sees every other; each block's hidden state can be read.

    A linear head reads the residual stream after each block but the last, whose stream is normalised and becomes the
    output. The hidden states are of the transformer's width: a head may leave out what its state is not about.

    Args:
        num_tokens: sequence length N, 1 to 1e6.
        token_dim: token dimension D, 1 to 1e6.
        num_classes: number of classes, 1 to 1e6; the null label is index ``num_classes``. None: unconditional.
        num_blocks: blocks, 1 to 1,000.
        depth: transformer layers of each block, 1 to 1,000.
        width: channels W, a multiple of head_dim, up to 65,536.
        head_dim: channels of one head (even; a multiple of 4 with ``grid``).
        mlp_ratio: hidden channels of the MLPs over W, in [1 / W, 1000].
        grid: (rows, columns) of the token grid with rows * columns = N, for 2-D rotary positions; None: 1-D.
        reads: whether there are heads between the blocks.

    Raises:
        ValueError: for sizes that do not fit together.

    References:
        Vaswani et al. (2017), arXiv:1706.03762, with pre-norm layers; rotary positions: Su et al. (2021),
        arXiv:2104.09864.

    Example:
        >>> network = ReadOutTransformer(num_tokens=4, token_dim=2, num_blocks=3, depth=1, width=8, head_dim=4)
        >>> network(torch.zeros(5, 4, 2)).shape  # after each of the three blocks
        torch.Size([3, 5, 4, 2])
    """

    end_layers: ClassVar[frozenset[str]] = frozenset({"embed", "heads", "out"})
    """Layers that join the network to data and labels; rules for matrices leave them to AdamW."""

    def __init__(
        self,
        num_tokens: int,
        token_dim: int,
        num_classes: int | None = None,
        *,
        num_blocks: int = 4,
        depth: int = 2,
        width: int = 128,
        head_dim: int = 32,
        mlp_ratio: float = 4.0,
        grid: tuple[int, int] | None = None,
        reads: bool = True,
    ) -> None:
        super().__init__(num_tokens, token_dim, num_classes, depth, width, head_dim, mlp_ratio, grid, num_blocks)
        self.depth = depth
        self.heads = nn.ModuleList(Linear(width, token_dim) for _ in range(num_blocks - 1 if reads else 0))
        self.final_norm = LayerNorm(width)
        self.out = Linear(width, token_dim)

    def forward(self, x_BND: Tensor, label: Tensor | None = None) -> Tensor:
        """Map tokens to tokens, block by block.

        Args:
            x_BND: tokens, shape (B, N, D).
            label: classes in 0..num_classes (num_classes = null), int64, shape (B,); None = null for all.

        Returns:
            What the heads read after each block, and last the output, shape (S, B, N, D): S is the number of blocks, or
            1 without heads.

        Raises:
            ValueError: for tokens or labels of another shape, or a label given to an unconditional network.
        """
        h_BNW = self.embedded(x_BND, label)
        read = []
        for number, layer in enumerate(self.blocks, start=1):
            h_BNW = layer(h_BNW, self.rotary.table)
            block, left = divmod(number, self.depth)
            if not left and block <= len(self.heads):
                read.append(self.heads[block - 1](h_BNW))
        return torch.stack([*read, self.out(self.final_norm(h_BNW))])
