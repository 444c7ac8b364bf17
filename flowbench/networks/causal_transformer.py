"""The causal transformer of autoregressive flows.

Shape suffixes: B batch, N tokens, D token dimension, S slots (N, or N - 1 when token 0 is free), W width.
"""

from __future__ import annotations

from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowbench.core.autocast import active_autocast_dtype
from flowbench.core.checks import check_counts, check_scale
from flowbench.networks.attention import CausalBlock, LayerNorm, Temperature
from flowbench.networks.embedding import NoiseLevelEmbedding
from flowbench.networks.key_value_cache import KeyValueCache
from flowbench.networks.linear import Linear
from flowbench.networks.rotary import RotaryTable, follow_weights
from flowbench.networks.sizes import LARGEST_SIDE, check_layers
from flowbench.networks.tokens import check_sizes, embed_tokens, label_table

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
        num_tokens: sequence length N, 1 to 1e6.
        token_dim: token dimension D, 1 to 1e6.
        num_classes: number of classes, 1 to 1e6; the null label is index ``num_classes``. None: unconditional.
        width: channels W, a multiple of head_dim, up to 65,536.
        depth: number of transformer blocks, 1 to 1,000.
        head_dim: channels of one head (even; a multiple of 4 with ``grid``).
        mlp_ratio: hidden channels of the MLPs over W, in [1 / W, 1000].
        position: "rope" (rotary) or "learned" (a table added to the embedded tokens).
        grid: (rows, columns) of the token grid with rows * columns = N, for 2-D rotary positions; None: 1-D.
        start: "learned" or "zero", see above.
        final_norm: normalise before the output layer.
        extent: side length in [1e-12, 1e12] that the grid's rotary positions span
            (:func:`~flowbench.networks.rotary.grid_positions`);
            None: one unit per cell.
        checkpoint_every: activation checkpointing of every n-th transformer block in training: its activations are
            computed again in the backward pass. 0: off, 1: all blocks; up to 1,000.
        noise_conditioned: the network is told the noise level of each sequence: an embedding of its logarithm is added
            to every token, and every call wants ``level``.

    Attributes:
        num_slots: one-token evaluations that a sequential pass needs, N or N - 1.

    Raises:
        ValueError: for sizes that do not fit together.

    Example:
        >>> network = CausalTransformer(num_tokens=4, token_dim=2, width=8, depth=1, head_dim=4)
        >>> x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
        >>> network(x).shape  # a mean and a raw scale for each of the 2 numbers of a token
        torch.Size([3, 4, 4])
        >>> network.step(x[:, 0], 1, network.allocate_cache(batch_size=3)).shape  # token 1, given token 0
        torch.Size([3, 4])
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
        position: Literal["rope", "learned"] = "rope",
        grid: tuple[int, int] | None = None,
        start: Literal["learned", "zero"] = "learned",
        final_norm: bool = False,
        extent: float | None = None,
        checkpoint_every: int = 0,
        noise_conditioned: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(num_tokens, token_dim, num_classes, width, depth, head_dim, mlp_ratio)
        _check_position(num_tokens, position, grid, extent, start)
        check_layers("checkpoint_every", checkpoint_every, at_least=0, hint="0 is off")
        self.num_tokens, self.token_dim, self.num_classes = num_tokens, token_dim, num_classes
        self.head_dim, self.start, self.checkpoint_every = head_dim, start, checkpoint_every
        first_slot = 0 if start == "learned" else 1
        self.num_slots = num_tokens - first_slot
        self.embed = Linear(token_dim, width)
        if start == "learned":
            self.start_token = nn.Parameter(0.02 * torch.randn(token_dim))
        self.label_embedding = label_table(num_classes, width, std=0.02)
        self.level_embedding = NoiseLevelEmbedding(width) if noise_conditioned else None
        self.position_embedding = (
            nn.Parameter(0.02 * torch.randn(self.num_slots, width)) if position == "learned" else None
        )
        self.rotary = RotaryTable(num_tokens, head_dim, grid, extent, first_slot) if position == "rope" else None
        self.register_load_state_dict_post_hook(follow_weights)
        self.blocks = nn.ModuleList(CausalBlock(width, head_dim, mlp_ratio) for _ in range(depth))
        self.final_norm = LayerNorm(width) if final_norm else nn.Identity()
        self.out = Linear(width, 2 * token_dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        x_BND: Tensor,
        label: Tensor | None = None,
        *,
        temperature: Temperature = 1.0,
        level: Tensor | None = None,
    ) -> Tensor:
        """Parameters of every token in one parallel pass.

        Args:
            x_BND: tokens in generation order, shape (B, N, D).
            label: classes in 0..num_classes (num_classes = null), int64, shape (B,); None = null for all.
            temperature: divides the attention logits; one number > 0, or one per sequence, shape (B,).
            level: noise level of each sequence, above 0, shape (B,), for a network that is told; else None.

        Returns:
            Parameters of shape (B, N, 2 D); row i depends on rows 0..i-1 of ``x_BND`` only.

        Raises:
            ValueError: for another shape, a label given to an unconditional network, a noise level that is missing or
                not wanted, or a temperature that is not positive (a tensor's values are not looked at: that would wait
                for the device).
        """
        if x_BND.shape[1:] != (self.num_tokens, self.token_dim):
            raise ValueError(
                f"tokens must have shape (B, {self.num_tokens}, {self.token_dim}), got {tuple(x_BND.shape)}"
            )
        _check_temperature(temperature, len(x_BND))
        x_BSD = x_BND[:, :-1]
        if self.start == "learned":
            start_B1D = self.start_token.to(x_BSD.dtype).expand(len(x_BSD), 1, -1)
            x_BSD = torch.cat([start_B1D, x_BSD], dim=1)
        h_BSW = self._embed(x_BSD, label, self.position_embedding, level)
        every = self.checkpoint_every if self.training and torch.is_grad_enabled() else 0
        for index, block in enumerate(self.blocks):
            if every and index % every == 0:
                # Nothing in a block is random, so there is no generator to restore.
                h_BSW = checkpoint(block, h_BSW, self.table, temperature, use_reentrant=False, preserve_rng_state=False)
            else:
                h_BSW = block(h_BSW, self.table, temperature)
        params_BSP = self.out(self.final_norm(h_BSW))
        return F.pad(params_BSP, (0, 0, self.num_tokens - self.num_slots, 0))

    def allocate_cache(self, batch_size: int, *, static: bool = False) -> KeyValueCache:
        """An empty cache for one sequential pass over ``batch_size`` sequences.

        It lies on the network's device, in the network's dtype (autocast's, where that is on), and holds
        2 * depth * slots * width numbers per sequence.

        Args:
            batch_size: number of sequences.
            static: for :meth:`step` with a tensor position on a CPU; elsewhere there is one layout.
        """
        weight = self.embed.weight
        dtype = weight.dtype
        if dtype != torch.float64:  # which autocast leaves alone
            dtype = active_autocast_dtype(weight.device) or dtype
        num_heads = self.embed.out_features // self.head_dim
        shape = (batch_size, num_heads, self.num_slots, self.head_dim)
        return KeyValueCache.allocate(weight, dtype, len(self.blocks), shape, static)

    @torch.no_grad()
    def extend(
        self,
        previous_BLD: Tensor,
        start: int,
        cache: KeyValueCache,
        label: Tensor | None = None,
        *,
        temperature: Temperature = 1.0,
        level: Tensor | None = None,
    ) -> Tensor:
        """Parameters of the tokens ``start`` .. ``start + L - 1``, computed in parallel.

        The cache must hold the slots of the tokens before. It may be called again for the same start with other
        tokens, as Jacobi iteration does: the rows are overwritten. It builds no autograd graph.

        Args:
            previous_BLD: the tokens ``start - 1`` .. ``start + L - 2``, shape (B, L, D). With ``start`` 0 the first
                one is ignored: slot 0 has a start of its own.
            start: index of the first token to predict.
            cache: from :meth:`allocate_cache`, for the same B; written in place.
            label: as in :meth:`forward`.
            temperature: as in :meth:`forward`; the same for all calls that share a cache.
            level: as in :meth:`forward`; the same for all calls that share a cache.

        Returns:
            Rows ``start`` .. ``start + L - 1`` of what :meth:`forward` returns, shape (B, L, 2 D).

        Raises:
            ValueError: for another shape, tokens beyond the end, or as :meth:`forward`.
        """
        self._check_run(previous_BLD, start, cache, temperature)
        no_slot = self.num_tokens - self.num_slots if start == 0 else 0
        token_BLD = previous_BLD[:, no_slot:]
        if start == 0 and self.start == "learned":
            start_B1D = self.start_token.to(token_BLD.dtype).expand(len(token_BLD), 1, -1)
            token_BLD = torch.cat([start_B1D, token_BLD[:, 1:]], dim=1)
        first = start + no_slot - (self.num_tokens - self.num_slots)
        if token_BLD.shape[1] == 0:
            return self.out.weight.new_zeros(len(token_BLD), 1, 2 * self.token_dim)
        here = slice(first, first + token_BLD.shape[1])
        position = None if self.position_embedding is None else self.position_embedding[here]
        table = self.table
        table = None if table is None else table[:, here]
        h_BLW = self._embed(token_BLD, label, position, level)
        run = cache.run(first, token_BLD.shape[1])
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            h_BLW = cast(CausalBlock, block).extend(h_BLW, table, layer, run, temperature)
        params_BLP = self.out(self.final_norm(h_BLW))
        return F.pad(params_BLP, (0, 0, no_slot, 0)) if no_slot else params_BLP

    @torch.no_grad()
    def step(
        self,
        previous_BD: Tensor | None,
        position: int | Tensor,
        cache: KeyValueCache,
        label: Tensor | None = None,
        *,
        temperature: Temperature = 1.0,
        level: Tensor | None = None,
    ) -> Tensor:
        """Parameters of one token, given the one before it; builds no autograd graph.

        Two forms of equal result. An int ``position`` attends to the seen slots only, which is the fast way where
        operations are launched one by one. A tensor attends to all slots under a mask: every shape is static and
        nothing waits for the host, so that ``torch.compile(fullgraph=True)`` and CUDA graphs record it once for all
        positions. That form wants a cache without NaN in slots not seen yet, such as a new one.

        Args:
            previous_BD: token ``position - 1``, shape (B, D); ignored at position 0, where None may be given with an
                int position.
            position: index of the token to predict; an int, or an int64 tensor of shape () on the network's device.
            cache: from :meth:`allocate_cache`, for the same B; written in place.
            label: as in :meth:`forward`.
            temperature: as in :meth:`forward`; the same for all calls that share a cache.
            level: as in :meth:`forward`; the same for all calls that share a cache.

        Returns:
            Row ``position`` of what :meth:`forward` returns, shape (B, 2 D).

        Raises:
            ValueError: if the previous token is missing, or as :meth:`extend`.
        """
        if previous_BD is None:
            if isinstance(position, Tensor) or position != 0:
                raise ValueError(f"previous token missing at position {position}; only an int 0 can do without")
            previous_BD = self.embed.weight.new_zeros(cache.batch_size, self.token_dim)
        if isinstance(position, Tensor):
            return self._static_step(previous_BD, position, cache, label, temperature, level)
        return self.extend(previous_BD[:, None], position, cache, label, temperature=temperature, level=level)[:, 0]

    def _static_step(
        self,
        previous_BD: Tensor,
        position: Tensor,
        cache: KeyValueCache,
        label: Tensor | None,
        temperature: Temperature,
        level: Tensor | None,
    ) -> Tensor:
        _check_temperature(temperature, len(previous_BD))
        if len(cache.layers[0].pages) > 1:
            raise ValueError("a tensor position needs a static cache; allocate it with allocate_cache(B, static=True)")
        is_first = position == 0
        if self.start == "learned":
            previous_BD = torch.where(is_first, self.start_token.to(previous_BD.dtype), previous_BD)
        # Without a slot for position 0, slot 0 is written there for nothing, and again before it is first read.
        slot = (position - (self.num_tokens - self.num_slots)).clamp(min=0)[None]
        embedding = None if self.position_embedding is None else self.position_embedding.index_select(0, slot)
        table = self.table
        table = None if table is None else table.index_select(1, slot)
        seen_S = torch.arange(self.num_slots, device=slot.device) <= slot
        h_B1W = self._embed(previous_BD[:, None], label, embedding, level)
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            h_B1W = cast(CausalBlock, block).step(h_B1W, table, layer, slot, seen_S, temperature)
        params_BP = self.out(self.final_norm(h_B1W))[:, 0]
        return params_BP if self.start == "learned" else params_BP.masked_fill(is_first, 0)

    @property
    def table(self) -> Tensor | None:
        """Rotary table of the slots, shape (2, S, E / 2); None with learned positions."""
        return None if self.rotary is None else self.rotary.table

    def _embed(self, x_BSD: Tensor, label: Tensor | None, position_SW: Tensor | None, level: Tensor | None) -> Tensor:
        h_BSW = embed_tokens(self.embed, x_BSD, position_SW, self.label_embedding, label)
        if self.level_embedding is None:
            if level is not None:
                raise ValueError("a noise level given to a network that takes none; build it with noise_conditioned")
            return h_BSW
        if level is None or level.shape != x_BSD.shape[:1]:
            found = "none" if level is None else f"shape {tuple(level.shape)}"
            raise ValueError(f"level must hold a noise level for each of {len(x_BSD)} sequences, got {found}")
        # In the stream's dtype: under autocast the embedding's is another.
        return h_BSW + self.level_embedding(level)[:, None].to(h_BSW.dtype)

    def _check_run(self, previous_BLD: Tensor, start: int, cache: KeyValueCache, temperature: Temperature) -> None:
        batch = cache.batch_size
        if previous_BLD.ndim != 3 or previous_BLD.shape[::2] != (batch, self.token_dim):
            expected = f"({batch}, L, {self.token_dim})"
            raise ValueError(f"previous tokens must have shape {expected}, got {tuple(previous_BLD.shape)}")
        length = previous_BLD.shape[1]
        if not (length >= 1 and 0 <= start <= self.num_tokens - length):
            raise ValueError(f"tokens {start} to {start + length - 1} are not within 0 to {self.num_tokens - 1}")
        _check_temperature(temperature, batch)


