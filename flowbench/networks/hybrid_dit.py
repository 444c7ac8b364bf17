"""Diffusion transformer for sequences of images.

Shape suffixes: T images, of all sequences one after the other, B sequences, N tokens (patches), D width.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from flowbench.networks.dit import DiT, DiTBlock
from flowbench.networks.hybrid_attention import Across, Decay, Entry, HybridAttention, Past, image_mixing

__all__ = ["HybridDiT", "Memory"]

Memory = tuple[Past, ...]
"""What every layer remembers of the images before; see :meth:`HybridDiT.empty_memory`."""


class HybridBlock(DiTBlock):
    """A block of :class:`~flowbench.networks.DiT` whose attention also looks at earlier images of the sequence."""

    attention: HybridAttention

    def forward(self, x_TND: Tensor, condition_TD: Tensor, group_size: int = 1) -> Tensor:
        """All images of sequences of ``group_size``; arguments as in :meth:`HybridAttention.forward`."""
        modulation = self.modulations(condition_TD)
        attended = self.attention(self.start(x_TND, modulation), condition_TD, group_size)
        return self.finish(x_TND, attended, modulation)

    def extend(self, x_BND: Tensor, condition_BD: Tensor, past: Past) -> tuple[Tensor, Entry]:
        """One image of each sequence; see :meth:`HybridAttention.extend`."""
        modulation = self.modulations(condition_BD)
        attended, entry = self.attention.extend(self.start(x_BND, modulation), condition_BD, past)
        return self.finish(x_BND, attended, modulation), entry


class HybridDiT(DiT):
    """DiT whose images form sequences: full attention within an image, gated linear attention to the images before.

    Every image of a sequence has its own time and label; patches have positions within their image, images none within
    their sequence. Without ``group_size`` each image is a sequence of its own. Training runs all images of a sequence
    in one pass; a sampler adds one image after the other to a memory of constant size.

    Starts with zero velocity; every block starts as the identity.

    Args:
        shape: (C, H, W).
        num_classes: number of labels, 1 to 1e6, or None for an unconditional network.
        width: token size, a multiple of 4, up to 65,536.
        depth: number of blocks, 1 to 1,000.
        num_heads: attention heads, >= 1; divides ``width``.
        patch_size: side of a square patch in pixels, >= 1; divides H and W.
        mlp_ratio: hidden size of the block's MLP over ``width``, in [1 / width, 1000].
        across: attention across images: "linear" to a gated state, the method; "full", one softmax over all earlier
            images too, whose memory grows with every image; "none".
        decay: how the state is read under "linear": "cumsum" decays it over the tokens of an image, "mean" alike for
            all of them; None is "cumsum".

    Raises:
        ValueError: ``shape`` is not (C, H, W), patch or heads do not divide, a size is out of range, or a decay is
            given to attention that has none.

    References:
        Hui et al. (2025), ARFlow, arXiv 2501.16085, section 3; Peebles and Xie (2022), DiT, arXiv 2212.09748.

    Example:
        >>> import torch
        >>> network = HybridDiT((1, 8, 8), num_classes=10, width=16, depth=1, num_heads=2)
        >>> x, label = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((6,), 3)
        >>> network(x, torch.linspace(0, 1, 6), label, group_size=3).shape  # two sequences of three images
        torch.Size([6, 1, 8, 8])
        >>> velocity, entries = network.extend(x[:2], torch.tensor(0.0), label[:2], network.empty_memory())
        >>> memory = network.remembered(network.empty_memory(), entries)  # of one image, for the next call
    """

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
        across: Across = "linear",
        decay: Decay | None = None,
    ) -> None:
        self.across = across
        self._mixing = image_mixing(across, decay)
        super().__init__(
            shape,
            num_classes,
            width=width,
            depth=depth,
            num_heads=num_heads,
            patch_size=patch_size,
            mlp_ratio=mlp_ratio,
        )

    def _block(self, width: int, num_heads: int, mlp_width: int) -> HybridBlock:
        return HybridBlock(width, HybridAttention(width, num_heads, self._mixing), mlp_width)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        condition: Tensor | None = None,
        end: Tensor | None = None,
        *,
        group_size: int = 1,
    ) -> Tensor:
        """The velocity of each image, given the earlier ones of its sequence.

        Args:
            x: states, the images of a sequence one after the other, shape (T, *shape).
            t: times in [0, 1] (0 = source, 1 = data), shape (T,) or a scalar for all; floating.
            label: labels in 0..num_classes, shape (T,), integer; index ``num_classes`` is the null label.
                None: the null label for every image.
            condition: none: this network has no condition on the grid of x.
            end: none: this network has one time.
            group_size: images of a sequence.

        Returns:
            Velocities, shape (T, *shape).

        Raises:
            ValueError: a shape or dtype does not fit, or T is no multiple of ``group_size``.
        """
        self._check(x, t, label)
        self._check_condition(x, condition)
        if end is not None:
            self._check_end(x, end)
        if group_size < 1 or len(x) % group_size:
            raise ValueError(f"group_size is {group_size}; give a divisor of the {len(x)} images")
        tokens, condition_TD = self._start(x, self.embedding(t.expand(len(x)), label))
        for block in self.blocks:
            tokens = block(tokens, condition_TD, group_size)
        return self._finish(tokens, condition_TD)

    def empty_memory(self) -> Memory:
        """The memory at the start of a sequence."""
        return tuple(() for _ in self.blocks)

    def extend(self, x: Tensor, t: Tensor, label: Tensor | None, memory: Memory) -> tuple[Tensor, tuple[Entry, ...]]:
        """The velocity of one image of each sequence, given the memory of those before.

        Args:
            x: states, shape (B, *shape).
            t: times, shape (B,) or a scalar.
            label: labels, shape (B,), or None, as in :meth:`forward`.
            memory: of as many sequences.

        Returns:
            Velocities, shape (B, *shape), and what :meth:`remembered` adds to the memory where this image is kept.
        """
        self._check(x, t, label)
        tokens, condition_BD = self._start(x, self.embedding(t.expand(len(x)), label))
        entries = []
        for block, past in zip(self._layers(), memory, strict=True):
            tokens, entry = block.extend(tokens, condition_BD, past)
            entries.append(entry)
        return self._finish(tokens, condition_BD), tuple(entries)

    def remembered(self, memory: Memory, entries: tuple[Entry, ...], window: int | None = None) -> Memory:
        """The memory with one more image.

        Args:
            memory: of the images before; it is not changed.
            entries: of :meth:`extend`.
            window: images that are kept, the last ones; None keeps all.
        """
        layers = zip(self._layers(), memory, entries, strict=True)
        return tuple(block.attention.mixing.remembered(past, entry, window) for block, past, entry in layers)

    def _layers(self) -> list[HybridBlock]:
        return cast("list[HybridBlock]", list(self.blocks))
