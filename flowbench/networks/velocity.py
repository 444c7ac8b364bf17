"""The contract of every velocity network."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from flowbench.networks.embedding import TimeLabelEmbedding

__all__ = ["VelocityNetwork"]


class VelocityNetwork(nn.Module, ABC):
    """A network v(x, t, label) shaped like x: checks its inputs, embeds time and label, calls ``velocity``.

    Args:
        shape: shape of one sample, (d,) or (C, H, W).
        num_classes: number of labels, or None for an unconditional network.
        embedding_width: size of the conditioning vector that ``velocity`` receives.

    Raises:
        ValueError: a size in ``shape``, ``num_classes`` or ``embedding_width`` is not positive.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int | None, *, embedding_width: int) -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)
        self.num_classes = num_classes
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape is {self.shape}; give the positive sizes of one sample, (d,) or (C, H, W)")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; give at least 1, or None for an unconditional network")
        if embedding_width < 1:
            raise ValueError(f"the width of {type(self).__name__} is {embedding_width}; give a positive number")
        self.embedding = TimeLabelEmbedding(embedding_width, num_classes)

    @abstractmethod
    def velocity(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The velocity at checked inputs.

        Args:
            x: states, shape (B, *shape).
            embedding: conditioning vectors, shape (B, embedding_width).

        Returns:
            Velocities, shape (B, *shape).
        """

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The velocity of each sample.

        Args:
            x: states, shape (B, *shape).
            t: times in [0, 1] (0 = source, 1 = data), shape (B,) or a scalar for the whole batch; floating.
            label: labels in 0..num_classes, shape (B,), integer; index ``num_classes`` is the null label.
                None: the null label for every sample.

        Returns:
            Velocities, shape (B, *shape).

        Raises:
            ValueError: a shape or dtype does not fit, or labels were given to an unconditional network.
        """
        self._check(x, t, label)
        return self.velocity(x, self.embedding(t.expand(x.shape[0]), label))

    def _check(self, x: Tensor, t: Tensor, label: Tensor | None) -> None:
        name, batch = type(self).__name__, tuple(x.shape[:1])
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}; this {name} was built for (B, *{self.shape})")
        if t.ndim and tuple(t.shape) != batch:
            raise ValueError(f"t has shape {tuple(t.shape)}; give a scalar or shape {batch}, one time per sample")
        if not t.is_floating_point():
            raise ValueError(f"t has dtype {t.dtype}; give a floating tensor of times in [0, 1]")
        if label is None:
            return
        if self.num_classes is None:
            raise ValueError(f"label was given to an unconditional {name}; build it with num_classes or pass None")
        if tuple(label.shape) != batch:
            raise ValueError(f"label has shape {tuple(label.shape)}; give shape {batch}, one label per sample")
        if label.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"label has dtype {label.dtype}; give int64 labels in 0..{self.num_classes}")
