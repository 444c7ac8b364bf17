"""What transformers over tokens share: their sizes, and the way from tokens and labels into the residual stream.

Shape suffixes: B batch, N tokens, D token dimension, W width.
"""

from __future__ import annotations

from torch import Tensor, nn

from flowbench.core.checks import check_count
from flowbench.networks.sizes import LARGEST_SIDE, check_classes, check_layers, check_mlp_ratio, check_width

__all__ = ["check_sizes", "embed_tokens", "label_table"]


def check_sizes(
    num_tokens: int,
    token_dim: int,
    num_classes: int | None,
    width: int,
    depth: int,
    head_dim: int,
    mlp_ratio: float,
) -> None:
    """Raise ValueError for sizes that make no transformer; the arguments are those of the networks."""
    check_count("num_tokens", num_tokens, at_most=LARGEST_SIDE)
    check_count("token_dim", token_dim, at_most=LARGEST_SIDE)
    check_classes(num_classes)
    check_width("width", width)
    check_layers("depth", depth)
    check_width("head_dim", head_dim)
    if width % head_dim:
        raise ValueError(f"width must be a multiple of head_dim {head_dim}, got {width}")
    check_mlp_ratio(mlp_ratio, width)


def label_table(num_classes: int | None, width: int, std: float) -> nn.Embedding | None:
    """A row for each class and, the last, for the null label; None for an unconditional network."""
    if num_classes is None:
        return None
    table = nn.Embedding(num_classes + 1, width)
    nn.init.normal_(table.weight, std=std)
    return table


def embed_tokens(
    layer: nn.Linear, x_BND: Tensor, position_NW: Tensor | None, labels: nn.Embedding | None, label: Tensor | None
) -> Tensor:
    """Tokens, positions and labels summed, in the dtype of the parameters.

    Tokens come in the flow's precision, and autocast multiplies in another one: the residual stream has neither.

    Args:
        layer: token dimension D to width W.
        x_BND: tokens, shape (B, N, D).
        position_NW: added to every sample, shape (N, W), or None.
        labels: of :func:`label_table`.
        label: classes, int64, shape (B,); None = null for all.

    Returns:
        Residual stream, shape (B, N, W).

    Raises:
        ValueError: for labels of another shape, or given to an unconditional network.
    """
    dtype = layer.weight.dtype
    h_BNW: Tensor = layer(x_BND.to(dtype)).to(dtype)
    if position_NW is not None:
        h_BNW = h_BNW + position_NW
    if labels is None:
        if label is not None:
            raise ValueError("label given to an unconditional network; build it with num_classes")
        return h_BNW
    if label is None:
        return h_BNW + labels.weight[-1]
    if label.shape != x_BND.shape[:1]:
        raise ValueError(f"label must have shape ({len(x_BND)},), got {tuple(label.shape)}")
    return h_BNW + labels(label)[:, None]
