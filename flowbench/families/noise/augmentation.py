"""The noise of training points, and what their likelihood is because of it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from flowbench.core.checks import check_scale

__all__ = ["Augmentation", "GaussianNoise", "UniformDequantization"]


class Augmentation(ABC):
    """Noise of training points, a choice of the likelihood that is learned.

    Attributes:
        noise_std: standard deviation of the Gaussian noise that the flow's space adds, in its own units.

    Example:
        >>> choices: list[Augmentation] = [UniformDequantization(), GaussianNoise(0.1)]
        >>> [(choice.noise_std, choice.bits_per_dim) for choice in choices]
        [(0.0, True), (0.1, False)]
    """

    noise_std: float = 0.0

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
