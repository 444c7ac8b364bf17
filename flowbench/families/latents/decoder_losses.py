"""What a decoder is trained with beside its likelihood: a perceptual and an adversarial term."""

from __future__ import annotations

from dataclasses import dataclass

from flowbench.core.checks import check_count, check_number, check_scale
from flowbench.metrics import PerceptualDistance, PerceptualNetwork
from flowbench.networks import PatchDiscriminator

__all__ = ["AdversarialConfig", "PerceptualConfig"]


@dataclass(frozen=True)
class PerceptualConfig:
    """A distance in the feature maps of a fixed network, added to the loss in nats per dimension.

    It is not LPIPS, see :mod:`flowbench.metrics.perceptual`. The network that measures the bench should not be the one
    that trains the decoder.

    Attributes:
        network: ``classifier``, ``inception`` or ``efficientnet-lite0``.
        weight: of the distance, which lies in [0, 4], in the loss; in [1e-12, 1e12].
        weights: file of the network's weights; needed for ``classifier``.
        side: pictures are scaled to this many pixels a side, >= 1; None keeps their size where the network can take it.

    Example:
        >>> distance = PerceptualConfig(network="inception", weight=0.5).build()  # weights are read at the first call
        >>> type(distance).__name__
        'PerceptualDistance'
    """

    network: PerceptualNetwork = "efficientnet-lite0"
    weight: float = 1.0
    weights: str | None = None
    side: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: when a value is out of its range.
        """
        check_scale("perceptual.weight", self.weight, hint="leave perceptual out for none")
        check_count("perceptual.side", self.side, or_none=True)

    def build(self) -> PerceptualDistance:
        """The distance; its weights are read at the first call."""
        return PerceptualDistance(self.network, self.weights, self.side)


@dataclass(frozen=True)
class AdversarialConfig:
    """A discriminator of patches with the hinge loss, for the last part of the training.

    One optimiser serves both sides: the decoder's loss sees the discriminator's weights as constants, the
    discriminator's loss sees the reconstructions as constants, and their sum is minimised.

    Attributes:
        weight: of the decoder's adversarial term in the loss in nats per dimension, in [1e-12, 1e12].
        start: share of the training budget before it, in [0, 1).
        width: channels of the discriminator's first convolution, 1 to 65,536.
        num_layers: halvings of the resolution in the discriminator, 1 to 16.

    Example:
        >>> config = AdversarialConfig(weight=0.1, width=8, num_layers=1)
        >>> config.build((1, 16, 16))(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 1, 6, 6])
    """

    weight: float = 0.1
    start: float = 0.5
    width: int = 64
    num_layers: int = 3

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: when a value is out of its range.
        """
        check_scale("adversarial.weight", self.weight, hint="leave adversarial out for none")
        check_number("adversarial.start", self.start, at_least=0, below=1, hint="a share of the training budget")
        check_count("adversarial.width", self.width, at_most=2**16)
        check_count("adversarial.num_layers", self.num_layers, at_most=16)

    def build(self, shape: tuple[int, ...]) -> PatchDiscriminator:
        """The discriminator of images of a shape."""
        return PatchDiscriminator(shape, width=self.width, num_layers=self.num_layers)
