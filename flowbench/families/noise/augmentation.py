"""The noise of training points, and what their likelihood is because of it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from flowbench.core.checks import check_scale

__all__ = ["Augmentation", "ConditionedNoise", "GaussianNoise", "UniformDequantization"]


class Augmentation(ABC):
    """Noise of training points, a choice of the likelihood that is learned.

    Attributes:
        noise_std: standard deviation of the Gaussian noise that the flow's space adds, in its own units.
        levels: lowest and highest noise level of a flow that is told the level of each point; None for one that is not.

    Example:
        >>> choices: list[Augmentation] = [UniformDequantization(), GaussianNoise(0.1)]
        >>> [(choice.noise_std, choice.bits_per_dim) for choice in choices]
        [(0.0, True), (0.1, False)]
    """

    noise_std: float = 0.0
    levels: tuple[float, float] | None = None

    def raised(self, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Training points with what the space has not added: noise beyond `noise_std`, where levels differ.

        Args:
            points: with noise of `noise_std`, shape (B, *D).
            generator: source of every random number.

        Returns:
            Noisy points of the same shape, and their noise levels, shape (B,), or None where no flow is told.
        """
        return points, None

    @property
    def bits_per_dim(self) -> bool:
        """Whether the flow's density of grey levels may be given in bits per dimension."""
        return not self.noise_std

    @abstractmethod
    def likelihood_method(self, latent: bool) -> str:
        """What a likelihood depends on because of this noise, for its protocol; empty where nothing.

        Args:
            latent: whether the flow lives on an autoencoder's latents, where the noise is part of the encoder.
        """


class UniformDequantization(Augmentation):
    """No noise but the data module's own, which spreads grey levels uniformly over their bins.

    The flow is a density of the data: minus its logarithm, in bits per dimension, bounds the code length of the grey
    levels from above (Theis et al., 2016, arXiv 1511.01844, sec. 3.1) and compares with other exact flows. Samples need
    no denoising.

    Example:
        >>> augmentation = UniformDequantization()
        >>> augmentation.noise_std, augmentation.bits_per_dim, augmentation.likelihood_method(latent=False)
        (0.0, True, '')
    """

    def likelihood_method(self, latent: bool) -> str:
        """Empty: nothing stands between density and data."""
        return ""

    def __repr__(self) -> str:
        return "UniformDequantization()"


class GaussianNoise(Augmentation):
    """Fresh Gaussian noise on every training point.

    In data space the flow is the density of *noisy* data: the likelihood's protocol names the noise, and the value is
    no code length and never given in bits per dimension. On latents the noise belongs to the encoder, and the
    likelihood stays a bound of the data's (Gu et al., 2025, arXiv 2506.06276, sec. 3). What the flow draws is noisy in
    both cases, until a denoiser removes it.

    Args:
        std: standard deviation, in [1e-12, 1e12], in the units of the flow's space: data in [-1, 1] (TARFlow: 0.05 to
            0.15), latents of unit variance (STARFlow: 0.3).

    References:
        Zhai et al. (2024), arXiv 2412.06329, sec. 2.3.

    Example:
        >>> augmentation = GaussianNoise(0.1)
        >>> augmentation.noise_std, augmentation.bits_per_dim
        (0.1, False)
        >>> augmentation.likelihood_method(latent=False)
        'density-of-noisy-data(0.1)'
    """

    def __init__(self, std: float) -> None:
        check_scale("GaussianNoise std", std, hint="for none choose UniformDequantization")
        self.noise_std = float(std)

    def likelihood_method(self, latent: bool) -> str:
        """Names the noise: a bound through a noisy encoder, or the density of noisy data."""
        return f"noise({self.noise_std:g})" if latent else f"density-of-noisy-data({self.noise_std:g})"

    def __repr__(self) -> str:
        return f"GaussianNoise({self.noise_std:g})"


class ConditionedNoise(GaussianNoise):
    """Gaussian noise of a level that is drawn for every training point, and that the flow is told (iTARFlow).

    The level n is uniform in [low, high]; every block of the flow gets an embedding of log n, and the point's negative
    log-likelihood counts with weight n. The flow is a density for every level: its ``log_prob``, encoding, decoding and
    paths take the lowest, as with ``GaussianNoise(low)``; samples start where the denoiser asks
    (:class:`~flowbench.families.noise.annealing.NoiseAnnealing`: at `high`), or at `low` without one.

    Args:
        low: lowest standard deviation, in [1e-12, 1e12], in the units of the flow's space.
        high: highest standard deviation, from `low` to 1e12.

    Raises:
        ValueError: for a number out of range, or `high` below `low`.

    References:
        iTARFlow (Apple, 2026), arXiv 2604.20041: [0.01, 0.3] at 64 pixels, 0.5 at 128, 0.7 at 256. (BiFlow's authors
        call another improved TARFlow by the same name.)

    Example:
        >>> augmentation = ConditionedNoise(0.1, 0.5)
        >>> augmentation.noise_std, augmentation.levels, augmentation.likelihood_method(latent=False)
        (0.1, (0.1, 0.5), 'density-of-noisy-data(0.1)')
        >>> points, level = augmentation.raised(torch.zeros(1000, 2), torch.Generator().manual_seed(0))
        >>> bool(level.min() >= 0.1), bool(level.max() <= 0.5)
        (True, True)
        >>> augmentation = ConditionedNoise(0.1, 0.1)  # one level: the noise is the space's alone
        >>> augmentation.raised(torch.ones(1, 2), torch.Generator().manual_seed(0))
        (tensor([[1., 1.]]), tensor([0.1000]))
    """

    levels: tuple[float, float]

    def __init__(self, low: float, high: float) -> None:
        check_scale("ConditionedNoise low", low)
        check_scale("ConditionedNoise high", high)
        if high < low:
            raise ValueError(f"ConditionedNoise high must be at least low={low:g}, got {high:g}: exchange them")
        super().__init__(low)
        self.levels = (float(low), float(high))

    def raised(self, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Noise of variance n^2 - low^2, so that with the space's it is of level n, drawn for every point."""
        low, high = self.levels
        share = torch.rand(len(points), generator=generator, device=points.device, dtype=points.dtype)
        above = (high - low) * share
        more = (above * (above + 2 * low)).sqrt()  # n^2 - low^2, without its cancellation
        noise = torch.randn(points.shape, generator=generator, device=points.device, dtype=points.dtype)
        return points + more.view(-1, *[1] * (points.ndim - 1)) * noise, low + above

    def __repr__(self) -> str:
        return f"ConditionedNoise{self.levels}"
