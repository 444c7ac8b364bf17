"""Whether a likelihood has converged: the first test points again, by a stricter solve."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import lightning as L
import torch
from torch import Tensor

from flowbench.data import Batch
from flowbench.evaluation.densities import of_test_samples
from flowbench.evaluation.override import SamplerOverride
from flowbench.evaluation.probe import Probe, Setup
from flowbench.families import FlowModule, SolvedDensity

__all__ = ["RefinedDensities", "RefinedLogDensities", "solved_at", "solved_values"]


def solved_at(
    module: L.LightningModule | None, override: SamplerOverride, *, refined: bool = False
) -> SolvedDensity | None:
    """A flow's log-density by a solver at a point of a sweep, or by a stricter one.

    Args:
        module: any.
        override: what the sweep imposes; network evaluations are those of the solve.
        refined: the stricter solve.

    Returns:
        None for a module whose likelihood is not of the kind `ode`, at a scale of guidance, and where there is none.

    Raises:
        ValueError: when the solver cannot spend exactly those evaluations.
    """
    if not isinstance(module, FlowModule) or module.describe().likelihood != "ode" or override.guidance is not None:
        return None
    return module.solved_density(override.network_evaluations, refined=refined)


def solved_values(setup: Setup, density: SolvedDensity) -> Tensor:
    """Log-densities of the test samples by a solve, and their standard errors over the probes; a collective.

    Returns:
        Nats, float64, shape (N, 2); the errors are NaN where there are none.
    """
    flow = setup.module
    assert isinstance(flow, FlowModule), "a flow gave the density"

    def values(batch: Batch) -> Tensor:
        found = flow.solved_likelihood(density, batch)
        error = found.probe_standard_error
        log_prob = found.log_prob.double()
        return torch.stack([log_prob, torch.full_like(log_prob, torch.nan) if error is None else error.double()], 1)

    return of_test_samples(setup, values)


@dataclass(frozen=True)
class RefinedDensities:
    """Log-densities of the first test points by a stricter solve than the flow's own.

    Attributes:
        log_prob: in nats, float64, shape (K,).
        standard_error: of each over the probes of the divergence, shape (K,); None where it is exact, or has one probe.
        remaining: share of the error of the flow's own that they keep, in [0, 1).
        method: how the solve differs, for the protocol.
    """

    log_prob: Tensor
    standard_error: Tensor | None
    remaining: float
    method: str

    def error_of(self, log_prob: Tensor) -> float:
        """Mean estimated error of the flow's own log-densities of those points, or of more, shape (N,), in nats."""
        difference = log_prob[: len(self.log_prob)].double() - self.log_prob[: len(log_prob)]
        return float(difference.abs().mean()) / (1 - self.remaining)

    def first(self, num: int) -> RefinedDensities:
        """Those of the first `num` points."""
        error = None if self.standard_error is None else self.standard_error[:num]
        return replace(self, log_prob=self.log_prob[:num], standard_error=error)


@dataclass(frozen=True)
class RefinedLogDensities(Probe[RefinedDensities]):
    """The first test points' log-densities by a stricter solve, for likelihoods of the kind `ode`.

    Attributes:
        num_points: how many; at most as many as the evaluator measures the likelihood of.
    """

    num_points: int
    stage = "likelihood check"
    follows_sampler = True

    def key(self) -> Hashable:
        """One pass serves all numbers of points."""
        return RefinedLogDensities

    def merge(self, other: RefinedLogDensities) -> RefinedLogDensities:
        """The larger number of points."""
        return replace(self, num_points=max(self.num_points, other.num_points))

    def ask(self, setup: Setup) -> RefinedDensities | None:
        """The first points in a pass of their own; a collective."""
        density = solved_at(setup.module, setup.override, refined=True)
        if density is None:
            return None
        num = self.num_points if setup.num_likelihood is None else min(self.num_points, setup.num_likelihood)
        log_prob, error = solved_values(replace(setup, num_likelihood=num), density).unbind(1)
        known = not bool(error.isnan().all())
        return RefinedDensities(log_prob, error if known else None, density.remaining, density.method)
