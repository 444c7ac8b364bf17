"""Residual MLP for vectors."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu

from flowbench.networks.sizes import check_layers, check_width
from flowbench.networks.velocity import VelocityNetwork

__all__ = ["MLP"]


class ResidualLayer(nn.Module):
    """``h + B silu(A silu(h) + E c)``: a residual branch of two layers, conditioned in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.condition = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Hidden states and conditioning (B, width) -> (B, width)."""
        update: Tensor = self.second(silu(self.first(silu(hidden)) + self.condition(embedding)))
        return hidden + update


class MLP(VelocityNetwork):
    """Residual MLP conditioned on time and label, for data of shape (d,).

    Without normalisation layers, so that the velocity stays (piecewise) linear far from the data, where a
    trajectory from the tail of the source starts.

    Args:
        shape: (d,), up to 1e6.
        num_classes: number of labels, 1 to 1e6, or None for an unconditional network.
        width: hidden size, 1 to 65,536.
        depth: number of residual layers, 1 to 1,000.
        zero_output: start with zero output weights, hence with zero velocity.
        condition_channels: coordinates of a condition, which widen the first layer alone; 0: none.
        second_time: take the end of a jump beside its start; see :meth:`VelocityNetwork.forward`.

    Raises:
        ValueError: ``shape`` is not (d,), or a size is out of range.

    References:
        He et al. (2015), "Deep Residual Learning", arXiv:1512.03385; pre-activation as in arXiv:1603.05027.

    Example:
        >>> network = MLP((2,), num_classes=None, width=16, depth=1)
        >>> x, t = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 0.5, 1.0])
        >>> velocity = network(x, t)
        >>> velocity.shape, bool((velocity == 0).all())
        (torch.Size([3, 2]), True)
    """

    end_layers = VelocityNetwork.end_layers | {"input", "output"}

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int | None,
        *,
        width: int = 128,
        depth: int = 3,
        zero_output: bool = True,
        condition_channels: int = 0,
        second_time: bool = False,
    ) -> None:
        check_width("width", width)
        check_layers("depth", depth)
        super().__init__(
            shape,
            num_classes,
            embedding_width=width,
            condition_channels=condition_channels,
            second_time=second_time,
        )
        if len(self.shape) != 1:
            raise ValueError(f"shape is {self.shape}; MLP takes vectors (d,), use DiT or UNet for (C, H, W)")
        self.input = nn.Linear(self.input_channels, width)
        self.layers = nn.ModuleList(ResidualLayer(width) for _ in range(depth))
        self.output = nn.Linear(width, self.shape[0])
        if zero_output:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def velocity(self, x: Tensor, embedding: Tensor) -> Tensor:
        """See :meth:`VelocityNetwork.velocity`."""
        return self.read_out(self.features(x, embedding))

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """The width."""
        return (self.output.in_features,)

    def features(self, x: Tensor, embedding: Tensor) -> Tensor:
        """See :meth:`VelocityNetwork.features`."""
        hidden, embedding = self.input(x), silu(embedding)
        for layer in self.layers:
            hidden = layer(hidden, embedding)
        return silu(hidden)

    def read_out(self, features: Tensor) -> Tensor:
        """See :meth:`VelocityNetwork.read_out`."""
        velocity: Tensor = self.output(features)
        return velocity
