"""A source with the directions of the data: von Mises-Fisher around data points or their clusters."""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor

from flowbench.core.checks import check_count, check_number
from flowbench.flows.source.base import FittedSource
from flowbench.flows.source.radial import check_radius, draw_chi, log_chi

__all__ = [
    "VonMisesFisherSource",
    "check_concentration",
    "draw_von_mises_fisher",
    "log_von_mises_fisher_constant",
    "spherical_k_means",
]

_MAX_ROUNDS = 100


class VonMisesFisherSource(FittedSource):
    """x0 = r s: direction s from a von Mises-Fisher distribution around a direction of the data, radius r from chi.

    In training every data point has its own mean direction: itself, or the centroid of its cluster. Drawn without a
    data point, a stored direction is taken with equal probability, or a centroid with the share of its cluster.

    Args:
        concentration: kappa in [0, 1e6]; 0 is uniform, so that the source is N(0, I) at the default radius.
        centres: number K >= 1 of centroids of spherical k-means, or "data" for the fitted points themselves (all of
            them are kept in checkpoints).
        paired: whether a data point of the training gets noise from its own direction. False draws noise without
            looking at the data, as the paper's 2-D simulation does, and leaves it to the coupling to pair the two.
        dof: degrees of freedom of the radius, in [0.1, 1e9]; None is the dimension d, the radius of N(0, I).
        scale: factor of the radius, in [1e-12, 1e12].

    References:
        Lee, Kim, Lee (2025), arXiv 2512.18184: directional sources, x0 = r s with s ~ vMF(mu(x1), kappa).
        Banerjee, Dhillon, Ghosh, Sra (2005), Clustering on the unit hypersphere using von Mises-Fisher distributions.

    Example:
        >>> source = VonMisesFisherSource(concentration=1e4, centres="data")
        >>> data = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> source.fit(data, torch.Generator())
        >>> x0 = source.sample_for(data, torch.Generator().manual_seed(0))
        >>> torch.cosine_similarity(x0, data).round(decimals=1)  # noise in the direction of its data point
        tensor([1., 1.])
    """

    def __init__(
        self,
        concentration: float,
        centres: int | Literal["data"] = 3,
        paired: bool = True,
        dof: float | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_concentration(concentration)
        if centres != "data":
            check_count("centres", centres, hint='or "data" for a direction of every point')
        check_radius(dof, scale)
        self.concentration, self.centres, self.paired = concentration, centres, paired
        self.dof, self.scale = dof, scale

    def _fit(self, points: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        if points.shape[1] < 2:
            raise ValueError(
                "VonMisesFisherSource needs points of at least 2 dimensions: on a line there are 2 directions"
            )
        norm = points.norm(dim=1, keepdim=True)
        if not bool(norm.all()):
            zeros = int((norm == 0).sum())
            raise ValueError(
                f"VonMisesFisherSource: {zeros} of {len(points)} data points are zero and have no direction"
            )
        directions = points / norm
        if self.centres == "data":
            return {"centre": directions, "cumulative": torch.arange(1, len(points) + 1).double() / len(points)}
        centre, cluster = spherical_k_means(directions, self.centres, generator)
        share = cluster.bincount(minlength=self.centres).double() / len(points)
        return {"centre": centre, "cumulative": share.cumsum(0)}

    @property
    def mean_directions(self) -> Tensor:
        """Fitted mean directions, unit vectors in float64, shape (K, d)."""
        return self._fitted("centre")

    def sample(
        self, num: int, shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw a mean direction, then a point around it; on the generator's device, and move."""
        self._check_shape(shape)
        centre = self._fitted("centre", generator.device)
        cumulative = self._fitted("cumulative", generator.device)
        u = torch.rand(num, generator=generator, device=generator.device, dtype=torch.float64)
        chosen = torch.searchsorted(cumulative, u, right=True).clamp(max=len(centre) - 1)
        return self._around(centre[chosen], generator).reshape(num, *shape).to(device)

    @property
    def is_paired(self) -> bool:
        """As ``paired`` was given."""
        return self.paired

    def sample_for(self, x1: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a point around the direction of each data point, or around the centroid nearest to it.

        Args:
            x1: data points, none of them zero, shape (B, *D).
            generator: source of every random number.

        Returns:
            Shape (B, *D), on the device of ``x1``; independent of ``x1`` unless ``paired``.
        """
        if not self.paired:
            return super().sample_for(x1, generator)
        self._check_shape(tuple(x1.shape[1:]))
        flat = x1.detach().flatten(1).to(generator.device, torch.float64)
        norm = flat.norm(dim=1, keepdim=True)
        if bool((norm == 0).any()):
            raise ValueError("VonMisesFisherSource met a data point of zeros, which has no direction: leave it out")
        direction = flat / norm
        centre = self._fitted("centre", generator.device)
        if self.centres != "data":
            direction = centre[(direction @ centre.T).argmax(1)]
        return self._around(direction, generator).reshape(x1.shape).to(x1.device)

    def _around(self, mean: Tensor, generator: torch.Generator) -> Tensor:
        direction, radius = draw_von_mises_fisher(mean, self.concentration, generator)
        if self.dof is not None:
            radius = draw_chi(len(mean), self.dof, generator)
        return (self.scale * radius[:, None] * direction).float()

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats of points drawn without a data point, float64, shape (B,)."""
        self._check_shape(tuple(x.shape[1:]))
        flat = x.flatten(1).double()
        num_dims, norm = flat.shape[1], flat.norm(dim=1)
        centre, cumulative = self._fitted("centre", x.device), self._fitted("cumulative", x.device)
        log_weight = cumulative.diff(prepend=cumulative.new_zeros(1)).log()
        cosine = flat @ centre.T / norm[:, None]
        direction = (log_weight + self.concentration * cosine).logsumexp(1)
        radial = log_chi(norm / self.scale, self.dof or num_dims) - math.log(self.scale) - (num_dims - 1) * norm.log()
        return direction + log_von_mises_fisher_constant(num_dims, self.concentration) + radial

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        around = f"concentration={self.concentration:g}, centres={self.centres!r}, paired={self.paired}"
        return f"{around}, dof={self.dof}, scale={self.scale:g}"


def check_concentration(concentration: float) -> None:
    """Refuse a concentration whose density is a series too long for the memory.

    Raises:
        ValueError: for a number outside of [0, 1e6]; beyond, directions are one to a thousandth of a radian.
    """
    check_number("concentration", concentration, at_least=0, at_most=1e6, hint="0 is uniform")


def draw_von_mises_fisher(mean: Tensor, concentration: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Directions from von Mises-Fisher distributions, and as a by-product the radii of a Gaussian.

    The direction of a Gaussian g has a first coordinate t with (1 - t) / 2 ~ Beta((d - 1) / 2, (d - 1) / 2), the
    proposal of Wood's rejection, and a rest that is uniform on the tangent sphere; |g| ~ chi(d) is independent of both.

    Args:
        mean: unit vectors on the generator's device, float64, shape (B, d), d at least 2.
        concentration: kappa in [0, 1e12].
        generator: source of every random number.

    Returns:
        Unit vectors, float64, shape (B, d), and radii |g|, shape (B,).

    References:
        Wood (1994), Simulation of the von Mises Fisher distribution, Communications in Statistics 23(1), algorithm VM*.
    """
    # Beyond, rounding of the cosines is as large as what the rejection looks at, and the draws do not end.
    check_number("concentration", concentration, at_least=0, at_most=1e12)
    num, num_dims = mean.shape
    b = (num_dims - 1) / (2 * concentration + math.hypot(2 * concentration, num_dims - 1))
    x0, log_peak = (1 - b) / (1 + b), math.log(4 * b) - 2 * math.log1p(b)
    points, radius = torch.empty_like(mean), mean.new_empty(num)
    pending = torch.arange(num, device=mean.device)
    while len(pending):
        normal = torch.randn(len(pending), num_dims, generator=generator, device=mean.device, dtype=torch.float64)
        uniform = torch.rand(len(pending), generator=generator, device=mean.device, dtype=torch.float64)
        norm, tangent = normal.norm(dim=1), normal[:, 1:].norm(dim=1)
        beta = (1 - normal[:, 0] / norm) / 2
        share = 1 - (1 - b) * beta
        cosine = (1 - (1 + b) * beta) / share
        log_ratio = concentration * (cosine - x0) + (num_dims - 1) * (torch.log1p(-x0 * cosine) - log_peak)
        kept = log_ratio >= uniform.log()
        # 1 - cosine^2 without cancellation, which would show at a large concentration.
        sine = 2 * (b * beta * (1 - beta)).clamp(min=0).sqrt() / share
        turned = torch.cat([cosine[:, None], normal[:, 1:] * (sine / tangent)[:, None]], dim=1)
        points[pending[kept]], radius[pending[kept]] = turned[kept], norm[kept]
        pending = pending[~kept]
    return _reflect_first_axis(points, mean), radius


def _reflect_first_axis(points: Tensor, mean: Tensor) -> Tensor:
    """The Householder reflections that carry the first axis to ``mean``, applied to ``points``; all (B, d)."""
    normal = -mean.clone()
    normal[:, 0] += 1
    length = normal.square().sum(1, keepdim=True)
    factor = torch.where(length > 0, 2 * (points * normal).sum(1, keepdim=True) / length, torch.zeros_like(length))
    return points - factor * normal


def log_von_mises_fisher_constant(num_dims: int, concentration: float) -> float:
    """Log of kappa^(d/2 - 1) / ((2 pi)^(d/2) I_(d/2 - 1)(kappa)), by the power series of the Bessel function.

    All terms of the series are positive, so nothing cancels and nothing underflows, in any dimension.
    """
    check_concentration(concentration)
    order = num_dims / 2 - 1
    m = torch.arange(int(concentration) + 64, dtype=torch.float64)
    terms = -torch.lgamma(m + 1) - torch.lgamma(m + order + 1)
    if concentration > 0:
        terms = terms + 2 * m * math.log(concentration / 2)
    log_series = terms.logsumexp(0) if concentration > 0 else terms[0]
    return order * math.log(2.0) - num_dims / 2 * math.log(2 * math.pi) - float(log_series)


def spherical_k_means(directions: Tensor, num_centroids: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cluster unit vectors by cosine (Dhillon & Modha, 2001), from seeds drawn far apart.

    Args:
        directions: unit vectors, shape (N, d).
        num_centroids: K, 1 to N.
        generator: draws the seeds, each with probability proportional to 1 - the cosine to the nearest one before.

    Returns:
        Unit centroids, shape (K, d), and the cluster of each vector, int64, shape (N,). A warning is given if vectors
        still change their cluster after 100 rounds.

    Raises:
        ValueError: for more centroids than vectors.
    """
    check_count("num_centroids", num_centroids)
    if num_centroids > len(directions):
        raise ValueError(f"{num_centroids} centroids need as many data points, got {len(directions)}: lower centres")
    chosen = [int(torch.randint(len(directions), (), generator=generator))]
    for _ in range(num_centroids - 1):
        gap = 1 - (directions @ directions[chosen].T).amax(1)
        gap[chosen] = 0
        gap = gap.clamp(min=torch.finfo(gap.dtype).tiny)
        chosen.append(int(torch.multinomial(gap, 1, generator=generator)))
    centre = directions[chosen]
    cluster = (directions @ centre.T).argmax(1)
    for _ in range(_MAX_ROUNDS):
        sums = torch.zeros_like(centre).index_add_(0, cluster, directions)
        length = sums.norm(dim=1, keepdim=True)
        # A cluster that lost its last vector, or whose vectors cancel, keeps its centroid.
        centre = torch.where(length > 0, sums / length.clamp(min=torch.finfo(length.dtype).tiny), centre)
        found = (directions @ centre.T).argmax(1)
        if torch.equal(found, cluster):
            return centre, cluster
        cluster = found
    warnings.warn(
        f"spherical k-means of {num_centroids} centroids still moves vectors after {_MAX_ROUNDS} rounds, the centroids"
        " are those of the last one: lower centres",
        stacklevel=2,
    )
    return centre, cluster
