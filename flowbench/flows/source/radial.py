"""Isotropic sources: a uniform direction and a radius of its own, and the chi distribution that radii follow."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from flowbench.core.checks import check_number, check_scale
from flowbench.flows.source.base import FittedSource, log_standard_normal

__all__ = [
    "NormAlignedSource",
    "RadialSource",
    "check_radius",
    "draw_chi",
    "log_chi",
    "log_sphere_area",
    "mean_chi",
]


class NormAlignedSource(FittedSource):
    """A Gaussian whose points are on average as far from the origin as the data: N(0, s^2 I), s fitted.

    s = ratio E|x1| / E chi(d), so E|x0| = ratio E|x1|. The paper scales the data up to the Gaussian and the samples
    down again instead. Both are one flow: if ``dx/dt = v(x, t)`` carries x0 to x1, then ``y = c x`` solves ``dy/dt = c
    v(y / c, t)`` and carries c x0 to c x1, so scaling both ends by c only changes units. Scaling the source leaves
    the data, and every distance measured in their units, as they are; the network sees inputs and a loss that are
    smaller by c and c^2.

    Args:
        ratio: E|x0| / E|x1|, in [1e-12, 1e12].

    References:
        Lee, Kim, Lee (2025), Is There a Better Source Distribution than Gaussian?, arXiv 2512.18184, norm alignment.

    Example:
        >>> source = NormAlignedSource()
        >>> source.fit(torch.tensor([[3.0, 4.0], [0.0, -5.0]]), torch.Generator())
        >>> round(source.std, 4)  # norm 5 over sqrt(pi / 2), the mean norm of N(0, I) in the plane
        3.9894
    """

    def __init__(self, ratio: float = 1.0) -> None:
        super().__init__()
        check_scale("ratio", ratio, hint="1 gives both ends one mean norm")
        self.ratio = ratio

    @property
    def is_isotropic(self) -> bool:
        """Always."""
        return True

    @property
    def std(self) -> float:
        """Fitted standard deviation of each coordinate."""
        return self._number("std")

    def _fit(self, points: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"std": self.ratio * points.norm(dim=1).mean() / mean_chi(points.shape[1])}

    def sample(
        self, num: int, shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw on the generator's device and move, as :class:`~flowbench.flows.GaussianSource` does."""
        self._check_shape(shape)
        return (self.std * torch.randn(num, *shape, generator=generator, device=generator.device)).to(device)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats, float64, shape (B,)."""
        self._check_shape(tuple(x.shape[1:]))
        return log_standard_normal(x, self.std)

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return f"ratio={self.ratio:g}"


class RadialSource(FittedSource):
    """A direction uniform on the sphere and, independently, a radius from a chi distribution or from the data's norms.

    N(0, I) in d dimensions is the case of a chi(d) radius. Other degrees of freedom put the norms of a d-dimensional
    Gaussian into a plane, as simulations of the paper do.

    Args:
        radius: "chi" for scale chi(dof), "data" for the distribution of the data's norms: the quantile function that
            interpolates their sorted values linearly, so that there is a density.
        dof: degrees of freedom of "chi", in [0.1, 1e9]; None is the dimension of the points.
        scale: factor of the radius, in [1e-12, 1e12].

    References:
        Lee, Kim, Lee (2025), arXiv 2512.18184: a Gaussian as a chi sphere.

    Example:
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> RadialSource().log_prob(x), GaussianSource().log_prob(x)
        (tensor([-14.3379], dtype=torch.float64), tensor([-14.3379], dtype=torch.float64))
        >>> source = RadialSource("data")
        >>> source.fit(torch.tensor([[1.0, 0.0], [0.0, -2.0]]), torch.Generator())
        >>> norms = source.sample(100, (2,), torch.Generator().manual_seed(0)).norm(dim=1)
        >>> bool(((norms > 1 - 1e-6) & (norms < 2 + 1e-6)).all())
        True
    """

    def __init__(self, radius: Literal["chi", "data"] = "chi", dof: float | None = None, scale: float = 1.0) -> None:
        super().__init__()
        if radius not in ("chi", "data"):
            raise ValueError(f'radius must be "chi" or "data", got {radius!r}')
        if radius == "data" and dof is not None:
            raise ValueError(
                f'radius="data" takes the norms from the data and has no degrees of freedom: leave out dof={dof}'
            )
        check_radius(dof, scale)
        self.radius, self.dof, self.scale = radius, dof, scale

    @property
    def needs_fit(self) -> bool:
        """Only the norms of the data must be fitted."""
        return self.radius == "data" and super().needs_fit

    @property
    def is_isotropic(self) -> bool:
        """Always."""
        return True

    def fit(self, data_points: Tensor, generator: torch.Generator) -> None:
        """Keep the data's norms; nothing for a chi distribution.

        Raises:
            ValueError: as for every fitted source, and for data of a single norm.
        """
        if self.radius == "data":
            super().fit(data_points, generator)

    def _fit(self, points: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        norms, count = points.norm(dim=1).unique(return_counts=True)
        if len(norms) < 2:
            raise ValueError(
                f"RadialSource: all {len(points)} data points have norm {float(norms):g}, no density: use radius=chi"
            )
        probability = (count.cumsum(0) - count[0]).double() / int(count[1:].sum())
        return {"norms": norms, "probability": probability}

    def _radii(self, num: int, num_dims: int, generator: torch.Generator) -> Tensor:
        if self.radius == "chi":
            return self.scale * draw_chi(num, self.dof or num_dims, generator)
        u = torch.rand(num, generator=generator, device=generator.device, dtype=torch.float64)
        norms, probability = self._fitted("norms", u.device), self._fitted("probability", u.device)
        right = torch.searchsorted(probability, u, right=True).clamp(1, len(norms) - 1)
        share = (u - probability[right - 1]) / (probability[right] - probability[right - 1])
        return self.scale * torch.lerp(norms[right - 1], norms[right], share)

    def sample(
        self, num: int, shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw on the generator's device and move."""
        self._check_shape(shape)
        num_dims = math.prod(shape)
        normal = torch.randn(num, num_dims, generator=generator, device=generator.device, dtype=torch.float64)
        radius = self._radii(num, num_dims, generator)
        points = normal * (radius / normal.norm(dim=1))[:, None]
        return points.float().reshape(num, *shape).to(device)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats, float64, shape (B,); -inf beyond the norms of the data, where they are the radii."""
        self._check_shape(tuple(x.shape[1:]))
        norm = x.flatten(1).double().norm(dim=1)
        num_dims = x[0].numel()
        radius = norm / self.scale
        radial = log_chi(radius, self.dof or num_dims) if self.radius == "chi" else self._log_norm_density(radius)
        return radial - math.log(self.scale) - log_sphere_area(num_dims) - (num_dims - 1) * norm.log()

    def _log_norm_density(self, radius: Tensor) -> Tensor:
        norms, probability = self._fitted("norms", radius.device), self._fitted("probability", radius.device)
        right = torch.searchsorted(norms, radius).clamp(1, len(norms) - 1)
        density = probability.diff()[right - 1] / norms.diff()[right - 1]
        inside = (radius >= norms[0]) & (radius <= norms[-1])
        return density.log().masked_fill(~inside, -math.inf)

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return f"radius={self.radius!r}, dof={self.dof}, scale={self.scale:g}"


def check_radius(dof: float | None, scale: float) -> None:
    """Refuse degrees of freedom or a scale that give no radius."""
    # Of fewer many radii underflow to 0, of more the logarithms of the density lose their digits.
    check_number("dof", dof, at_least=0.1, at_most=1e9, or_none=True, hint="None takes the dimension of the points")
    check_scale("scale", scale, hint="1 leaves the radius as it is")


def mean_chi(dof: float) -> float:
    """Mean of the chi distribution, sqrt(2) Gamma((dof + 1) / 2) / Gamma(dof / 2)."""
    return math.sqrt(2.0) * math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2))


def log_chi(radius: Tensor, dof: float) -> Tensor:
    """Log-density of the chi distribution at radii (B,), any dof > 0."""
    return (dof - 1) * radius.log() - radius.square() / 2 - (dof / 2 - 1) * math.log(2.0) - math.lgamma(dof / 2)


def log_sphere_area(num_dims: int) -> float:
    """Log of the area of the unit sphere in d dimensions, 2 pi^(d/2) / Gamma(d/2)."""
    return math.log(2.0) + num_dims / 2 * math.log(math.pi) - math.lgamma(num_dims / 2)


def draw_chi(num: int, dof: float, generator: torch.Generator) -> Tensor:
    """Draws of the chi distribution, float64, shape (num,), on the generator's device, as cheap for any dof."""
    return (2.0 * _draw_gamma(num, dof / 2, generator)).sqrt()


def _draw_gamma(num: int, shape: float, generator: torch.Generator) -> Tensor:
    """Exact gamma draws of rate 1 by rejection (Marsaglia & Tsang, 2000); below shape 1 by the boost of U^(1/shape)."""
    device = generator.device
    d = (shape if shape >= 1 else shape + 1) - 1 / 3
    out = torch.empty(num, dtype=torch.float64, device=device)
    pending = torch.arange(num, device=device)
    while len(pending):
        normal = torch.randn(len(pending), generator=generator, device=device, dtype=torch.float64)
        uniform = torch.rand(len(pending), generator=generator, device=device, dtype=torch.float64)
        cube = (1 + normal / math.sqrt(9 * d)).clamp(min=0) ** 3
        kept = uniform.log() < normal.square() / 2 + d * (1 - cube + cube.log())
        out[pending[kept]] = d * cube[kept]
        pending = pending[~kept]
    if shape < 1:
        out *= torch.rand(num, generator=generator, device=device, dtype=torch.float64) ** (1 / shape)
    return out
