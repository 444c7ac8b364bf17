"""The causal transformer of autoregressive flows.

Shape suffixes: B batch, N tokens, D token dimension, S slots (N, or N - 1 when token 0 is free), W width.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowbench.networks.attention import CausalBlock, KeyValueCache, LayerNorm
from flowbench.networks.rotary import grid_positions, rotary_table

__all__ = ["CausalTransformer"]


class CausalTransformer(nn.Module):
    """Transformer whose output row i depends only on the tokens before i.

    Order: tokens come in the order in which they are generated, and so do the outputs; whoever permutes
    tokens (the flow block) does so outside. The network needs no notion of the order: reversing a sequence
    or a raster grid negates every rotary offset, which the projections absorb, and a learned table belongs
    to one network.

    Slots: slot i reads token i - 1, predicts token i and carries the position of token i. With
    ``start="learned"`` slot 0 reads a learned token (STARFlow); with ``start="zero"`` there is no slot 0
    and row 0 of the output is zero, so that an affine flow copies token 0 (TARFlow).

    The output layer starts at zero, weight and bias: an affine flow starts as the identity.

    References:
        Zhai et al. (2024), Normalizing Flows are Capable Generative Models (TARFlow), arXiv:2412.06329;
        Gu et al. (2025), STARFlow, arXiv:2506.06276.

    Args:
        num_tokens: sequence length N >= 1.
        token_dim: token dimension D >= 1.
        num_classes: number of classes; the null label is index ``num_classes``. None: unconditional.
        width: channels W, a multiple of head_dim.
        depth: number of transformer blocks >= 1.
        head_dim: channels of one head (even; a multiple of 4 with ``grid``).
        mlp_ratio: hidden channels of the MLPs over W.
        position: "rope" (rotary) or "learned" (a table added to the embedded tokens).
        grid: (rows, columns) of the token grid with rows * columns = N, for 2-D rotary positions; None: 1-D.
        start: "learned" or "zero", see above.
        final_norm: normalise before the output layer.

    Attributes:
        num_slots: one-token evaluations that a sequential pass needs, N or N - 1.

    Raises:
        ValueError: for sizes that do not fit together.
    """

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
        position: Literal["rope", "learned"] = "rope",
        grid: tuple[int, int] | None = None,
        start: Literal["learned", "zero"] = "learned",
        final_norm: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(num_tokens, token_dim, num_classes, width, depth, head_dim)
        if mlp_ratio * width < 1:
            raise ValueError(f"mlp_ratio must be at least 1 / width, got {mlp_ratio}")
        _check_position(num_tokens, position, grid, start)
        self.num_tokens, self.token_dim, self.num_classes = num_tokens, token_dim, num_classes
        self.head_dim, self.start = head_dim, start
        first_slot = 0 if start == "learned" else 1
        self.num_slots = num_tokens - first_slot
        self.embed = nn.Linear(token_dim, width)
        if start == "learned":
            self.start_token = nn.Parameter(0.02 * torch.randn(token_dim))
        self.label_embedding = None if num_classes is None else _embedding(num_classes + 1, width)
        self.position_embedding = (
            nn.Parameter(0.02 * torch.randn(self.num_slots, width)) if position == "learned" else None
        )
        table = _rotary_table(num_tokens, head_dim, grid)[:, first_slot:] if position == "rope" else None
        self.register_buffer("table", table, persistent=False)
        self.blocks = nn.ModuleList(CausalBlock(width, head_dim, mlp_ratio) for _ in range(depth))
        self.final_norm = LayerNorm(width) if final_norm else nn.Identity()
        self.out = nn.Linear(width, 2 * token_dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_BND: Tensor, label: Tensor | None = None) -> Tensor:
        """Parameters of every token in one parallel pass.

        Args:
            x_BND: tokens in generation order, shape (B, N, D).
            label: classes in 0..num_classes (num_classes = null), int64, shape (B,); None = null for all.

        Returns:
            Parameters of shape (B, N, 2 D); row i depends on rows 0..i-1 of ``x_BND`` only.

        Raises:
            ValueError: for another shape, or a label given to an unconditional network.
        """
        if x_BND.shape[1:] != (self.num_tokens, self.token_dim):
            raise ValueError(
                f"tokens must have shape (B, {self.num_tokens}, {self.token_dim}), got {tuple(x_BND.shape)}"
            )
        x_BSD = x_BND[:, :-1]
        if self.start == "learned":
            start_B1D = self.start_token.to(x_BSD.dtype).expand(len(x_BSD), 1, -1)
            x_BSD = torch.cat([start_B1D, x_BSD], dim=1)
        h_BSW = self._embed(x_BSD, label, slice(None))
        table = cast("Tensor | None", self.table)
        for block in self.blocks:
            h_BSW = block(h_BSW, table)
        params_BSP = self.out(self.final_norm(h_BSW))
        return F.pad(params_BSP, (0, 0, self.num_tokens - self.num_slots, 0))

    def allocate_cache(self, batch_size: int) -> KeyValueCache:
        """An empty cache for one sequential pass over ``batch_size`` sequences.

        It lies on the network's device, in the network's dtype (autocast's, where that is on).
        """
        weight = self.embed.weight
        device, dtype = weight.device.type, weight.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:  # autocast leaves float64 alone
            dtype = torch.get_autocast_dtype(device)
        num_heads = self.embed.out_features // self.head_dim
        shape = (len(self.blocks), batch_size, num_heads, self.num_slots, self.head_dim)
        return KeyValueCache(weight.new_zeros(shape, dtype=dtype), weight.new_zeros(shape, dtype=dtype))

    def step(
        self, previous_BD: Tensor | None, position: int, cache: KeyValueCache, label: Tensor | None = None
    ) -> Tensor:
        """Parameters of one token; positions must be visited in order, 0 to N - 1.

        Call it without autograd: the cache is written in place.

        Args:
            previous_BD: token ``position - 1``, shape (B, D); None at position 0.
            position: index of the token to predict.
            cache: from :meth:`allocate_cache`, for the same B; written in place.
            label: as in :meth:`forward`.

        Returns:
            Row ``position`` of what :meth:`forward` returns, shape (B, 2 D).

        Raises:
            ValueError: if a previous token is given at position 0, or is missing elsewhere.
        """
        if (previous_BD is None) != (position == 0):
            state = "missing" if previous_BD is None else "given"
            raise ValueError(f"previous token {state} at position {position}; pass None at position 0 only")
        slot = position - (self.num_tokens - self.num_slots)
        if slot < 0:
            return self.out.weight.new_zeros(cache.batch_size, 2 * self.token_dim)
        token_BD = self.start_token.expand(cache.batch_size, -1) if previous_BD is None else previous_BD
        here = slice(slot, slot + 1)
        h_B1W = self._embed(token_BD[:, None], label, here)
        table = None if self.table is None else cast(Tensor, self.table)[:, here]
        for block, keys, values in zip(self.blocks, cache.keys, cache.values, strict=True):
            h_B1W = cast(CausalBlock, block).step(h_B1W, table, keys, values, slot)
        return self.out(self.final_norm(h_B1W))[:, 0]

    def _embed(self, x_BSD: Tensor, label: Tensor | None, slots: slice) -> Tensor:
        # Autocast makes the product bf16; the residual stream keeps the parameters' dtype.
        h_BSW = self.embed(x_BSD).to(self.embed.weight.dtype)
        if self.position_embedding is not None:
            h_BSW = h_BSW + self.position_embedding[slots]
        if self.label_embedding is None:
            if label is not None:
                raise ValueError("label given to an unconditional network; build it with num_classes")
            return h_BSW
        if label is None:
            return h_BSW + self.label_embedding.weight[-1]
        if label.shape != x_BSD.shape[:1]:
            raise ValueError(f"label must have shape ({len(x_BSD)},), got {tuple(label.shape)}")
        return h_BSW + self.label_embedding(label)[:, None]


def _embedding(num_rows: int, width: int) -> nn.Embedding:
    embedding = nn.Embedding(num_rows, width)
    nn.init.normal_(embedding.weight, std=0.02)
    return embedding


def _rotary_table(num_tokens: int, head_dim: int, grid: tuple[int, int] | None) -> Tensor:
    positions = torch.arange(num_tokens)[:, None] if grid is None else grid_positions(*grid)
    return rotary_table(positions, head_dim).to(torch.get_default_dtype())


def _check_sizes(
    num_tokens: int, token_dim: int, num_classes: int | None, width: int, depth: int, head_dim: int
) -> None:
    sizes = {
        "num_tokens": num_tokens,
        "token_dim": token_dim,
        "width": width,
        "depth": depth,
        "head_dim": head_dim,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, or None for an unconditional network, got {num_classes}")
    if width % head_dim:
        raise ValueError(f"width must be a multiple of head_dim {head_dim}, got {width}")


def _check_position(num_tokens: int, position: str, grid: tuple[int, int] | None, start: str) -> None:
    if position not in ("rope", "learned"):
        raise ValueError(f"position must be 'rope' or 'learned', got {position!r}")
    if start not in ("learned", "zero"):
        raise ValueError(f"start must be 'learned' or 'zero', got {start!r}")
    if grid is not None and position != "rope":
        raise ValueError(f"grid {grid} needs position='rope'; a learned table takes no grid")
    if grid is not None and grid[0] * grid[1] != num_tokens:
        raise ValueError(f"grid must have num_tokens {num_tokens} cells, got {grid[0]} x {grid[1]}")
