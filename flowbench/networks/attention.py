"""Causal self-attention with an explicit key/value cache, and the pre-norm block around it.

Shape suffixes: B batch, S slots (sequence positions), W width, H heads, E head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowbench.networks.rotary import rotate

__all__ = ["CausalAttention", "CausalBlock", "KeyValueCache", "LayerNorm"]


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of the slots seen so far, for one sequential pass.

    It belongs to the caller, never to a module: an exception in the middle of a pass leaves nothing behind.
    Slot s is written by step s before it is read, so a cache may be used again without clearing.

    Attributes:
        keys: rotated keys, shape (depth, B, H, S, E).
        values: values, same shape.
    """

    keys: Tensor
    values: Tensor

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self.keys.shape[1]


class LayerNorm(nn.LayerNorm):
    """Layer normalisation that never computes below float32 and leaves float64 alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; the result has the dtype of ``x``."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class CausalAttention(nn.Module):
    """Multi-head self-attention in which slot s sees slots 0..s.

    Args:
        width: channels W, a multiple of head_dim.
        head_dim: channels E of one head.
    """

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = width // head_dim
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BSW: Tensor, table: Tensor | None) -> Tensor:
        """All slots in parallel.

        Args:
            x_BSW: normalised residual stream, shape (B, S, W).
            table: rotary table of the S slots, shape (2, S, E / 2), or None.
        """
        q_BHSE, k_BHSE, v_BHSE = self._project(x_BSW, table)
        y_BHSE = F.scaled_dot_product_attention(q_BHSE, k_BHSE, v_BHSE, is_causal=True)
        return self.out(y_BHSE.transpose(1, 2).flatten(2))

    def step(self, x_B1W: Tensor, table: Tensor | None, keys: Tensor, values: Tensor, slot: int) -> Tensor:
        """One slot, given the cached keys and values of the slots before it.

        Args:
            x_B1W: normalised residual stream of the slot, shape (B, 1, W).
            table: rotary table of the slot, shape (2, 1, E / 2), or None.
            keys: this layer's cached keys, shape (B, H, S, E); row ``slot`` is written.
            values: this layer's cached values, same shape; row ``slot`` is written.
            slot: index of the slot.
        """
        q_BH1E, k_BH1E, v_BH1E = self._project(x_B1W, table)
        keys[:, :, slot] = k_BH1E[:, :, 0]
        values[:, :, slot] = v_BH1E[:, :, 0]
        seen = slice(0, slot + 1)
        y_BH1E = F.scaled_dot_product_attention(
            q_BH1E, keys[:, :, seen].to(q_BH1E.dtype), values[:, :, seen].to(q_BH1E.dtype)
        )
        return self.out(y_BH1E.transpose(1, 2).flatten(2))

    def _project(self, x_BSW: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x_BSW).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        return q, k, v


class CausalBlock(nn.Module):
    """Pre-norm transformer block: attention, then an MLP with exact GELU.

    Args:
        width: channels W.
        head_dim: channels E of one head.
        mlp_ratio: hidden channels of the MLP over W.
    """

    def __init__(self, width: int, head_dim: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(mlp_ratio * width)
        self.attention_norm = LayerNorm(width)
        self.attention = CausalAttention(width, head_dim)
        self.mlp_norm = LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x_BSW: Tensor, table: Tensor | None) -> Tensor:
        """All slots in parallel; arguments as in :meth:`CausalAttention.forward`."""
        x_BSW = x_BSW + self.attention(self.attention_norm(x_BSW), table)
        return x_BSW + self.mlp(self.mlp_norm(x_BSW))

    def step(self, x_B1W: Tensor, table: Tensor | None, keys: Tensor, values: Tensor, slot: int) -> Tensor:
        """One slot; arguments as in :meth:`CausalAttention.step`."""
        x_B1W = x_B1W + self.attention.step(self.attention_norm(x_B1W), table, keys, values, slot)
        return x_B1W + self.mlp(self.mlp_norm(x_B1W))
