"""Eight 2-D densities, each defined by the constants in its docstring, with exact log-density and entropy.

Definitions of "8 gaussians" and "moons" differ between papers and code bases, and distances between them are
not comparable. So every density here has a version that changes with any constant, and the splits are drawn
from a seed that contains it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from flowbench.core.lazy import lazy_module
from flowbench.core.seeds import generator as keyed_generator
from flowbench.data.dataset_entry import DatasetEntry
from flowbench.data.spec import DataSpec
from flowbench.data.split import Split

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

__all__ = [
    "DENSITIES",
    "DENSITY_ENTRIES",
    "Checkerboard",
    "Density2D",
    "EightGaussians",
    "FiveGaussians",
    "Gaussian",
    "GaussianMixture",
    "Moons",
    "Ring",
    "SCurve",
    "get_density",
]

NUM_SAMPLES = {"train": 50_000, "val": 4_096, "test": 10_000}
_LOG_2PI = math.log(2.0 * math.pi)
_CHUNK = 4_096


class Density2D(ABC):
    """A density on the plane that can be sampled, some with an exact log-density.

    Attributes:
        name: name in the catalogue.
        summary: the definition in one line, for the catalogue.
        version: changes with any constant of the definition.
        num_classes: number of labels, or None.
        has_log_prob: whether :meth:`log_prob` is available.
        bounds: (x_min, x_max, y_min, y_max), a box outside of which lies less than 1e-12 of the mass.

    Example:
        >>> density = get_density("eight_gaussians")
        >>> points = density.sample(100, torch.Generator().manual_seed(0))
        >>> points.shape, density.log_prob(points).isfinite().all().item()
        (torch.Size([100, 2]), True)
        >>> class Segment(Density2D):
        ...     name, summary, bounds = "segment", "uniform on [0, 1] of the x axis", (0.0, 1.0, 0.0, 0.0)
        ...     def sample_labelled(self, num, generator):
        ...         x = torch.rand(num, generator=generator)
        ...         return torch.stack([x, torch.zeros(num)], dim=1), None
        >>> Segment().sample(3, torch.Generator()).shape, Segment().entropy()
        (torch.Size([3, 2]), None)
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    version: ClassVar[str] = "1"
    num_classes: ClassVar[int | None] = None
    has_log_prob: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float, float, float]]

    @property
    def spec(self) -> DataSpec:
        """Shape (2,), continuous."""
        return DataSpec(self.name, self.version, (2,), self.num_classes, levels=None)

    @abstractmethod
    def sample_labelled(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Draw points with their labels.

        Args:
            num: number of points N.
            generator: a CPU generator.

        Returns:
            Points, float32, shape (N, 2), and class ids, int64, shape (N,), or None.
        """

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Draw points, float32, shape (num, 2), with a CPU ``generator``."""
        return self.sample_labelled(num, generator)[0]

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats.

        Args:
            x: points on the CPU, any floating type, shape (N, 2).

        Returns:
            float64, shape (N,).

        Raises:
            ValueError: when ``has_log_prob`` is False.
        """
        raise ValueError(f"{self.name}: this density has no closed-form log_prob (x of shape {tuple(x.shape)})")

    def entropy(self) -> float | None:
        """Differential entropy in nats, the smallest possible mean NLL; None when unknown."""
        return None


def _quadrature_entropy(density: Density2D, step: float) -> float:
    """-integral of p log p over the bounds by the trapezoidal rule on a square grid.

    For a smooth density that vanishes at the border the rule converges faster than any power of the step;
    halving the steps used here changes no entropy by more than 1e-9.
    """
    x_min, x_max, y_min, y_max = density.bounds
    xs = torch.arange(x_min, x_max, step, dtype=torch.float64)
    ys = torch.arange(y_min, y_max, step, dtype=torch.float64)
    total = 0.0
    for x in xs.split(max(1, _CHUNK // len(ys))):
        log_p = density.log_prob(torch.cartesian_prod(x, ys))
        total -= float((log_p.exp() * log_p).sum())
    return total * step * step


class _Mixture(Density2D):
    """A mixture of K Gaussians; labels are component ids."""

    has_log_prob = True
    weights: ClassVar[list[float]]
    means: ClassVar[list[tuple[float, float]]]
    covariances: ClassVar[list[tuple[float, float, float]]]  # (xx, xy, yy)

    @cached_property
    def _cholesky(self) -> Tensor:
        matrices = [[[xx, xy], [xy, yy]] for xx, xy, yy in self.covariances]
        return torch.linalg.cholesky(torch.tensor(matrices, dtype=torch.float64))

    def sample_labelled(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        edges = torch.tensor(self.weights, dtype=torch.float64).cumsum(0)[:-1]
        component = torch.bucketize(torch.rand(num, generator=generator, dtype=torch.float64), edges, right=True)
        noise = torch.randn((num, 2), generator=generator, dtype=torch.float64)
        centre = torch.tensor(self.means, dtype=torch.float64)[component]
        points = centre + (self._cholesky[component] @ noise[:, :, None])[:, :, 0]
        return points.float(), component if self.num_classes is not None else None

    def log_prob(self, x: Tensor) -> Tensor:
        difference = x.double()[None] - torch.tensor(self.means, dtype=torch.float64)[:, None]  # (K, N, 2)
        white = torch.linalg.solve_triangular(self._cholesky, difference.mT, upper=False)  # (K, 2, N)
        log_det = self._cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
        log_weight = torch.tensor(self.weights, dtype=torch.float64).log()
        constant = log_weight - log_det - _LOG_2PI
        return torch.logsumexp(constant[:, None] - 0.5 * white.square().sum(1), dim=0)

    def entropy(self) -> float | None:
        """Entropy in nats by 2-D quadrature (a mixture has no closed form), accurate to 1e-9."""
        return self._entropy

    @cached_property
    def _entropy(self) -> float:
        smallest = math.sqrt(min(min(xx, yy) for xx, _, yy in self.covariances))
        return _quadrature_entropy(self, smallest / 6.0)


class Gaussian(_Mixture):
    """One correlated Gaussian: mean (2, -1), covariance [[1.5, 0.8], [0.8, 1.0]]. Version 1.

    Not a standard normal: a flow from standard normal noise to it has a closed form that is not the identity,
    and the optimal field's Jacobian is not diagonal (so Hutchinson's estimate has variance). Entropy in
    closed form.
    """

    name = "gaussian"
    summary = "One correlated Gaussian: mean (2, -1), covariance [[1.5, 0.8], [0.8, 1.0]]"
    bounds = (-8.0, 12.0, -9.0, 7.0)
    weights: ClassVar = [1.0]
    means: ClassVar = [(2.0, -1.0)]
    covariances: ClassVar = [(1.5, 0.8, 1.0)]

    def entropy(self) -> float | None:
        """``1 + ln(2 pi) + ln det(covariance) / 2`` nats."""
        return 1.0 + _LOG_2PI + float(self._cholesky[0].diagonal().log().sum())


class EightGaussians(_Mixture):
    """Eight equal Gaussians on a ring: radius 5, angles k pi / 4, standard deviation 0.5 each. Version 1.

    torchcfm's library version has the same ring with standard deviation 0.562; values are not comparable.
    Labels: k = 0..7, the component.
    """

    name = "eight_gaussians"
    summary = "Eight equal Gaussians on a ring: radius 5, angles k pi / 4, standard deviation 0.5 each"
    num_classes = 8
    bounds = (-9.5, 9.5, -9.5, 9.5)
    weights: ClassVar = [1.0 / 8.0] * 8
    means: ClassVar = [(5.0 * math.cos(k * math.pi / 4.0), 5.0 * math.sin(k * math.pi / 4.0)) for k in range(8)]
    covariances: ClassVar = [(0.25, 0.0, 0.25)] * 8


class FiveGaussians(_Mixture):
    """Five equal Gaussians on a ring: radius 4, angles pi / 2 + 2 k pi / 5, standard deviation 0.4 each. Version 1.

    Centred, so that a flow from ``gaussian_mixture``, which is not, has a mean to move as well.
    Labels: k = 0..4, the component.
    """

    name = "five_gaussians"
    summary = "Five equal Gaussians on a ring: radius 4, angles pi / 2 + 2 k pi / 5, standard deviation 0.4 each"
    num_classes = 5
    bounds = (-7.0, 7.0, -7.0, 7.0)
    weights: ClassVar = [1.0 / 5.0] * 5
    means: ClassVar = [
        (4.0 * math.cos(math.pi * (0.5 + 0.4 * k)), 4.0 * math.sin(math.pi * (0.5 + 0.4 * k))) for k in range(5)
    ]
    covariances: ClassVar = [(0.16, 0.0, 0.16)] * 5


class GaussianMixture(_Mixture):
    """Five unequal Gaussians, off centre and without symmetry. Version 1.

    | weight | mean | covariance (xx, xy, yy) |
    |---|---|---|
    | 0.30 | (-3, -2) | (0.5, 0.3, 0.4) |
    | 0.25 | (-1, 3) | (0.3, 0, 0.3) |
    | 0.20 | (2, 2.5) | (0.2, -0.1, 0.6) |
    | 0.15 | (3.5, -1) | (0.15, 0, 0.15) |
    | 0.10 | (0.5, -3.5) | (0.8, 0, 0.1) |

    Weights and distances from the origin differ, so a method that tilts the data's marginal shows it here.
    Labels: 0..4, the component.
    """

    name = "gaussian_mixture"
    summary = "Five unequal Gaussians, off centre and without symmetry"
    num_classes = 5
    bounds = (-9.0, 8.0, -8.0, 9.0)
    weights: ClassVar = [0.30, 0.25, 0.20, 0.15, 0.10]
    means: ClassVar = [(-3.0, -2.0), (-1.0, 3.0), (2.0, 2.5), (3.5, -1.0), (0.5, -3.5)]
    covariances: ClassVar = [
        (0.5, 0.3, 0.4),
        (0.3, 0.0, 0.3),
        (0.2, -0.1, 0.6),
        (0.15, 0.0, 0.15),
        (0.8, 0.0, 0.1),
    ]


@cache
def _gauss_legendre(num: int) -> tuple[Tensor, Tensor]:
    """Nodes in (0, 1) and weights that sum to one."""
    nodes, weights = np.polynomial.legendre.leggauss(num)
    return torch.from_numpy((nodes + 1.0) / 2.0), torch.from_numpy(weights / 2.0)


class _NoisyCurve(Density2D):
    """Points uniform on smooth pieces of equal length, plus isotropic Gaussian noise.

    The density is the integral of the noise's density along the pieces. A piece is analytic, so
    Gauss-Legendre quadrature with nodes closer than the noise is exact to rounding: 256 nodes and 1,024 agree
    to 1e-10 everywhere within 15 units.
    """

    has_log_prob = True
    noise_std: ClassVar[float]
    num_pieces: ClassVar[int] = 2
    num_nodes: ClassVar[int] = 256

    @abstractmethod
    def curve(self, piece: Tensor, u: Tensor) -> Tensor:
        """Points (N, 2) of the pieces 0..num_pieces-1 at positions u in [0, 1], both of shape (N,)."""

    def sample_labelled(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        piece = torch.randint(self.num_pieces, (num,), generator=generator)
        u = torch.rand(num, generator=generator, dtype=torch.float64)
        noise = torch.randn((num, 2), generator=generator, dtype=torch.float64)
        points = self.curve(piece, u) + self.noise_std * noise
        return points.float(), piece if self.num_classes is not None else None

    @cached_property
    def _quadrature(self) -> tuple[Tensor, Tensor]:
        nodes, weights = _gauss_legendre(self.num_nodes)
        piece = torch.arange(self.num_pieces).repeat_interleave(self.num_nodes)
        return self.curve(piece, nodes.repeat(self.num_pieces)), (weights / self.num_pieces).repeat(self.num_pieces)

    def log_prob(self, x: Tensor) -> Tensor:
        centres, weights = self._quadrature
        log_weights = weights.log() - _LOG_2PI - 2.0 * math.log(self.noise_std)
        precision = 0.5 / self.noise_std**2
        return torch.cat(
            [
                torch.logsumexp(log_weights - precision * _squared_distance(chunk, centres), dim=1)
                for chunk in x.double().split(_CHUNK)
            ]
        )

    def entropy(self) -> float | None:
        """Entropy in nats by 2-D quadrature of the exact density, accurate to 1e-9."""
        return self._entropy

    @cached_property
    def _entropy(self) -> float:
        return _quadrature_entropy(self, self.noise_std / 5.0)


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (N, M) by differences: the expanded form loses digits to cancellation."""
    return (a[:, None, 0] - b[None, :, 0]).square() + (a[:, None, 1] - b[None, :, 1]).square()


