"""A differentiable distance of pictures in the feature maps of a fixed network.

It has the form of LPIPS (Zhang et al., 2018, arXiv 1801.03924, eq. 1) with all channel weights one, on other networks.
It is not LPIPS: neither the network nor the weights are those that were fitted to human judgements, and the
numbers do not compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowbench.core.autocast import autocast_off
from flowbench.core.checks import check_count
from flowbench.metrics.classifier import MAX_SIDE, DigitsCNN, load_classifier
from flowbench.metrics.efficientnet import EfficientNetFeatures, EfficientNetLite0
from flowbench.metrics.features import fold_normalisations
from flowbench.metrics.weights import inception_network, inception_weights

__all__ = ["PERCEPTUAL_NETWORKS", "PerceptualDistance", "PerceptualNetwork", "feature_map_distance"]

PerceptualNetwork = Literal["classifier", "inception", "efficientnet-lite0"]
PERCEPTUAL_NETWORKS = ("classifier", "inception", "efficientnet-lite0")

# Last layer before each halving of the resolution, and the last before pooling.
INCEPTION_TAPS = ("Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c")
EFFICIENTNET_TAPS = (0, 2, 4, 10, 15)
# Smallest side with which every tapped map has at least 2 x 2 cells; the EfficientNet takes multiples of 32.
INCEPTION_MIN_SIDE, EFFICIENTNET_MIN_SIDE, EFFICIENTNET_MULTIPLE = 107, 64, 32

Maps = Callable[[Tensor], list[Tensor]]


def feature_map_distance(maps: Iterable[Tensor], others: Iterable[Tensor]) -> Tensor:
    """Squared distance of unit-normalised channels, averaged over cells and then over maps.

    Args:
        maps: feature maps (B, C_l, H_l, W_l) of the first pictures.
        others: those of the second, of the same shapes.

    Returns:
        Shape (B,), in [0, 4]; twice one minus the mean cosine similarity.
    """
    distances = [(_unit(a) - _unit(b)).square().sum(dim=1).mean(dim=(1, 2)) for a, b in zip(maps, others, strict=True)]
    return torch.stack(distances).mean(dim=0)


def _unit(features: Tensor) -> Tensor:
    # The constant under the root keeps the gradient finite where every channel is zero.
    return features * (features.square().sum(dim=1, keepdim=True) + 1e-10).rsqrt()


class PerceptualDistance:
    """Distance of pictures in feature maps; gradients reach the second picture alone.

    A network that also measures a bench flatters whatever was trained on it: train on one, measure with another.

    Not an ``nn.Module``, so a LightningModule that holds it keeps the weights out of checkpoints, EMA and DDP. Weights
    are read at the first call. Computes in float32, under autocast too.

    Args:
        network: ``classifier`` (a file of :func:`flowbench.metrics.save_classifier`, for pictures of its shape),
            ``inception`` (FID's Inception-v3) or ``efficientnet-lite0``.
        weights: the file; needed for ``classifier``; None searches as :mod:`flowbench.metrics.weights` does.
        side: >= 1; pictures are scaled (bilinear) to this many pixels a side; None keeps their size where the network
            can take it, else takes the next it can. Not for ``classifier``.

    Raises:
        ValueError: an unknown network, a classifier without its file, or a side that the network cannot take.

    Example:
        >>> import tempfile
        >>> x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_classifier(f"{folder}/classifier.pt", DigitsCNN((1, 8, 8), num_classes=10))
        ...     distance = PerceptualDistance("classifier", f"{folder}/classifier.pt")
        ...     distance(x, x).abs().round(decimals=4)
        tensor([0., 0.])
    """

    def __init__(self, network: PerceptualNetwork, weights: str | Path | None = None, side: int | None = None) -> None:
        if network not in PERCEPTUAL_NETWORKS:
            raise ValueError(f"perceptual network must be one of {', '.join(PERCEPTUAL_NETWORKS)}, got {network!r}")
        if network == "classifier" and (weights is None or side is not None):
            raise ValueError("the perceptual network classifier takes the path of its weights, and no side")
        check_count("side", side, or_none=True)
        least = _least_side(network)
        if side is not None and side != _fitting(network, side):
            multiple = f" and a multiple of {EFFICIENTNET_MULTIPLE}" if network == "efficientnet-lite0" else ""
            raise ValueError(f"side of the perceptual network {network} must be at least {least}{multiple}, got {side}")
        self.network: PerceptualNetwork = network
        self.weights = weights
        self.side = side
        self._modules: nn.Module | None = None
        self._maps: Maps | None = None

    def __call__(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Distances.

        Args:
            x: pictures in [-1, 1], shape (B, 1 or 3, H, W); no gradient reaches them.
            x_hat: others, same shape; values outside [-1, 1] are passed on as they are.

        Returns:
            float32, shape (B,), in [0, 4].

        Raises:
            ValueError: shapes that differ or that the network cannot take, or weights that cannot be had.
        """
        if x.shape != x_hat.shape or x.ndim != 4:
            raise ValueError(f"pictures must share a shape (B, C, H, W), got {tuple(x.shape)} and {tuple(x_hat.shape)}")
        with autocast_off(x.device):
            with torch.no_grad():
                wanted = self._feature_maps(x.detach())
            return feature_map_distance(wanted, self._feature_maps(x_hat))

    def _feature_maps(self, x: Tensor) -> list[Tensor]:
        if self._maps is None or self._modules is None:
            self._modules, self._maps = _load(self.network, self.weights)
        self._modules.to(x.device)
        return self._maps(self._scaled(x.float()))

    def _scaled(self, x: Tensor) -> Tensor:
        if self.network == "classifier":
            return x
        if x.shape[1] not in (1, 3):
            raise ValueError(f"the perceptual network {self.network} takes 1 or 3 channels, got {x.shape[1]}")
        height, width = (self.side,) * 2 if self.side else (_fitting(self.network, s) for s in x.shape[2:])
        if (height, width) != tuple(x.shape[2:]):
            x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=True)
        return x.expand(-1, 3, -1, -1)


