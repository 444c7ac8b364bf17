"""Diffusion transformer for images.

Shape suffixes: B batch, N tokens (patches), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from flowbench.core.checks import check_count
from flowbench.networks.blocks import SelfAttention, zeroed
from flowbench.networks.embedding import grid_features
from flowbench.networks.sizes import check_layers, check_mlp_ratio, check_width
from flowbench.networks.velocity import VelocityNetwork

__all__ = ["DiT"]


def _modulate(x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    return torch.addcmul(shift_B1D, x_BND, 1 + scale_B1D)


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def _xavier(part: nn.Module) -> None:
    for layer in part.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class DiTBlock(nn.Module):
    """Attention and MLP branches, each shifted, scaled and gated by the conditioning (adaLN-Zero).

    Args:
        width: token size D.
        attention: attention over the tokens, (B, N, D) -> (B, N, D).
        mlp_width: hidden size of the MLP.
    """

    def __init__(self, width: int, attention: nn.Module, mlp_width: int) -> None:
        super().__init__()
        self.norm_attention = _norm(width)
        self.attention = attention
        self.norm_mlp = _norm(width)
        self.mlp_in = nn.Linear(width, mlp_width)
        self.mlp_out = nn.Linear(mlp_width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x_BND: Tensor, condition_BD: Tensor) -> Tensor:
        """Tokens (B, N, D) and activated conditioning (B, D) -> tokens (B, N, D)."""
        modulation = self.modulations(condition_BD)
        return self.finish(x_BND, self.attention(self.start(x_BND, modulation)), modulation)

    def modulations(self, condition_BD: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the attention, then of the MLP, each (B, 1, D)."""
        return self.modulation(condition_BD)[:, None].chunk(6, dim=-1)

    def start(self, x_BND: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """What attention is given."""
        shift, scale, *_ = modulation
        return _modulate(self.norm_attention(x_BND), shift, scale)

    def finish(self, x_BND: Tensor, attended_BND: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Tokens with what attention gives, through the MLP."""
        _, _, gate_attention, shift, scale, gate = modulation
        x_BND = torch.addcmul(x_BND, gate_attention, attended_BND)
        hidden = self.mlp_in(_modulate(self.norm_mlp(x_BND), shift, scale))
        return torch.addcmul(x_BND, gate, self.mlp_out(gelu(hidden, approximate="tanh")))


class DiT(VelocityNetwork):
    """Transformer over image patches with adaLN-Zero conditioning and fixed sine-cosine positions.

    Starts with zero velocity; every block starts as the identity.

    Args:
        shape: (C, H, W).
        num_classes: number of labels, 1 to 1e6, or None for an unconditional network.
        width: token size, a multiple of 4, up to 65,536.
        depth: number of blocks, 1 to 1,000.
        num_heads: attention heads, >= 1; divides ``width``.
        patch_size: side of a square patch in pixels, >= 1; divides H and W.
        mlp_ratio: hidden size of the block's MLP over ``width``, in [1 / width, 1000].
        condition_channels: channels of a condition on the grid of x, which widen the first layer alone; 0: none.
        second_time: take the end of a jump beside its start; see :meth:`VelocityNetwork.forward`.

    Raises:
        ValueError: ``shape`` is not (C, H, W), patch or heads do not divide, or a size is out of range.

    References:
        Peebles and Xie (2022), "Scalable Diffusion Models with Transformers", arXiv:2212.09748, section 3.2.

    Example:
        >>> network = DiT((1, 8, 8), num_classes=10, width=16, depth=1, num_heads=2)
        >>> x, label = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 7, 10])
        >>> velocity = network(x, t=torch.tensor(0.5), label=label)  # 10 is the null label
        >>> velocity.shape, bool((velocity == 0).all())
        (torch.Size([3, 1, 8, 8]), True)
    """

    end_layers = VelocityNetwork.end_layers | {"input", "modulation", "output"}
    positions: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int | None,
        *,
        width: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        condition_channels: int = 0,
        second_time: bool = False,
    ) -> None:
        check_width("width", width)
        check_layers("depth", depth)
        check_count("num_heads", num_heads, at_most=width, hint=f"it must divide the width {width}")
        check_mlp_ratio(mlp_ratio, width)
        super().__init__(
            shape,
            num_classes,
            embedding_width=width,
            condition_channels=condition_channels,
            second_time=second_time,
        )
        if len(self.shape) != 3:
            raise ValueError(f"shape is {self.shape}; DiT takes images (C, H, W), use MLP for vectors")
        channels, height, image_width = self.shape
        check_count("patch_size", patch_size, at_most=min(height, image_width))
        if height % patch_size or image_width % patch_size:
            raise ValueError(f"patch_size is {patch_size}; give a divisor of H = {height} and W = {image_width}")
        self.patch_size = patch_size
        self.grid = (height // patch_size, image_width // patch_size)
        patch_dim = channels * patch_size**2
        self.input = nn.Linear(self.input_channels * patch_size**2, width)
        self.blocks = nn.ModuleList(self._block(width, num_heads, int(mlp_ratio * width)) for _ in range(depth))
        self.norm = _norm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, patch_dim)
        # Not persistent: the table follows from the sizes, so checkpoints need not hold it.
        self.register_buffer("positions", grid_features(*self.grid, width).to(self.input.weight), persistent=False)
        self._initialise()

    def _block(self, width: int, num_heads: int, mlp_width: int) -> DiTBlock:
        """One block; the layers are initialised afterwards."""
        return DiTBlock(width, SelfAttention(width, num_heads), mlp_width)

    def _initialise(self) -> None:
        # The layers of the time draw here too, before the embedding draws them anew: so the draws keep their order.
        for part in (self.embedding.time, self.input, self.blocks, self.modulation, self.output):
            _xavier(part)
        self.embedding.initialise_time()
        for block in self.blocks:
            zeroed(block.get_submodule("modulation"))
        zeroed(self.modulation)
        zeroed(self.output)

    def velocity(self, x: Tensor, embedding: Tensor) -> Tensor:
        """See :meth:`VelocityNetwork.velocity`."""
        return self.read_out(self.features(x, embedding))

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Tokens and their width."""
        return (self.grid[0] * self.grid[1], self.output.in_features)

    def features(self, x: Tensor, embedding: Tensor) -> Tensor:
        """See :meth:`VelocityNetwork.features`."""
        x_BND, condition_BD = self._start(x, embedding)
        for block in self.blocks:
            x_BND = block(x_BND, condition_BD)
        return self._last(x_BND, condition_BD)

    def read_out(self, features: Tensor) -> Tensor:
        """See :meth:`VelocityNetwork.read_out`."""
        return self.unpatchify(self.output(features))

    def _start(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D) and activated conditioning (B, D)."""
        return self.input(self.patchify(x)) + self.positions, silu(embedding)

    def _last(self, x_BND: Tensor, condition_BD: Tensor) -> Tensor:
        """Tokens as the last layer reads them."""
        shift, scale = self.modulation(condition_BD)[:, None].chunk(2, dim=-1)
        return _modulate(self.norm(x_BND), shift, scale)

    def _finish(self, x_BND: Tensor, condition_BD: Tensor) -> Tensor:
        return self.read_out(self._last(x_BND, condition_BD))

    def patchify(self, x: Tensor) -> Tensor:
        """Cut images (B, C, H, W) into row-major patches (B, N, C * patch_size**2)."""
        (rows, columns), size, channels = self.grid, self.patch_size, x.shape[1]
        patches = x.reshape(-1, channels, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(-1, rows * columns, channels * size**2)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Join patches (B, N, C * patch_size**2) to images (B, C, H, W); the inverse of :meth:`patchify`."""
        (rows, columns), size, channels = self.grid, self.patch_size, self.shape[0]
        grid = patches.reshape(-1, rows, columns, channels, size, size).permute(0, 3, 1, 4, 2, 5)
        return grid.reshape(-1, *self.shape)