class Moons(_NoisyCurve):
    """Two interleaved half circles of radius 3 with Gaussian noise of standard deviation 0.25. Version 1.

    With a uniform on [0, pi]: class 0 is 3 (cos a - 0.5, sin a - 0.25), class 1 is 3 (0.5 - cos a, 0.25 - sin
    a); classes have equal weight. This is scikit-learn's ``make_moons``, centred, times 3.
    Labels: 0 and 1, the half circle.
    """

    name = "moons"
    summary = "Two interleaved half circles of radius 3 with Gaussian noise of standard deviation 0.25"
    num_classes = 2
    noise_std = 0.25
    bounds = (-6.75, 6.75, -4.5, 4.5)

    def curve(self, piece: Tensor, u: Tensor) -> Tensor:
        """See the class."""
        sign = 1.0 - 2.0 * piece.to(u.dtype)
        points = torch.stack([torch.cos(math.pi * u) - 0.5, torch.sin(math.pi * u) - 0.25], dim=1)
        return 3.0 * sign[:, None] * points


class SCurve(_NoisyCurve):
    """An S with Gaussian noise of standard deviation 0.2. Version 1.

    With t uniform on [-3 pi / 2, 3 pi / 2]: 2 (sin t, sign(t) (cos t - 1)). This is scikit-learn's
    ``make_s_curve`` seen along its axis, times 2. No labels.
    """

    name = "s_curve"
    summary = "An S with Gaussian noise of standard deviation 0.2"
    noise_std = 0.2
    bounds = (-4.0, 4.0, -6.0, 6.0)

    def curve(self, piece: Tensor, u: Tensor) -> Tensor:
        """See the class; the two pieces meet at t = 0, where the curvature jumps."""
        sign = 1.0 - 2.0 * piece.to(u.dtype)
        t = 1.5 * math.pi * u
        return 2.0 * sign[:, None] * torch.stack([torch.sin(t), torch.cos(t) - 1.0], dim=1)