def _least_side(network: PerceptualNetwork) -> int:
    return {"classifier": 4, "inception": INCEPTION_MIN_SIDE, "efficientnet-lite0": EFFICIENTNET_MIN_SIDE}[network]


def _fitting(network: PerceptualNetwork, side: int) -> int:
    """The smallest side >= `side` that the network can take."""
    multiple = EFFICIENTNET_MULTIPLE if network == "efficientnet-lite0" else 1
    return -(-max(side, _least_side(network)) // multiple) * multiple


def _load(network: PerceptualNetwork, weights: str | Path | None) -> tuple[nn.Module, Maps]:
    if network == "classifier":
        assert weights is not None
        classifier = load_classifier(weights)
        return classifier, lambda x: _classifier_maps(classifier, x)
    if network == "inception":
        trunk = _inception_trunk(weights)
        return trunk, lambda x: _inception_maps(trunk, x)
    efficientnet = EfficientNetFeatures(weights)._network
    return efficientnet, lambda x: _efficientnet_maps(efficientnet, x)


def _classifier_maps(model: DigitsCNN, x: Tensor) -> list[Tensor]:
    """What follows each non-linearity of the trunk."""
    if tuple(x.shape[1:]) != model.shape:
        raise ValueError(f"the perceptual classifier takes pictures of shape {model.shape}, got {tuple(x.shape[1:])}")
    if model.stages > 1 and max(x.shape[2:]) > MAX_SIDE:
        x = F.adaptive_avg_pool2d(x, (min(x.shape[2], MAX_SIDE), min(x.shape[3], MAX_SIDE)))
    maps = []
    for layer in model.trunk:
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            break
        x = layer(x)
        if isinstance(layer, nn.SiLU):
            maps.append(x)
    return maps


def _inception_trunk(weights: str | Path | None) -> nn.ModuleDict:
    network = fold_normalisations(inception_network(inception_weights(weights).state))
    return nn.ModuleDict(dict(list(network.named_children())[:-2]))


def _inception_maps(trunk: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    x, maps = (127.5 * (x + 1.0) - 128.0) / 128.0, []
    for name, layer in trunk.items():
        x = layer(x)
        if name in INCEPTION_TAPS:
            maps.append(x)
    return maps


def _efficientnet_maps(network: EfficientNetLite0, x: Tensor) -> list[Tensor]:
    x, maps = F.relu6(network.stem((127.5 * (x + 1.0) - 127.0) / 128.0)), []
    for index, block in enumerate(network.blocks):
        x = block(x)
        if index in EFFICIENTNET_TAPS:
            maps.append(x)
    return maps
