"""Densities of a flow that follows a velocity field: the instantaneous change of variables."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial

import torch
from torch import Tensor

from flowbench.core.seeds import generator
from flowbench.families.answers import SolvedDensity
from flowbench.families.base import DensityKind, FlowModule
from flowbench.families.conditioning.condition import Condition
from flowbench.families.latents.space import LatentSpace
from flowbench.flows import (
    Divergence,
    Field,
    Guidance,
    Likelihood,
    Objective,
    Path,
    Solver,
    Source,
    log_likelihood,
    sample_with_log_prob,
)

__all__ = ["VelocityFlow"]


class VelocityFlow(FlowModule):
    """A flow along a velocity field, whose log-density is integrated beside its points.

    Subclasses define :meth:`field` and set the attributes below in their constructor.

    Attributes:
        path: of the training; its interval is that of the integration.
        source: where the flow starts.
        likelihood_solver: integrates log-densities.
        divergence: trace of the field's Jacobian.
        objective: what the network predicts.
    """

    path: Path
    source: Source
    likelihood_solver: Solver
    divergence: Divergence
    objective: Objective

    @property
    def density(self) -> DensityKind:
        """``ode``: a density through a solver; a family whose sampler is no solution of it says ``none``."""
        return "ode"

    @abstractmethod
    def field(self, condition: Condition, guidance: Guidance | None = None) -> Field:
        """The velocity field under a condition along the path of the training, guided by `guidance`; None is not."""

    @torch.no_grad()
    def sample_with_log_prob(
        self, noise: Tensor, condition: Condition | Tensor | None = None, *, index: Tensor | None = None, seed: int = 0
    ) -> tuple[Tensor, Likelihood]:
        """Unguided samples and their log-density from one pass of the likelihood's solver.

        Args:
            noise: source points, shape (B, *flow_shape).
            condition: of the samples; labels alone, shape (B,), will do.
            index: sample indices that key the probes; 0..B-1 when None.
            seed: the evaluation seed.

        Returns:
            Samples, shape (B, *D), and their likelihood in nats.

        Raises:
            ValueError: in a latent space, where a sample's density is not known, or of a flow with a conditioner.
        """
        self._check_has_density()
        if isinstance(self.space, LatentSpace) or self.conditioner is not None:
            raise ValueError("densities of samples are those of unconditioned flows in data space: use sample()")
        given = self.check_condition(condition, len(noise))
        index = torch.arange(len(noise)) if index is None else index
        probes = [generator(seed, "probes", int(i)) for i in index]
        with self.full_precision():
            return sample_with_log_prob(
                self.field(given),
                noise,
                self.source.log_prob,
                self.likelihood_solver,
                self.divergence,
                probes,
                self.path.interval,
            )

    def flow_log_prob(self, x: Tensor, condition: Condition, index: Tensor, seed: int) -> Tensor:
        """Instantaneous change of variables along the backward solution (Chen et al., 2018, arXiv 1806.07366)."""
        return self._likelihood(self.likelihood_solver, x, condition, index, seed).log_prob

    def solved_density(self, network_evaluations: int | None = None, *, refined: bool = False) -> SolvedDensity | None:
        """By the likelihood's solver with so many evaluations, or by its refinement, with the same probes."""
        if self.density == "none":
            return None
        solver = self.likelihood_solver
        if network_evaluations is not None:
            solver = solver.with_evaluations(network_evaluations)
        if not refined:
            return SolvedDensity(partial(self._likelihood, solver), self._likelihood_method(solver))
        stricter = solver.refined()
        if stricter is None:
            return None
        return SolvedDensity(partial(self._likelihood, stricter.solver), stricter.description, stricter.remaining)

    def _likelihood(self, solver: Solver, x: Tensor, condition: Condition, index: Tensor, seed: int) -> Likelihood:
        probes = [generator(seed, "probes", int(i)) for i in index]
        return log_likelihood(
            self.field(condition), x, self.source.log_prob, solver, self.divergence, probes, self.path.interval
        )

    def _likelihood_method(self, solver: Solver) -> str:
        given = "" if self.conditioner is None else f"/given-{self.conditioner.name}"
        predicted = "" if self.objective.sampler_name is None else f"/{self.objective.sampler_name}"
        return f"{solver!r}/{self.divergence!r}{predicted}{given}"
