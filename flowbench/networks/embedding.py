"""Embeddings of time, label and position."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NoiseLevelEmbedding", "TimeLabelEmbedding", "grid_features", "sinusoidal_features"]

# Highest and lowest angular frequency, in radians per unit. Unscaled times in [0, 1] would leave nearly all
# features constant over the path. Times scaled to 0..1000, as in DDPM, make a velocity so rough in time that
# an adaptive solver needs two to three times the evaluations at no better loss (8 x 8 digits, 2-D mixture).
TIME_FREQUENCIES = (100.0, 0.1)
GRID_FREQUENCIES = (1.0, 1e-4)
# In radians per e-fold of the noise level: levels from 0.01 to 0.7 span four e-folds.
LEVEL_FREQUENCIES = (10.0, 0.1)


def sinusoidal_features(position: Tensor, num_features: int, frequencies: tuple[float, float]) -> Tensor:
    """Cosines and sines of a position at geometrically spaced frequencies.

    Args:
        position: positions (or times), shape (N,), floating.
        num_features: features per position, even; half are cosines, half sines.
        frequencies: the highest angular frequency, which is included, and the lowest, which is not.

    Returns:
        Features in [-1, 1], shape (N, num_features), in the dtype of ``position``.

    References:
        Vaswani et al. (2017), "Attention Is All You Need", arXiv:1706.03762, section 3.5.
    """
    half = num_features // 2
    index = torch.arange(half, device=position.device, dtype=position.dtype)
    highest, lowest = frequencies
    angles = position[:, None] * highest * torch.exp(index * (math.log(lowest / highest) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_features(height: int, width: int, num_features: int) -> Tensor:
    """Fixed sine-cosine features of the cells of a grid: half encode the row, half the column.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        num_features: features per cell, a multiple of 4.

    Returns:
        Features in [-1, 1], shape (height * width, num_features), row-major, float64.

    Raises:
        ValueError: ``num_features`` is not a multiple of 4.

    References:
        Peebles and Xie (2022), "Scalable Diffusion Models with Transformers", arXiv:2212.09748, section 3.2.
    """
    if num_features % 4:
        raise ValueError(f"width is {num_features}; 2-D sine-cosine positions need a multiple of 4")
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    axes = (rows.reshape(-1), columns.reshape(-1))
    return torch.cat([sinusoidal_features(axis, num_features // 2, GRID_FREQUENCIES) for axis in axes], dim=-1)


class TimeLabelEmbedding(nn.Module):
    """One conditioning vector per sample: an MLP of sinusoidal time features plus a learned label vector.

    With a second time an MLP of the length of the jump is added. It starts at zero, and a state dict that lacks it is
    read as one in which it is zero: what was trained with one time gives the same vectors for every length.

    Args:
        width: size of the conditioning vector.
        num_classes: number of labels; the table gets one more row, the null label at index ``num_classes``.
            None: unconditional, no table.
        num_features: sinusoidal time features, even.
        second_time: whether there is a second time.

    References:
        Peebles and Xie (2022), arXiv:2212.09748, section 3.2; the null label is Ho and Salimans (2022),
        "Classifier-Free Diffusion Guidance", arXiv:2207.12598.
    """

    def __init__(
        self, width: int, num_classes: int | None, *, num_features: int = 256, second_time: bool = False
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = num_features
        self.time = nn.Sequential(nn.Linear(num_features, width), nn.SiLU(), nn.Linear(width, width))
        self.label = None if num_classes is None else nn.Embedding(num_classes + 1, width)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)
        self.length: nn.Sequential | None = None
        if second_time:
            # Drawn apart: the other layers start as they do without it.
            with torch.random.fork_rng(devices=[]):
                self.length = nn.Sequential(nn.Linear(num_features, width), nn.SiLU(), nn.Linear(width, width))
            self.zero_length()

    def initialise_time(self) -> None:
        """Draw the weights of the time's layers from a normal distribution of small spread, as DiT does; biases 0."""
        for layer in self.time:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def zero_length(self) -> None:
        """Let the second time have no effect."""
        if self.length is not None:
            nn.init.zeros_(self.length.get_parameter("2.weight"))
            nn.init.zeros_(self.length.get_parameter("2.bias"))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = [f"{prefix}length.{name}" for name in (self.length.state_dict() if self.length is not None else ())]
        if own and not any(name in state_dict for name in own):
            self.zero_length()
            assert self.length is not None
            state_dict.update({f"{prefix}length.{name}": value for name, value in self.length.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, t: Tensor, label: Tensor | None = None, length: Tensor | None = None) -> Tensor:
        """Embed time and label.

        Args:
            t: times in [0, 1], shape (B,).
            label: labels in 0..num_classes (num_classes is the null label), shape (B,), integer. None: null.
            length: from the time to the second one, in [-1, 1], shape (B,); of an embedding built with it. None: 0.

        Returns:
            Conditioning vectors, shape (B, width).
        """
        embedding: Tensor = self.time(self._features(t))
        if self.length is not None:
            embedding = embedding + self.length(self._features(torch.zeros_like(t) if length is None else length))
        if self.label is None or self.num_classes is None:
            return embedding
        if label is None:
            label = torch.full(t.shape, self.num_classes, dtype=torch.long, device=t.device)
        return embedding + self.label(label)

    def _features(self, t: Tensor) -> Tensor:
        # The features are made in at least float32: in bfloat16 nearby times are equal.
        precise = t.to(torch.promote_types(t.dtype, torch.float32))
        features = sinusoidal_features(precise, self.num_features, TIME_FREQUENCIES)
        return features.to(self.get_parameter("time.0.weight").dtype)


class NoiseLevelEmbedding(nn.Module):
    """One vector per sample from the logarithm of its noise level: an MLP of sinusoidal features.

    It starts as any other layer does, not at zero: the output layers of the networks that add it are zero already.

    Args:
        width: size of the vector.
        num_features: sinusoidal features, even.

    References:
        Normalizing flows told the noise level of their points (iTARFlow, Apple, 2026), arXiv:2604.20041, embed its
        logarithm too; number and frequencies of the features are ours.
    """

    def __init__(self, width: int, *, num_features: int = 64) -> None:
        super().__init__()
        self.num_features = num_features
        self.mlp = nn.Sequential(nn.Linear(num_features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, level: Tensor) -> Tensor:
        """Embed noise levels.

        Args:
            level: standard deviations above 0, shape (B,).

        Returns:
            Vectors, shape (B, width).
        """
        precise = level.to(torch.promote_types(level.dtype, torch.float32))
        features = sinusoidal_features(precise.log(), self.num_features, LEVEL_FREQUENCIES)
        embedding: Tensor = self.mlp(features.to(self.get_parameter("mlp.0.weight").dtype))
        return embedding
