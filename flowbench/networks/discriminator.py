"""A discriminator of patches, and the hinge losses that train it against a decoder."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import relu

from flowbench.core.checks import check_count
from flowbench.networks.blocks import group_norm
from flowbench.networks.sizes import check_shape, check_width

__all__ = ["PatchDiscriminator", "hinge_discriminator_loss", "hinge_generator_loss"]


class PatchDiscriminator(nn.Module):
    """PatchGAN: one logit per overlapping patch of the picture, high for real ones.

    Normalises groups of channels instead of batches, so that a picture's logits do not depend on its batch, no
    running statistics enter a checkpoint, and processes need no synchronisation.

    Args:
        shape: (C, H, W) of the images.
        width: channels of the first convolution, 1 to 65,536; doubled per layer up to eight times.
        num_layers: how often height and width are halved, 1 to 16; three see patches of 70 x 70 pixels, two of 34, one
            of 16.

    Raises:
        ValueError: a size out of range, or images too small for so many layers.

    References:
        Isola et al. (2017), Image-to-Image Translation with Conditional Adversarial Networks, arXiv 1611.07004, app. 6.

    Example:
        >>> discriminator = PatchDiscriminator((3, 16, 16), width=8, num_layers=1)
        >>> discriminator(torch.zeros(2, 3, 16, 16)).shape  # a logit for each of 6 x 6 overlapping patches
        torch.Size([2, 1, 6, 6])
    """

    def __init__(self, shape: tuple[int, ...], *, width: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        check_shape(shape, 3)
        check_width("width", width)
        check_count("num_layers", num_layers, at_most=16)
        # Two convolutions of 4 pixels at stride 1 follow the halvings, and each takes one pixel away.
        if min(shape[1:]) >> num_layers < 3:
            raise ValueError(
                f"a discriminator of {num_layers} layers needs (C, H, W) with sides of at least {3 << num_layers}, "
                f"got {tuple(shape)}: lower num_layers"
            )
        widths = [width * min(2**level, 8) for level in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(shape[0], widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for level, (before, after) in enumerate(pairwise(widths), start=2):
            stride = 2 if level <= num_layers else 1
            layers += [nn.Conv2d(before, after, 4, stride, 1), group_norm(after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 1, H', W') of images (B, C, H, W) in [-1, 1]."""
        logits: Tensor = self.layers(x)
        return logits


def hinge_discriminator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """Half the mean hinge of both kinds of logits, a scalar (Lim & Ye, 2017, arXiv 1705.02894).

    Args:
        real: logits of real pictures, any shape.
        generated: logits of generated pictures, any shape.
    """
    return 0.5 * (relu(1.0 - real).mean() + relu(1.0 + generated).mean())


def hinge_generator_loss(generated: Tensor) -> Tensor:
    """Minus the mean logit of generated pictures, a scalar (Lim & Ye, 2017, arXiv 1705.02894)."""
    return -generated.mean()
