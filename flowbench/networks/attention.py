"""Causal self-attention with an explicit key/value cache, and the pre-norm block around it.

Shape suffixes: B batch, S slots (sequence positions), L slots computed in one call, W width, H heads, E head
dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowbench.core.kernels import PLAIN, Way, fastest, rounded_up
from flowbench.networks.key_value_cache import LayerCache, SlotRun
from flowbench.networks.linear import Linear
from flowbench.networks.rotary import rotate

__all__ = ["CausalAttention", "CausalBlock", "LayerNorm", "Temperature"]

# The fused bfloat16 kernel of CPUs is slow backward: forward and backward of 64 sequences of 64 slots (4 heads of 64)
# take it 34 ms, the written-out products 6 ms; the lines cross between 256 and 1024 slots.
_MAX_EXPLICIT = 512
_PRODUCTS = "products"
# Cached keys' numbers that a token reads, below which the fused kernel is taken unmeasured: at 53,000 it took 0.54 of
# the time of two products, at 65,000 0.64 (AMD EPYC with AVX2); with fewer, their calls are most of it on any machine.
_MIN_READ = 1 << 15

Temperature = float | Tensor
"""What divides the attention logits: one number, or one per sequence, shape (B,)."""


class LayerNorm(nn.LayerNorm):
    """Layer normalisation that never computes below float32 and leaves float64 alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; the result has the dtype of ``x``."""
        if x.dtype in (torch.float32, torch.float64) and (self.weight is None or x.dtype == self.weight.dtype):
            return super().forward(x)
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
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x_BSW: Tensor, table: Tensor | None, temperature: Temperature = 1.0) -> Tensor:
        """All slots in parallel.

        Args:
            x_BSW: normalised residual stream, shape (B, S, W).
            table: rotary table of the S slots, shape (2, S, E / 2), or None.
            temperature: divides the logits, a float or shape (B,).
        """
        q_BHSE, k_BHSE, v_BHSE = self._project(x_BSW, table)
        return self._attend(q_BHSE, k_BHSE, v_BHSE, temperature, is_causal=True)

    def extend(
        self, x_BLW: Tensor, table: Tensor | None, cache: LayerCache, run: SlotRun, temperature: Temperature = 1.0
    ) -> Tensor:
        """A run of slots, given the cached keys and values of the slots before them.

        Args:
            x_BLW: normalised residual stream of the slots, shape (B, L, W).
            table: rotary table of the slots, shape (2, L, E / 2), or None.
            cache: of this layer; the rows of the slots are written.
            run: the L slots.
            temperature: as in :meth:`forward`.
        """
        q_BHLE, k_BHLE, v_BHLE = self._project(x_BLW, table)
        cache.write(k_BHLE, v_BHLE, run)
        length = x_BLW.shape[1]
        if length == 1 and x_BLW.device.type == "cpu":
            return self._output(_attend_one_query(*self._scaled(q_BHLE, temperature), cache, run))
        mask = None if run.mask is None else run.mask.to(q_BHLE.dtype)
        seen_k, seen_v = cache.seen_keys(run.end).to(q_BHLE.dtype), cache.values[:, :, : run.end].to(q_BHLE.dtype)
        return self._attend(q_BHLE, seen_k, seen_v, temperature, mask, is_causal=length > 1 and run.first == 0)

    def step(
        self,
        x_B1W: Tensor,
        table: Tensor | None,
        cache: LayerCache,
        slot: Tensor,
        seen_S: Tensor,
        temperature: Temperature = 1.0,
    ) -> Tensor:
        """One slot whose index lives on the device: every shape is static, nothing waits for the host.

        Args:
            x_B1W: normalised residual stream of the slot, shape (B, 1, W).
            table: rotary table of the slot, shape (2, 1, E / 2), or None.
            cache: of this layer, in one page; row ``slot`` is written.
            slot: index of the slot, int64, shape (1,).
            seen_S: True for slots 0..slot, shape (S,).
            temperature: as in :meth:`forward`.
        """
        q_BH1E, k_BH1E, v_BH1E = self._project(x_B1W, table)
        (keys,), values = cache.pages, cache.values
        keys.index_copy_(2, slot, k_BH1E.to(keys.dtype))
        values.index_copy_(2, slot, v_BH1E.to(values.dtype))
        return self._attend(q_BH1E, keys.to(q_BH1E.dtype), values.to(q_BH1E.dtype), temperature, seen_S[None])

    def _project(self, x_BLW: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x_BLW).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if table is None:
            q, k, v = qkv.unbind(0)
            return q, k, v
        q, k = rotate(qkv[:2], table).unbind(0)
        return q, k, qkv[2]

    def _attend(
        self,
        q_BHLE: Tensor,
        k_BHSE: Tensor,
        v_BHSE: Tensor,
        temperature: Temperature,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        q_BHLE, scale = self._scaled(q_BHLE, temperature)
        if is_causal and q_BHLE.device.type == "cpu" and q_BHLE.dtype == torch.bfloat16:
            if q_BHLE.shape[2] <= _MAX_EXPLICIT and not torch.compiler.is_compiling():
                return self._output(_attend_explicitly(q_BHLE, k_BHSE, v_BHSE, scale))
        return self._output(
            F.scaled_dot_product_attention(q_BHLE, k_BHSE, v_BHSE, attn_mask=mask, is_causal=is_causal, scale=scale)
        )

    def _scaled(self, q_BHLE: Tensor, temperature: Temperature) -> tuple[Tensor, float]:
        """Queries and the factor of their logits; temperatures that differ by row go into the queries."""
        scale = 1 / math.sqrt(q_BHLE.shape[-1])
        if isinstance(temperature, Tensor):
            return (q_BHLE / temperature[:, None, None, None]).to(q_BHLE.dtype), scale
        return q_BHLE, scale / temperature

    def _output(self, y_BHLE: Tensor) -> Tensor:
        y_BLW: Tensor = self.out(y_BHLE.transpose(1, 2).flatten(2))
        return y_BLW


def _attend_explicitly(q_BHSE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, scale: float) -> Tensor:
    """Causal attention as two batched products and a softmax; slots beyond the query are masked."""
    q_XSE, k_XSE, v_XSE = (t.flatten(0, 1) for t in (q_BHSE, k_BHSE, v_BHSE))  # X = B * H
    slots = q_XSE.shape[1]
    mask_SS = torch.full((slots, slots), -math.inf, dtype=q_XSE.dtype, device=q_XSE.device).triu(1)
    weight_XSS = torch.baddbmm(mask_SS, q_XSE, k_XSE.transpose(1, 2), alpha=scale).softmax(dim=-1)
    return torch.bmm(weight_XSS, v_XSE).view(q_BHSE.shape)


def _attend_one_query(q_BH1E: Tensor, scale: float, cache: LayerCache, run: SlotRun) -> Tensor:
    """Attention of one query per head on a CPU, which is bound by reading the cache.

    The fused kernel is made for many queries, but it is one call: in float32 it is the faster one for small batches,
    and two batched products for large ones; in bfloat16 they read five times as fast. From memory rather than a core's
    cache they reach a third of its speed; there the keys come in pages, and the weighted sum of values is a bag of
    embeddings, whose kernel prefetches.
    """
    if run.rows is None:
        k_BHSE, v_BHSE = cache.seen_keys(run.end).to(q_BH1E.dtype), cache.values.narrow(2, 0, run.end).to(q_BH1E.dtype)
        attend = _fused if _prefers_fused(q_BH1E, cache, run.end) else _two_products
        return attend(q_BH1E, k_BHSE, v_BHSE, scale)
    q_BH1E = scale * q_BH1E
    dtype = cache.values.dtype  # autocast's products have another, if the cache was allocated outside of it
    q_XE1 = q_BH1E.flatten(0, 1).transpose(1, 2).to(dtype)  # X = B * H
    logits = torch.cat([torch.bmm(page.flatten(0, 1), q_XE1) for page in cache.seen_pages(run.end)], dim=1)
    weight_XS = logits[:, : run.end, 0].softmax(dim=-1).to(dtype)
    y_XE = F.embedding_bag(
        run.rows, cache.values.flatten(0, 2), run.offsets, mode="sum", per_sample_weights=weight_XS.flatten()
    )
    return y_XE.view(q_BH1E.shape).to(q_BH1E.dtype)


def _fused(q_BH1E: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q_BH1E, k_BHSE, v_BHSE, scale=scale)


def _two_products(q_BH1E: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, scale: float) -> Tensor:
    return torch.matmul(torch.matmul(scale * q_BH1E, k_BHSE.transpose(-1, -2)).softmax(dim=-1), v_BHSE)


def _prefers_fused(q_BH1E: Tensor, cache: LayerCache, end: int) -> bool:
    """Whether the fused kernel was measured to be the faster one on this machine."""
    if torch.compiler.is_compiling() or not q_BH1E.dtype == cache.values.dtype == torch.float32:
        return False
    if q_BH1E.numel() * end < _MIN_READ:
        return True
    batch, heads, slots, size = cache.values.shape
    shape = (batch, heads, slots, size, min(rounded_up(end), slots))
    return fastest("attention-step", shape, partial(_step_ways, shape)) != _PRODUCTS


def _step_ways(shape: tuple[int, int, int, int, int]) -> Mapping[str, Way]:
    *sizes, end = shape
    rng = torch.Generator().manual_seed(0)
    k_BHSE, v_BHSE = (torch.randn(sizes, generator=rng)[:, :, :end] for _ in range(2))
    q_BH1E, scale = k_BHSE[:, :, -1:].contiguous(), sizes[-1] ** -0.5
    return {
        PLAIN: lambda: _fused(q_BH1E, k_BHSE, v_BHSE, scale),
        _PRODUCTS: lambda: _two_products(q_BH1E, k_BHSE, v_BHSE, scale),
    }


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
        self.mlp = nn.Sequential(Linear(width, hidden), nn.GELU(), Linear(hidden, width))

    def forward(self, x_BSW: Tensor, table: Tensor | None, temperature: Temperature = 1.0) -> Tensor:
        """All slots in parallel; arguments as in :meth:`CausalAttention.forward`."""
        x_BSW = x_BSW + self.attention(self.attention_norm(x_BSW), table, temperature)
        return x_BSW + self.mlp(self.mlp_norm(x_BSW))

    def extend(
        self, x_BLW: Tensor, table: Tensor | None, cache: LayerCache, run: SlotRun, temperature: Temperature = 1.0
    ) -> Tensor:
        """A run of slots; arguments as in :meth:`CausalAttention.extend`."""
        x_BLW = x_BLW + self.attention.extend(self.attention_norm(x_BLW), table, cache, run, temperature)
        return x_BLW + self.mlp(self.mlp_norm(x_BLW))

    def step(
        self,
        x_B1W: Tensor,
        table: Tensor | None,
        cache: LayerCache,
        slot: Tensor,
        seen_S: Tensor,
        temperature: Temperature = 1.0,
    ) -> Tensor:
        """One slot, static shapes; arguments as in :meth:`CausalAttention.step`."""
        x_B1W = x_B1W + self.attention.step(self.attention_norm(x_B1W), table, cache, slot, seen_S, temperature)
        return x_B1W + self.mlp(self.mlp_norm(x_B1W))
