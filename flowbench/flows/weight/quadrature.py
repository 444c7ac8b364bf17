"""The mean of a Gibbs kernel over a rotation-invariant distribution, by quadrature instead of draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from flowbench.flows.weight.cost import Cost

__all__ = ["EmpiricalRadii", "GaussianRadii", "radial_log_mean"]

# Ranges reach this many standard deviations beyond the peak; what is left out is below 1e-22.
REACH = 10.0
NUM_ANGLES = 128
NUM_RADII = 96
# Below it, in standard deviations of the source, the radial range grows beyond what the nodes resolve.
LEAST_EPSILON = 0.05


@dataclass(frozen=True)
class GaussianRadii:
    """Norms of N(0, std^2 I)."""

    std: float

    def nodes(self, radius: Tensor, num_dims: int, epsilon: float) -> tuple[Tensor, Tensor]:
        """Nodes (K, Q) and log-weights (K, Q) that integrate a kernel of the distance over the norm of X.

        Two Gauss-Legendre panels meet at the point's own radius, where the integrand may have a kink. K points lie at
        distances ``radius`` from the origin.
        """
        if epsilon < LEAST_EPSILON * self.std:
            raise ValueError(
                f"g(y) is integrated for epsilon >= {LEAST_EPSILON:g} standard deviations of the source, got epsilon = "
                f"{epsilon:.4g} at {self.std:.4g}: raise epsilon, at which no batch would have an effective point left"
            )
        # The peak solves (d - 1) / r - r / std^2 = c'(r) / epsilon, and the distance's slope c' lies in [-1, 1].
        pull = self.std / epsilon
        spread = math.sqrt(pull**2 + 4 * (num_dims - 1))
        low = torch.full_like(radius, self.std * max((spread - pull) / 2 - REACH, 0.0))
        high = torch.full_like(radius, self.std * ((spread + pull) / 2 + REACH))
        middle = radius.clamp(low, high)
        panels = _panel(low, middle, NUM_RADII), _panel(middle, high, NUM_RADII)
        node, log_weight = (torch.cat(parts, 1) for parts in zip(*panels, strict=True))
        z = node / self.std
        # xlogy: on a line the density is finite at 0, where an empty panel puts its nodes.
        log_density = torch.xlogy(torch.tensor(num_dims - 1.0), z) - z.square() / 2 - math.log(self.std)
        constant = (1 - num_dims / 2) * math.log(2) - math.lgamma(num_dims / 2)
        return node, log_weight + log_density + constant

    def log_mean_of_squares(self, radius: Tensor, num_dims: int, epsilon: float) -> Tensor:
        """Logarithm of E exp(-|X - y|^2 / epsilon), in closed form."""
        scale = epsilon + 2 * self.std**2
        return -radius.square() / scale + num_dims / 2 * math.log(epsilon / scale)


@dataclass(frozen=True)
class EmpiricalRadii:
    """Norms of a sample, as the means of ``num_strata`` strata of equal size."""

    norms: Tensor
    num_strata: int = 256

    def nodes(self, radius: Tensor, num_dims: int, epsilon: float) -> tuple[Tensor, Tensor]:
        """Nodes (K, Q) and log-weights (K, Q), the same for every point."""
        strata = self.norms.double().sort().values.tensor_split(min(self.num_strata, len(self.norms)))
        node = torch.stack([stratum.mean() for stratum in strata])
        share = torch.tensor([len(stratum) / len(self.norms) for stratum in strata], dtype=torch.float64)
        shape = (len(radius), len(node))
        return node.expand(shape), share.log().expand(shape)


def radial_log_mean(
    radius: Tensor, num_dims: int, epsilon: float, cost: Cost, radii: GaussianRadii | EmpiricalRadii
) -> Tensor:
    """Logarithm of E exp(-c(X, y) / epsilon) for points y, with X invariant to rotations about the origin.

    X is a norm times a uniform direction, so the mean is a double integral over the norm and the angle to y, whose
    density is proportional to sin(angle)^(d - 2). Both are integrated by Gauss-Legendre quadrature over the range
    where the integrand is not negligible.

    Args:
        radius: norms |y| >= 0, shape (K,).
        num_dims: dimension d >= 1 of the points.
        epsilon: temperature, > 0.
        cost: "norm" or "squared".
        radii: distribution of the norm of X.

    Returns:
        float64 logarithms, shape (K,), on the CPU.
    """
    radius = radius.double().cpu()
    if isinstance(radii, GaussianRadii) and cost == "squared":
        return radii.log_mean_of_squares(radius, num_dims, epsilon)
    return torch.cat([_radial_log_mean(piece, num_dims, epsilon, cost, radii) for piece in radius.split(32)])


def _radial_log_mean(
    radius: Tensor, num_dims: int, epsilon: float, cost: Cost, radii: GaussianRadii | EmpiricalRadii
) -> Tensor:
    node_KQ, log_radius_KQ = radii.nodes(radius, num_dims, epsilon)
    angle_KA, log_angle_KA = _angles(radius, node_KQ, num_dims, epsilon, cost)
    r_KQA, R_KQA = node_KQ[:, :, None], radius[:, None, None]
    # |x - y|^2 = (r - R)^2 + 4 r R sin(angle / 2)^2, without the cancellation of the law of cosines.
    squared = (r_KQA - R_KQA).square() + 4 * r_KQA * R_KQA * (angle_KA / 2).sin().square()[:, None]
    costs = squared if cost == "squared" else squared.sqrt_()
    log_integrand = costs.div_(-epsilon).add_(log_radius_KQ[:, :, None]).add_(log_angle_KA[:, None])
    return torch.logsumexp(log_integrand.flatten(1), 1)


def _angles(radius: Tensor, node: Tensor, num_dims: int, epsilon: float, cost: Cost) -> tuple[Tensor, Tensor]:
    """Nodes (K, A) in [0, pi] and log-weights (K, A) that integrate over the angle between x and y."""
    if num_dims == 1:
        angle = torch.tensor([0.0, math.pi], dtype=torch.float64).expand(len(radius), 2)
        return angle, torch.full_like(angle, -math.log(2))
    low, high = torch.zeros_like(radius), torch.full_like(radius, math.pi)
    if num_dims > 2:
        width = REACH / math.sqrt(num_dims - 2)
        first, last = _peaks(radius, node, num_dims - 2, epsilon, cost)
        low, high = (first - width).clamp(min=0), (last + width).clamp(max=math.pi)
    angle, log_weight = _panel(low, high, NUM_ANGLES)
    constant = math.lgamma(num_dims / 2) - math.lgamma((num_dims - 1) / 2) - math.log(math.pi) / 2
    return angle, log_weight + (num_dims - 2) * angle.sin().log() + constant


def _peaks(radius: Tensor, node: Tensor, power: int, epsilon: float, cost: Cost) -> tuple[Tensor, Tensor]:
    """Bounds on the angle at which sin(angle)^power times the kernel peaks, over all nodes; two tensors (K,)."""
    smallest, largest = node.aminmax(dim=1)
    if cost == "norm":
        # power cot(angle) is the slope of the distance over epsilon, which lies between 0 and min(r, R) / epsilon.
        pull = torch.minimum(radius, largest) / epsilon
        return torch.atan2(torch.full_like(pull, power), pull), torch.full_like(pull, math.pi / 2)
    # power cos(angle) = pull sin(angle)^2 with pull = 2 r R / epsilon.
    pulls = (2 * radius * r / epsilon for r in (largest, smallest))
    first, last = (torch.acos(2 * pull / (power + (power**2 + 4 * pull.square()).sqrt())) for pull in pulls)
    return first, last


def _panel(low: Tensor, high: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and log-weights on each of K intervals, two tensors (K, num)."""
    node, weight = _gauss_legendre(num)
    half = ((high - low) / 2)[:, None]
    return low[:, None] + half * (node + 1), half.log() + weight.log()


@cache
def _gauss_legendre(num: int) -> tuple[Tensor, Tensor]:
    node, weight = np.polynomial.legendre.leggauss(num)
    return torch.from_numpy(node), torch.from_numpy(weight)
