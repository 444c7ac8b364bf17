"""A source that is a blurred data point under noise."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from flowbench.core.checks import check_count, check_scale
from flowbench.flows.source.base import FittedSource, Source
from flowbench.flows.source.mixture import GaussianMixtureSource

__all__ = ["LowFrequencySource", "low_pass_basis"]


class LowFrequencySource(FittedSource):
    """x0 = a P x1 + c e: the low frequencies of the data point itself, and Gaussian noise.

    P is the orthogonal projection on the `cutoff` lowest frequencies of the discrete cosine transform along height and
    width (of vectors, along their coordinates), for each channel. In training every data point starts from its own
    blurred version: without noise these pairs are an optimal transport, because P is the gradient of a convex function.

    Samples have no data point: their low frequencies come from a `prior`, a small model of the low frequencies of x0,
    and the rest is noise. The prior is fitted to the training points before the first step, which counts as training,
    and is drawn without an evaluation of the network. How well it fits bounds how well samples can be: the flow carries
    its mistakes along.

    The density is that of what is drawn, the prior's times that of the rest of the noise. With it a flow's likelihood
    is that of its samples, prior included. It is no density of training pairs: their low frequencies are the data's.

    Our reading of the abstract: cut-off, mixing and prior of the paper are not known to us.

    Args:
        cutoff: frequencies kept along each axis, at least 1 and at most the axis' length.
        scale: a, in [1e-12, 1e12].
        noise: c, in [1e-12, 1e12]; c = 1 with a far below c is nearly Gaussian noise, a small c leaves most of the work
            to the prior.
        prior: any source, fitted to the low frequencies of x0; None is a mixture of 10 Gaussians.

    References:
        arXiv 2606.04092 (abstract): a low-frequency prior for flow matching, sampled by a second model.

    Example:
        >>> source = LowFrequencySource(cutoff=1, noise=0.1, prior=GaussianMixtureSource(1))
        >>> data = torch.tensor([[1.0, 3.0], [3.0, 5.0], [5.0, 7.0]])
        >>> source.fit(data, torch.Generator().manual_seed(0))
        >>> source.projected(data).round(decimals=3)  # the mean of the coordinates, at all of them
        tensor([[2., 2.],
                [4., 4.],
                [6., 6.]])
        >>> x0 = source.sample_for(data, torch.Generator().manual_seed(0))
        >>> bool((x0 - source.projected(data)).abs().max() < 0.5)
        True
    """

    def __init__(self, cutoff: int, scale: float = 1.0, noise: float = 0.5, prior: Source | None = None) -> None:
        super().__init__()
        check_count("cutoff", cutoff, hint="frequencies along each axis; 1 keeps the mean")
        check_scale("scale", scale)
        check_scale("noise", noise, hint="0 leaves no density")
        self.cutoff, self.scale, self.noise = cutoff, scale, noise
        self.prior = prior or GaussianMixtureSource(num_components=10)
        if self.prior.is_paired:
            raise ValueError(f"the prior draws low frequencies without a data point, and {self.prior!r} needs one")

    # ---- projection ---------------------------------------------------------------------------------------

    def coordinates(self, x: Tensor) -> Tensor:
        """Amplitudes of the low frequencies of points (B, *D), shape (B, *D) with `cutoff` in place of each length."""
        for axis in _axes(x):
            x = (x.movedim(axis, -1) @ self._basis(x.shape[axis], x)).movedim(-1, axis)
        return x

    def lifted(self, z: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Points (B, *shape) of the low frequencies `z` and no others."""
        for axis in _axes(z):
            z = (z.movedim(axis, -1) @ self._basis(shape[axis - 1], z).T).movedim(-1, axis)
        return z

    def projected(self, x: Tensor) -> Tensor:
        """P x of points (B, *D)."""
        return self.lifted(self.coordinates(x), tuple(x.shape[1:]))

    def _basis(self, size: int, like: Tensor) -> Tensor:
        if size < self.cutoff:
            raise ValueError(
                f"an axis of length {size} has no {self.cutoff} frequencies: give LowFrequencySource a lower cutoff"
            )
        return low_pass_basis(size, self.cutoff, like.device, like.dtype)

    # ---- fit ----------------------------------------------------------------------------------------------

    @property
    def needs_fit(self) -> bool:
        """Until the shape is known and the prior fitted."""
        return super().needs_fit or self.prior.needs_fit

    @property
    def is_paired(self) -> bool:
        """Always: every data point starts from itself."""
        return True

    @property
    def fit_flops(self) -> float:
        """Those of the prior's fit."""
        return self.prior.fit_flops

    @property
    def fit_seconds(self) -> float:
        """Those of the prior's fit."""
        return self.prior.fit_seconds

    def fit(self, data_points: Tensor, generator: torch.Generator) -> None:
        """Fit the prior to the low frequencies of the points' own source points.

        Args:
            data_points: training points where the flow lives, shape (N, *D), N at least 2.
            generator: source of every random number, on any device.

        Raises:
            ValueError: as for every fitted source; for a cut-off above the length of an axis.
        """
        super().fit(data_points, generator)
        points = data_points.detach().double()
        self.prior.fit(self.coordinates(self.sample_for(points, generator)), generator)

    def _fit(self, points: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"num_points": torch.tensor(float(len(points)), dtype=torch.float64)}

    # ---- draws --------------------------------------------------------------------------------------------

    def sample(
        self, num: int, shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw low frequencies from the prior and the others from the noise; on the generator's device, and move."""
        self._fitted("num_points")
        self._check_shape(shape)
        noise = self.noise * torch.randn(num, *shape, generator=generator, device=generator.device)
        own = self.coordinates(noise)
        low = self.prior.sample(num, tuple(own.shape[1:]), generator, generator.device)
        return (noise + self.lifted(low - own, shape)).to(device)

    def sample_for(self, x1: Tensor, generator: torch.Generator) -> Tensor:
        """The low frequencies of each data point, under noise.

        Args:
            x1: data points, shape (B, *D).
            generator: source of every random number.

        Returns:
            Shape (B, *D), on the device of `x1` and of its type.
        """
        self._fitted("num_points")
        self._check_shape(tuple(x1.shape[1:]))
        noise = torch.randn(x1.shape, generator=generator, device=generator.device).to(x1)
        return self.scale * self.projected(x1.detach()) + self.noise * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats of points drawn without a data point, float64, shape (B,).

        Raises:
            ValueError: by a prior without a density.
        """
        self._check_shape(tuple(x.shape[1:]))
        low = self.coordinates(x.double())
        squares = x.double().flatten(1).square().sum(1) - low.flatten(1).square().sum(1)
        num = x.shape[1:].numel() - low.shape[1:].numel()
        rest = -0.5 * squares.clamp(min=0) / self.noise**2 - num * (math.log(self.noise) + 0.5 * math.log(2 * math.pi))
        return self.prior.log_prob(low) + rest

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return f"cutoff={self.cutoff}, scale={self.scale:g}, noise={self.noise:g}, prior={self.prior!r}"


def _axes(x: Tensor) -> range:
    """Height and width of images (B, ..., H, W), or the coordinates of vectors (B, d)."""
    return range(max(1, x.ndim - 2), x.ndim)


@lru_cache(maxsize=32)
def low_pass_basis(size: int, cutoff: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The lowest frequencies of the orthonormal discrete cosine transform (type II) of an axis.

    Args:
        size: the axis' length n.
        cutoff: how many, 1 to n.
        device: where the result lies.
        dtype: of the result; computed in float64.

    Returns:
        Orthonormal columns, shape (n, cutoff): sqrt(2 / n) cos(pi (i + 1/2) k / n), the first one constant.

    Example:
        >>> low_pass_basis(4, 1, torch.device("cpu"), torch.float64).T
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]], dtype=torch.float64)
    """
    place = torch.arange(size, dtype=torch.float64)[:, None] + 0.5
    basis = (math.pi * place * torch.arange(cutoff, dtype=torch.float64) / size).cos() * math.sqrt(2 / size)
    basis[:, 0] = 1 / math.sqrt(size)
    return basis.to(device, dtype)
