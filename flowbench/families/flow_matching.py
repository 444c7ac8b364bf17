"""Conditional flow matching: one module, one small object per axis."""

from __future__ import annotations

import torch
from torch import Tensor

from flowbench.data import DataSpec
from flowbench.families.base import FlowModule, NetworkFactory, Trajectory
from flowbench.families.optimization import OptimizerConfig
from flowbench.families.space import Space
from flowbench.families.training import Loss
from flowbench.flows import (
    ClassifierFreeGuidance,
    Coupling,
    Divergence,
    ExactDivergence,
    Field,
    FixedStepSolver,
    GaussianSource,
    HutchinsonDivergence,
    IndependentCoupling,
    LinearPath,
    Midpoint,
    Path,
    RungeKutta4,
    Solver,
    Source,
    UniformWeight,
    Weight,
    log_likelihood,
)
from flowbench.seeds import generator

__all__ = ["FlowMatching"]

# Above this many dimensions an exact trace costs more than a handful of probes.
EXACT_TRACE_DIMS = 8


class FlowMatching(FlowModule):
    """Flow matching by regression on conditional velocities (CFM).

    The network regresses the velocity of a path between a source point and a data point; the marginal field carries
    the source to the data. Coupling, weight, path, source, guidance and solver are independent choices.

    References:
        Lipman et al. (2023), Flow Matching for Generative Modeling, arXiv 2210.02747, eq. 9.
        Liu et al. (2023), Flow Straight and Fast, arXiv 2209.03003, eq. 1.
        Tong et al. (2024), Improving and Generalizing Flow-Based Generative Models, arXiv 2302.00482, alg. 2.

    Args:
        spec: the data's shape, classes and value grid.
        network: builds the velocity network from the flow's shape and the number of classes.
        path: interpolation; None is the straight line.
        source: where the flow starts; None is the standard normal.
        coupling: pairs source with data; None draws pairs independently.
        weight: how much a pair counts; None counts all alike.
        guidance: classifier-free guidance of the sampler; None is scale 1.
        solver: integrates samples; None is the midpoint rule with 20 steps.
        likelihood_solver: integrates log-densities; None is Runge-Kutta 4 with 32 steps (on digits
            within 0.001 bits/dim of 128 steps; 16 steps flattered the model by 0.01).
        divergence: trace of the Jacobian; None is exact up to 8 dimensions, else two fixed Rademacher probes.
        space: where the flow lives; None means the data space.
        conditional: condition on class labels.
        label_dropout: share of training labels replaced by the null label, in [0, 1).
        optimizer: AdamW and its schedule.
        ema_decay: decay of the averaged weights, in [0, 1).
        compile: compile the network.
    """

    density = "ode"

    def __init__(
        self,
        spec: DataSpec,
        network: NetworkFactory,
        *,
        path: Path | None = None,
        source: Source | None = None,
        coupling: Coupling | None = None,
        weight: Weight | None = None,
        guidance: ClassifierFreeGuidance | None = None,
        solver: Solver | None = None,
        likelihood_solver: Solver | None = None,
        divergence: Divergence | None = None,
        space: Space | None = None,
        conditional: bool = False,
        label_dropout: float = 0.1,
        optimizer: OptimizerConfig | None = None,
        ema_decay: float = 0.999,
        compile: bool = False,
    ) -> None:
        super().__init__(
            spec,
            space=space,
            conditional=conditional,
            label_dropout=label_dropout,
            optimizer=optimizer,
            ema_decay=ema_decay,
            compile=compile,
        )
        self.network = network(self.flow_shape, self.num_classes)
        self.path = path or LinearPath()
        self.source = source or GaussianSource()
        self.coupling = coupling or IndependentCoupling()
        self.weight = weight or UniformWeight()
        self.guidance = guidance or ClassifierFreeGuidance()
        self.check_guidance(self.guidance.scale)
        self.solver = solver or Midpoint(num_steps=20)
        self.likelihood_solver = likelihood_solver or RungeKutta4(num_steps=32)
        few = torch.Size(self.flow_shape).numel() <= EXACT_TRACE_DIMS
        self.divergence = divergence or (ExactDivergence() if few else HutchinsonDivergence(num_probes=2))

    @property
    def sweeps(self) -> bool:
        """A solver can be given any number of evaluations."""
        return True

    @property
    def sampler_name(self) -> str:
        """The solver of the samples."""
        return repr(self.solver)

    @property
    def guidance_scale(self) -> float | None:
        """Scale of classifier-free guidance."""
        return None if self.num_classes is None else self.guidance.scale

    @property
    def likelihood_method(self) -> str:
        """The solver and the divergence of the log-densities."""
        return f"{self.likelihood_solver!r}/{self.divergence!r}"

    # ---- training -------------------------------------------------------------------------------------

    def flow_loss(self, x: Tensor, label: Tensor | None, rng: torch.Generator) -> Loss:
        """Weighted mean squared error of the velocity, averaged over dimensions and batch."""
        noise = self.source.sample(len(x), self.flow_shape, rng, x.device)
        noise = noise[self.coupling(noise, x, rng)]
        first, last = self.path.interval
        t = first + (last - first) * torch.rand(len(x), generator=rng, device=x.device)
        pair = self.path.sample(noise, x, t)
        error = (self.network(pair.xt, t, label) - pair.velocity).float().square().flatten(1).mean(1)
        weighted = self.weight(noise, x)
        cost = (noise - x).detach().flatten(1).square().sum(1).mean()
        parts = {"unweighted_loss": error.detach().mean(), "coupling_cost": cost, **weighted.diagnostics}
        return Loss((weighted.weight * error).mean(), parts)

    # ---- field and solver -----------------------------------------------------------------------------

    @property
    def encoding_evaluations(self) -> float | None:
        """Those of the sampler's solver without guidance."""
        return _fixed_cost(self.solver)

    @property
    def likelihood_evaluations(self) -> float | None:
        """Those of the likelihood's solver; each also costs one backward pass per probe."""
        return _fixed_cost(self.likelihood_solver)

    def field(self, label: Tensor | None, guidance: ClassifierFreeGuidance | None = None) -> Field:
        """The velocity field of some labels, guided when `guidance` is given."""
        guide = guidance or ClassifierFreeGuidance()
        return lambda t, x: guide.velocity(self.network, x, t.to(x).expand(len(x)), label)

    def _times(self, num: int = 2) -> Tensor:
        """Equally spaced times over the interval where the path's velocity is finite."""
        return torch.linspace(*self.path.interval, num, dtype=torch.float64)

    def flow_sample(
        self, noise: Tensor, label: Tensor | None, network_evaluations: int | None, guidance: float | None
    ) -> tuple[Tensor, float]:
        """Integrate the field from 0 to 1; guided evaluations count twice.

        Raises:
            ValueError: when the evaluations cannot be shared out between the two branches of guidance.
        """
        guide = self.guidance if guidance is None else ClassifierFreeGuidance(guidance)
        cost = 1 if label is None else guide.evaluations_per_call
        solver = self.solver
        if network_evaluations is not None:
            if network_evaluations % cost:
                raise ValueError(f"a guided sample takes an even number of evaluations, got {network_evaluations}")
            solver = solver.with_evaluations(network_evaluations // cost)
        solution = solver.solve(self.field(label, guide), noise, self._times())
        return solution.states[-1], float(cost * solution.stats.network_evaluations)

    def flow_encode(self, z: Tensor, label: Tensor | None) -> Tensor:
        """Integrate the unguided field from the data end of the path's interval to its source end.

        The sampler's solver runs backward with the same steps. An explicit method is not its own inverse: encoding and
        decoding return a point up to O(h^p), h the step and p the solver's order.
        """
        return self.solver.solve(self.field(label), z, self._times().flip(0)).states[-1]

    @torch.no_grad()
    def trajectory(self, noise: Tensor, condition: Tensor | None = None, num_points: int = 33) -> Trajectory:
        """States and velocities of the learned ODE at equal times, two midpoint steps between neighbours."""
        field = self.field(self.check_condition(condition, len(noise)))
        times = self._times(num_points)
        states = Midpoint(num_steps=2 * (num_points - 1)).solve(field, noise, times).states
        velocities = torch.stack([field(t, x) for t, x in zip(times, states, strict=True)])
        return Trajectory(states, times, velocities)

    def flow_log_prob(self, x: Tensor, label: Tensor | None, index: Tensor, seed: int) -> Tensor:
        """Instantaneous change of variables along the backward solution (Chen et al., 2018, arXiv 1806.07366)."""
        probes = [generator(seed, "probes", int(i)) for i in index]
        return log_likelihood(
            self.field(label),
            x,
            self.source.log_prob,
            self.likelihood_solver,
            self.divergence,
            probes,
            self.path.interval,
        ).log_prob


def _fixed_cost(solver: Solver) -> float | None:
    """Evaluations of a solver that knows them before it starts; None for an adaptive one."""
    return float(solver.num_steps * solver.evaluations_per_step) if isinstance(solver, FixedStepSolver) else None