class Ring(Density2D):
    """A centred circle of radius 4 with Gaussian noise of standard deviation 0.3. Version 1.

    With a uniform on [0, 2 pi): 4 (cos a, sin a) + 0.3 N(0, I). The radius r then has a Rice distribution, and the
    density is ``exp(-(r^2 + 16) / 0.18) I_0(4 r / 0.09) / (2 pi 0.09)``, exact by the modified Bessel function. It
    depends on r alone, and r hardly varies: what re-weights the target by its norm has little to tilt here. No
    labels.
    """

    name = "ring"
    summary = "A centred circle of radius 4 with Gaussian noise of standard deviation 0.3"
    has_log_prob = True
    bounds = (-6.25, 6.25, -6.25, 6.25)
    radius: ClassVar[float] = 4.0
    noise_std: ClassVar[float] = 0.3

    def sample_labelled(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Density2D.sample_labelled`; the labels are None."""
        angle = 2.0 * math.pi * torch.rand(num, generator=generator, dtype=torch.float64)
        noise = torch.randn((num, 2), generator=generator, dtype=torch.float64)
        circle = torch.stack([angle.cos(), angle.sin()], dim=1)
        return (self.radius * circle + self.noise_std * noise).float(), None

    def log_prob(self, x: Tensor) -> Tensor:
        """Nats; x of shape (N, 2), float64 (N,)."""
        r, variance = x.double().norm(dim=1), self.noise_std**2
        # The scaled Bessel function takes exp(4 r / variance) out, which overflows for r above 16.
        bessel = torch.special.i0e(self.radius * r / variance).log()
        return bessel - (r - self.radius).square() / (2.0 * variance) - _LOG_2PI - math.log(variance)

    def entropy(self) -> float | None:
        """Entropy in nats by 2-D quadrature of the exact density, accurate to 1e-9."""
        return self._entropy

    @cached_property
    def _entropy(self) -> float:
        return _quadrature_entropy(self, self.noise_std / 5.0)


class Checkerboard(Density2D):
    """Uniform on the eight dark squares of a 4 x 4 board on [-4, 4]^2. Version 1.

    Squares have side 2; the one with lower left corner (2 i - 4, 2 j - 4) is dark when i + j is even, i, j in
    0..3. Log-density -ln 32 inside, -inf outside; entropy ln 32. No labels.
    """

    name = "checkerboard"
    summary = "Uniform on the eight dark squares of a 4 x 4 board on [-4, 4]^2"
    has_log_prob = True
    bounds = (-4.0, 4.0, -4.0, 4.0)

    def sample_labelled(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Density2D.sample_labelled`; the labels are None."""
        row = torch.randint(4, (num,), generator=generator)
        pair = torch.randint(2, (num,), generator=generator)
        corner = torch.stack([2 * pair + row % 2, row], dim=1)
        # Away from the edges, so that rounding to float32 cannot move a point into a light square.
        inside = torch.rand((num, 2), generator=generator, dtype=torch.float64).clamp(1e-6, 1.0 - 1e-6)
        return (2.0 * (corner + inside) - 4.0).float(), None

    def log_prob(self, x: Tensor) -> Tensor:
        """``-ln 32`` on dark squares, -inf elsewhere; x of shape (N, 2), float64 (N,)."""
        cell = (x.double() / 2.0).floor()
        dark = ((cell >= -2) & (cell < 2)).all(dim=1) & (cell.sum(dim=1) % 2 == 0)
        outside = torch.full((len(x),), -math.inf, dtype=torch.float64)
        return outside.masked_fill(dark, -math.log(32.0))

    def entropy(self) -> float | None:
        """``ln 32`` nats."""
        return math.log(32.0)


DENSITIES: dict[str, Density2D] = {
    density.name: density
    for density in (
        Gaussian(),
        EightGaussians(),
        Moons(),
        Checkerboard(),
        SCurve(),
        GaussianMixture(),
        FiveGaussians(),
        Ring(),
    )
}


def get_density(name: str) -> Density2D:
    """The density behind a 2-D dataset, also usable as a source distribution.

    Args:
        name: one of ``DENSITIES``.

    Returns:
        The density.

    Raises:
        ValueError: for another name.
    """
    if name not in DENSITIES:
        raise ValueError(f"density: unknown name {name!r}; known: {', '.join(DENSITIES)}")
    return DENSITIES[name]


def _loader(density: Density2D) -> Callable[[Path], dict[str, Split]]:
    """The splits of a density, drawn from a seed that name, version and split fix."""

    def load(root: Path) -> dict[str, Split]:
        return {
            split: Split(*density.sample_labelled(num, keyed_generator(0, density.name, density.version, split)))
            for split, num in NUM_SAMPLES.items()
        }

    return load


def _density_entry(density: Density2D) -> DatasetEntry:
    """The catalogue's entry of a density."""
    return DatasetEntry(
        spec=density.spec,
        description=f"2-D: {density.summary}",
        licence="none needed (synthetic)",
        citation="flowbench (defined in flowbench/data/densities.py)",
        load=_loader(density),
        num_samples=NUM_SAMPLES,
    )


DENSITY_ENTRIES = tuple(_density_entry(density) for density in DENSITIES.values())
