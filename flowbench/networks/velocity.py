"""The contract of every velocity network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from flowbench.core.checks import check_count
from flowbench.networks.embedding import TimeLabelEmbedding
from flowbench.networks.sizes import MOST_CHANNELS, check_classes, check_shape

__all__ = ["VelocityNetwork"]


class VelocityNetwork(nn.Module, ABC):
    """A network v(x, t, label) shaped like x: checks its inputs, embeds time and label, calls ``velocity``.

    A condition that lies on the grid of x, say a masked image or a semantic map, joins x as further input channels
    (Dao et al., 2023, arXiv:2307.08698; Rombach et al., 2022, arXiv:2112.10752, section 3.3).

    Args:
        shape: shape of one sample, (d,) or (C, H, W), of sizes up to 1e6.
        num_classes: number of labels, 1 to 1e6, or None for an unconditional network.
        embedding_width: size of the conditioning vector that ``velocity`` receives, 1 to 262,144.
        condition_channels: channels of the condition on the grid of x, 0 to 65,536; 0: there is none.
        second_time: take the end of a jump beside its start, for average velocities; see :meth:`forward`.

    Raises:
        ValueError: a size is out of range.

    Example:
        >>> class Shrink(VelocityNetwork):
        ...     def velocity(self, x, embedding):
        ...         return -x
        >>> network = Shrink((2,), num_classes=10, embedding_width=8)
        >>> network(torch.ones(1, 2), t=torch.tensor(0.5), label=torch.tensor([3]))
        tensor([[-1., -1.]])
    """

    end_layers: ClassVar[frozenset[str]] = frozenset({"embedding"})
    """Layers that join the network to data, times and labels; rules for matrices leave them to AdamW."""

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int | None,
        *,
        embedding_width: int,
        condition_channels: int = 0,
        second_time: bool = False,
    ) -> None:
        super().__init__()
        check_shape(shape)
        check_classes(num_classes)
        check_count("embedding_width", embedding_width, at_most=4 * MOST_CHANNELS)
        check_count("condition_channels", condition_channels, at_least=0, at_most=MOST_CHANNELS, hint="0 is none")
        self.shape = tuple(int(size) for size in shape)
        self.num_classes = num_classes
        self.condition_channels = condition_channels
        self.second_time = second_time
        self.embedding = TimeLabelEmbedding(embedding_width, num_classes, second_time=second_time)

    @property
    def input_channels(self) -> int:
        """Channels (or coordinates) of what :meth:`velocity` is given: those of x, then those of the condition."""
        return self.shape[0] + self.condition_channels

    def null_condition(self, x: Tensor) -> Tensor | None:
        """The null condition, zeros (B, condition_channels, *grid); None for a network without one."""
        if not self.condition_channels:
            return None
        return x.new_zeros((len(x), self.condition_channels, *self.shape[1:]))

    @abstractmethod
    def velocity(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The velocity at checked inputs.

        Args:
            x: states followed by the condition's channels, shape (B, input_channels, *shape[1:]).
            embedding: conditioning vectors, shape (B, embedding_width).

        Returns:
            Velocities, shape (B, *shape).
        """

    @property
    def feature_shape(self) -> tuple[int, ...] | None:
        """Shape of one sample's :meth:`features`; None for a network that gives none."""
        return None

    def features(self, x: Tensor, embedding: Tensor) -> Tensor:
        """What the last layer makes velocities of, for heads that read it too: with :meth:`read_out` it is `velocity`.

        Args:
            x: as :meth:`velocity` takes them.
            embedding: likewise.

        Returns:
            Shape (B, *feature_shape).

        Raises:
            ValueError: by a network that gives none.
        """
        raise self._without_features()

    def read_out(self, features: Tensor) -> Tensor:
        """Velocities (B, *shape) of features (B, *feature_shape): the last layer.

        Raises:
            ValueError: by a network that gives none.
        """
        raise self._without_features()

    def _without_features(self) -> ValueError:
        return ValueError(f"{type(self).__name__} gives no features of its last layer: take MLP, DiT or UNet")

    def with_features(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        condition: Tensor | None = None,
        end: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Velocities (B, *shape) and the features (B, *feature_shape) that they are made of, by one evaluation.

        The arguments and errors are those of :meth:`forward`.

        Raises:
            ValueError: by a network that gives no features.
        """
        features = self.features(*self._prepared(x, t, label, condition, end))
        return self.read_out(features), features

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        condition: Tensor | None = None,
        end: Tensor | None = None,
    ) -> Tensor:
        """The velocity of each sample.

        A network with a second time gives the average velocity between the times `t` and `end`; it starts as one that
        does not look at the second, and with the weights of a network without it.

        Args:
            x: states, shape (B, *shape).
            t: times in [0, 1] (0 = source, 1 = data), shape (B,) or a scalar for the whole batch; floating.
            label: labels in 0..num_classes, shape (B,), integer; index ``num_classes`` is the null label.
                None: the null label for every sample.
            condition: on the grid of x, shape (B, condition_channels, *shape[1:]), floating; needed where the
                network was built with condition_channels. Zeros are the null condition.
            end: times in [0, 1] where the jumps from t end, before t or after it, shape (B,) or a scalar; floating; for
                a network built with second_time. None is t itself: the velocity at one time.

        Returns:
            Velocities, shape (B, *shape).

        Raises:
            ValueError: a shape or dtype does not fit, labels, a condition or an end were given to a network without
                them, or its condition is missing.
        """
        return self.velocity(*self._prepared(x, t, label, condition, end))

    def _prepared(
        self, x: Tensor, t: Tensor, label: Tensor | None, condition: Tensor | None, end: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What :meth:`velocity` is given, checked."""
        self._check(x, t, label)
        self._check_condition(x, condition)
        inputs = x if condition is None else torch.cat([x, condition.to(x)], dim=1)
        if end is None:
            return inputs, self.embedding(t.expand(x.shape[0]), label)
        self._check_end(x, end)
        return inputs, self.embedding(t.expand(x.shape[0]), label, (end - t).expand(x.shape[0]))

    def _check_end(self, x: Tensor, end: Tensor) -> None:
        name, batch = type(self).__name__, tuple(x.shape[:1])
        if not self.second_time:
            raise ValueError(f"an end was given to a {name} of one time; build it with second_time=true or pass None")
        if (end.ndim and tuple(end.shape) != batch) or not end.is_floating_point():
            found = f"{end.dtype} of shape {tuple(end.shape)}"
            raise ValueError(f"end is {found}; give a floating scalar or shape {batch}, one time per sample")

    def _check_condition(self, x: Tensor, condition: Tensor | None) -> None:
        name, wanted = type(self).__name__, (len(x), self.condition_channels, *self.shape[1:])
        if condition is None and self.condition_channels:
            raise ValueError(f"this {name} has condition_channels={self.condition_channels}; give a condition {wanted}")
        if condition is not None and not self.condition_channels:
            raise ValueError(
                f"a condition was given to a {name} without; build it with condition_channels or pass None"
            )
        if condition is not None and tuple(condition.shape) != wanted:
            raise ValueError(f"the condition has shape {tuple(condition.shape)}; this {name} takes {wanted}")

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
