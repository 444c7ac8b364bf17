"""Rules that choose the temperature of a Gibbs weight from samples of the source and of the data."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from flowbench.core.checks import check_count, check_number, check_scale
from flowbench.flows.weight.cost import Cost, cost_matrix, flat_points
from flowbench.flows.weight.tilt import effective_share, squared_variation

__all__ = ["EffectiveSampleEpsilon", "ElbowEpsilon", "EpsilonRule", "FittedEpsilon", "random_points"]


class EpsilonRule(ABC):
    """Chooses epsilon once, before training, on at most ``num_points`` points a side.

    Args:
        num_points: points of each side that the rule looks at, >= 2; memory and time grow with its square.

    Example:
        >>> class MeanCost(EpsilonRule):
        ...     def _choose(self, costs, num_dims):
        ...         return costs.mean().item()
        >>> x0, x1 = torch.tensor([[0.0], [0.0]]), torch.tensor([[0.0], [1.0]])
        >>> MeanCost().choose(x0, x1, "norm", torch.Generator())
        0.5
    """

    def __init__(self, num_points: int = 1024) -> None:
        check_count("num_points", num_points, at_least=2)
        self.num_points = num_points

    @torch.no_grad()
    def choose(self, source_points: Tensor, data_points: Tensor, cost: Cost, generator: torch.Generator) -> float:
        """The temperature for these points.

        Args:
            source_points: shape (N, *D).
            data_points: shape (M, *D).
            cost: the weight's cost, "norm" or "squared".
            generator: draws the points that are looked at.

        Raises:
            ValueError: with fewer than two points a side, points that are not finite, or where the rule finds nothing.
        """
        if min(len(source_points), len(data_points)) < 2:
            raise ValueError(
                f"epsilon is chosen on at least 2 points a side, got {len(source_points)} and {len(data_points)}:"
                " give epsilon or kappa as a number"
            )
        source, data = (random_points(x, self.num_points, generator) for x in (source_points, data_points))
        costs = cost_matrix(source, data, cost)
        if not costs.isfinite().all():
            raise ValueError("epsilon is chosen on points that are not finite: check the source and the data")
        return self._choose(costs, data_points[0].numel())

    @abstractmethod
    def _choose(self, costs: Tensor, num_dims: int) -> float:
        """Temperature for a float64 matrix of costs between points of ``num_dims`` dimensions."""


class ElbowEpsilon(EpsilonRule):
    """The elbow of the marginal tilt over kappa = epsilon / sqrt(d).

    The paper takes, of k values of kappa evenly spaced in log scale, the smallest where the relative variance of the
    marginal tilt CV^2 "starts to flatten", as one reads a scree plot. Our reading: the curve is
    y = CV^2 / (1 + CV^2), of the worse of the two marginals, over log kappa; the elbow is its point farthest below the
    chord from the first to the last kappa, with both axes scaled to [0, 1]. y is the share of points that the tilt
    wastes and lies in [0, 1). CV^2 itself saturates at the number of points, and its elbow would sit where it is in
    the tens; log CV^2 never flattens, it ends in a line of slope -2.

    The choice depends on the grid: the narrower, the more so. Units of the data matter as well: kappa is meant for
    coordinates of order one.

    Args:
        num_kappas: k, 3 to 10,000.
        kappa_min: smallest kappa, in [1e-12, 1e12].
        kappa_max: largest kappa, above kappa_min, at most 1e12.
        num_points: points of each side, >= 2.

    References:
        Calvo-Ordonez et al. 2025, arXiv 2507.22270 (W-CFM). Distance to the chord: Satopaa et al. 2011, "Finding a
        Kneedle in a Haystack".

    Example:
        >>> rule = ElbowEpsilon(num_kappas=3, kappa_min=0.1, kappa_max=10.0)
        >>> costs = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)  # all are nearer to data point 0
        >>> kappa, tilt = rule.curve(costs, num_dims=1)
        >>> kappa
        tensor([ 0.1000,  1.0000, 10.0000], dtype=torch.float64)
        >>> tilt  # ((1 - w) / (1 + w))^2 with w = exp(-1 / kappa)
        tensor([0.9998, 0.2136, 0.0025], dtype=torch.float64)
    """

    def __init__(
        self, num_kappas: int = 25, kappa_min: float = 0.01, kappa_max: float = 10.0, num_points: int = 1024
    ) -> None:
        super().__init__(num_points)
        check_count("num_kappas", num_kappas, at_least=3, at_most=10_000)
        check_scale("kappa_min", kappa_min)
        check_scale("kappa_max", kappa_max)
        if kappa_min >= kappa_max:
            raise ValueError(f"need kappa_min < kappa_max, got kappa_min={kappa_min} and kappa_max={kappa_max}")
        self.num_kappas = num_kappas
        self.kappa_min = kappa_min
        self.kappa_max = kappa_max

    def curve(self, costs: Tensor, num_dims: int) -> tuple[Tensor, Tensor]:
        """The kappas and, for each, CV^2 of the worse marginal of a matrix of costs; two float64 tensors (k,)."""
        ends = math.log(self.kappa_min), math.log(self.kappa_max)
        kappas = torch.linspace(*ends, self.num_kappas, dtype=torch.float64).exp()
        scaled = -costs.double() / math.sqrt(num_dims)
        tilt = [
            max(squared_variation(torch.logsumexp(scaled / kappa, dim)).item() for dim in (0, 1))
            for kappa in kappas.tolist()
        ]
        return kappas, torch.tensor(tilt, dtype=torch.float64)

    def _choose(self, costs: Tensor, num_dims: int) -> float:
        kappas, tilt = self.curve(costs, num_dims)
        y, x = tilt / (1 + tilt), torch.linspace(0, 1, len(tilt), dtype=torch.float64)
        drop = y[0] - y[-1]
        # A straight or arched curve has no point below its chord, up to rounding.
        below = (1 - x) - (y - y[-1]) / drop if drop > 1e-9 else torch.zeros_like(x)
        if below.max() < 1e-3:
            raise ValueError(
                f"the tilt has no elbow for kappa in [{self.kappa_min:g}, {self.kappa_max:g}] (it goes from"
                f" {tilt[0]:.3g} to {tilt[-1]:.3g}): widen the range, or give epsilon or kappa as a number"
            )
        return kappas[below.argmax()].item() * math.sqrt(num_dims)

    def __repr__(self) -> str:
        options = f"num_kappas={self.num_kappas}, kappa_min={self.kappa_min:g}, kappa_max={self.kappa_max:g}"
        return f"ElbowEpsilon({options}, num_points={self.num_points})"


class EffectiveSampleEpsilon(EpsilonRule):
    """The smallest epsilon that keeps a wanted share of the effective sample.

    ESS/B of the weights grows with epsilon, from a single pair to all of them, so the solution is unique. It fixes
    what the weight costs in variance, not what it costs in bias.

    Args:
        share: wanted effective sample size over the number of pairs, in (0, 1).
        num_points: points of each side, >= 2; all their pairs count.

    Example:
        >>> x0, x1 = torch.tensor([[0.0], [0.0]]), torch.tensor([[0.0], [1.0]])
        >>> epsilon = EffectiveSampleEpsilon(share=0.9).choose(x0, x1, "norm", torch.Generator())
        >>> round(epsilon, 4)  # 1 / ln 2: weights 1 and 1/2, whose effective share (3/2)^2 / (2 * 5/4) is 0.9
        1.4427
    """

    def __init__(self, share: float = 0.5, num_points: int = 512) -> None:
        super().__init__(num_points)
        check_number("share", share, above=0, below=1)
        self.share = share

    def _choose(self, costs: Tensor, num_dims: int) -> float:
        cost = costs.double().flatten() - costs.min()
        if not cost.max() > 0:
            raise ValueError("all pairs cost the same, so every epsilon keeps them all: use UniformWeight")
        low, high = (math.log(cost.max().item()) + shift for shift in (-20.0, 20.0))
        least, most = (effective_share(cost * -math.exp(-end)).item() for end in (low, high))
        if not least < self.share <= most:
            raise ValueError(
                f"no epsilon keeps share={self.share:g} of the effective sample of these {len(cost)} pairs, which goes"
                f" from {least:.3g} to {most:.10g}: choose a share between them"
            )
        # 40 halvings of 40 nats leave a relative error of 4e-11.
        for _ in range(40):
            middle = (low + high) / 2
            enough = effective_share(cost * -math.exp(-middle)).item() >= self.share
            low, high = (low, middle) if enough else (middle, high)
        return math.exp(high)

    def __repr__(self) -> str:
        return f"EffectiveSampleEpsilon(share={self.share:g}, num_points={self.num_points})"


class FittedEpsilon(nn.Module):
    """The temperature that a fit used; a plain number that travels in the checkpoint as extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.value: float | None = None

    def get_extra_state(self) -> dict[str, float | None]:
        """The temperature, None before the fit."""
        return {"epsilon": self.value}

    def set_extra_state(self, state: dict[str, float | None]) -> None:
        """Take over what :meth:`get_extra_state` gave."""
        self.value = state["epsilon"]


def random_points(x: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """At most ``num`` distinct points of x (N, *D) as drawn, flat and in float64."""
    index = torch.randperm(len(x), generator=generator, device=generator.device)[:num]
    return flat_points(x[index.to(x.device)]).double()