def _check_temperature(temperature: Temperature, batch: int) -> None:
    if isinstance(temperature, Tensor):
        if temperature.shape != (batch,):
            raise ValueError(f"temperature must be one number or have shape ({batch},), got {tuple(temperature.shape)}")
    else:
        check_scale("temperature", temperature, hint="1 is none")


def _check_position(
    num_tokens: int, position: str, grid: tuple[int, int] | None, extent: float | None, start: str
) -> None:
    if position not in ("rope", "learned"):
        raise ValueError(f"position must be 'rope' or 'learned', got {position!r}")
    if start not in ("learned", "zero"):
        raise ValueError(f"start must be 'learned' or 'zero', got {start!r}")
    if grid is not None and position != "rope":
        raise ValueError(f"grid {grid} needs position='rope'; a learned table takes no grid")
    if grid is not None:
        check_counts("grid", grid, length=2, at_most=LARGEST_SIDE)
    if grid is not None and grid[0] * grid[1] != num_tokens:
        raise ValueError(f"grid must have num_tokens {num_tokens} cells, got {grid[0]} x {grid[1]}")
    check_scale("extent", extent, or_none=True)
    if extent is not None and grid is None:
        raise ValueError(f"extent {extent} rescales a grid of tokens; give grid, or leave extent out")
