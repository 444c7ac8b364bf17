"""A transformer over tokens without a mask: the network of learned denoisers.

Shape suffixes: B batch, N tokens, D token dimension, W width, H heads, E head dimension.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowbench.core.checks import check_counts
from flowbench.networks.attention import LayerNorm
from flowbench.networks.blocks import zeroed
from flowbench.networks.linear import Linear
from flowbench.networks.rotary import RotaryTable, follow_weights, rotate
from flowbench.networks.sizes import LARGEST_SIDE, check_layers
from flowbench.networks.tokens import check_sizes, embed_tokens, label_table

__all__ = ["TokenNetwork", "TokenTransformer"]

# As large as embedded tokens are. At the usual 0.02 labels and places had hardly any effect: the score of two labelled
# Gaussians was learned to a relative error of 0.25 in 250 steps, and to 0.001 with this.
EMBEDDING_STD = 0.2


class TokenNetwork(nn.Module):
    """Embedded tokens and transformer layers in which every token sees every other; what is read is a subclass's.

    Args:
        num_tokens: sequence length N, 1 to 1e6.
        token_dim: token dimension D, 1 to 1e6.
        num_classes: number of classes, 1 to 1e6; the null label is index ``num_classes``. None: unconditional.
        depth: transformer layers of each block, 1 to 1,000.
        width: channels W, a multiple of head_dim, up to 65,536.
        head_dim: channels E of one head (even; a multiple of 4 with ``grid``).
        mlp_ratio: hidden channels of the MLPs over W, in [1 / W, 1000].
        grid: (rows, columns) of the token grid with rows * columns = N, for 2-D rotary positions; None: 1-D.
        num_blocks: blocks, 1 to 1,000.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    def __init__(
        self,
        num_tokens: int,
        token_dim: int,
        num_classes: int | None,
        depth: int,
        width: int,
        head_dim: int,
        mlp_ratio: float,
        grid: tuple[int, int] | None,
        num_blocks: int = 1,
    ) -> None:
        super().__init__()
        check_sizes(num_tokens, token_dim, num_classes, width, depth, head_dim, mlp_ratio)
        check_layers("num_blocks", num_blocks)
        if grid is not None:
            check_counts("grid", grid, length=2, at_most=LARGEST_SIDE)
        if grid is not None and grid[0] * grid[1] != num_tokens:
            raise ValueError(f"grid must have num_tokens {num_tokens} cells, got {grid[0]} x {grid[1]}")
        self.num_tokens, self.token_dim, self.num_classes = num_tokens, token_dim, num_classes
        self.embed = Linear(token_dim, width)
        self.label_embedding = label_table(num_classes, width, EMBEDDING_STD)
        self.position_embedding = nn.Parameter(EMBEDDING_STD * torch.randn(num_tokens, width))
        self.rotary = RotaryTable(num_tokens, head_dim, grid)
        self.register_load_state_dict_post_hook(follow_weights)
        self.blocks = nn.ModuleList(TokenBlock(width, head_dim, mlp_ratio) for _ in range(num_blocks * depth))

    def embedded(self, x_BND: Tensor, label: Tensor | None) -> Tensor:
        """Tokens (B, N, D) and labels (B,) at the beginning of the residual stream, (B, N, W).

        Raises:
            ValueError: for tokens or labels of another shape, or a label given to an unconditional network.
        """
        if x_BND.shape[1:] != (self.num_tokens, self.token_dim):
            expected = f"(B, {self.num_tokens}, {self.token_dim})"
            raise ValueError(f"tokens must have shape {expected}, got {tuple(x_BND.shape)}")
        return embed_tokens(self.embed, x_BND, self.position_embedding, self.label_embedding, label)


class TokenTransformer(TokenNetwork):
    """Transformer in which every token sees every other, ``net(x_BND, label) -> (B, N, D)``.

    Positions enter twice: rotary, which encodes how far apart two tokens are, and as a learned table added to the
    embedded tokens. Without a mask or a start token rotary positions alone do not encode where a token lies, so that a
    label could not mean different things in different places.

    The output layer starts at zero, weight and bias: a denoiser starts by leaving its input alone.

    Args:
        num_tokens: sequence length N, 1 to 1e6.
        token_dim: token dimension D, 1 to 1e6.
        num_classes: number of classes, 1 to 1e6; the null label is index ``num_classes``. None: unconditional.
        width: channels W, a multiple of head_dim, up to 65,536.
        depth: number of transformer layers, 1 to 1,000.
        head_dim: channels E of one head (even; a multiple of 4 with ``grid``).
        mlp_ratio: hidden channels of the MLPs over W, in [1 / W, 1000].
        grid: (rows, columns) of the token grid with rows * columns = N, for 2-D rotary positions; None: 1-D.

    Raises:
        ValueError: for sizes that do not fit together.

    References:
        Vaswani et al. (2017), arXiv:1706.03762, with pre-norm layers; rotary positions: Su et al. (2021),
        arXiv:2104.09864.

    Example:
        >>> network = TokenTransformer(num_tokens=4, token_dim=2, num_classes=10, width=8, depth=1, head_dim=4)
        >>> x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
        >>> y = network(x, label=torch.tensor([0, 7, 10]))  # 10 is the null label
        >>> y.shape, bool((y == 0).all())
        (torch.Size([3, 4, 2]), True)
    """

    end_layers: ClassVar[frozenset[str]] = frozenset({"embed", "out"})
    """Layers that join the network to data and labels; rules for matrices leave them to AdamW."""

    def __init__(
        self,
        num_tokens: int,
        token_dim: int,
        num_classes: int | None = None,
        *,
        width: int = 128,
        depth: int = 4,
        head_dim: int = 32,
        mlp_ratio: float = 4.0,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(num_tokens, token_dim, num_classes, depth, width, head_dim, mlp_ratio, grid)
        self.final_norm = LayerNorm(width)
        self.out = zeroed(Linear(width, token_dim))

    def forward(self, x_BND: Tensor, label: Tensor | None = None) -> Tensor:
        """Map tokens to tokens.

        Args:
            x_BND: tokens, shape (B, N, D).
            label: classes in 0..num_classes (num_classes = null), int64, shape (B,); None = null for all.

        Returns:
            Tokens of the same shape.

        Raises:
            ValueError: for tokens or labels of another shape, or a label given to an unconditional network.
        """
        h_BNW = self.embedded(x_BND, label)
        for block in self.blocks:
            h_BNW = block(h_BNW, self.rotary.table)
        predicted: Tensor = self.out(self.final_norm(h_BNW))
        return predicted


class TokenBlock(nn.Module):
    """Pre-norm transformer layer: attention over all tokens, then an MLP with exact GELU.

    Args:
        width: channels W.
        head_dim: channels E of one head.
        mlp_ratio: hidden channels of the MLP over W.
    """

    def __init__(self, width: int, head_dim: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(mlp_ratio * width)
        self.num_heads = width // head_dim
        self.attention_norm = LayerNorm(width)
        self.qkv = Linear(width, 3 * width)
        self.attention_out = Linear(width, width)
        self.mlp_norm = LayerNorm(width)
        self.mlp = nn.Sequential(Linear(width, hidden), nn.GELU(), Linear(hidden, width))

    def forward(self, x_BNW: Tensor, table: Tensor) -> Tensor:
        """Residual stream (B, N, W) and the rotary table (2, N, E / 2)."""
        projected = self.qkv(self.attention_norm(x_BNW))
        q, k, v = projected.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y_BHNE = F.scaled_dot_product_attention(rotate(q, table), rotate(k, table), v)
        x_BNW = x_BNW + self.attention_out(y_BHNE.transpose(1, 2).flatten(2))
        return x_BNW + self.mlp(self.mlp_norm(x_BNW))
