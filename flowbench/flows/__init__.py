"""The mathematics of flows, in plain torch: paths, couplings, weights, solvers, likelihoods, bijectors."""

from __future__ import annotations

from flowbench.flows.affine import AffineBlock, Bijector, CausalNetwork
from flowbench.flows.autoregressive import AutoregressiveFlow
from flowbench.flows.autoregressive_guidance import AutoregressiveGuidance
from flowbench.flows.coupling import (
    Coupling,
    IndependentCoupling,
    OptimalTransportCoupling,
    SinkhornCoupling,
    sinkhorn_plan,
    squared_distances,
)
from flowbench.flows.guidance import ClassifierFreeGuidance, GuidanceRule, guided_gaussian
from flowbench.flows.inverse_jacobi import AutoInverse, JacobiInverse
from flowbench.flows.inversion import InverseMethod, Inversion, SequentialInverse
from flowbench.flows.likelihood import (
    Divergence,
    ExactDivergence,
    HutchinsonDivergence,
    Likelihood,
    bits_per_dim,
    log_likelihood,
)
from flowbench.flows.patch import patchify, unpatchify
from flowbench.flows.path import (
    CosinePath,
    LinearPath,
    Path,
    PathCoefficients,
    PathSample,
    VariancePreservingPath,
)
from flowbench.flows.permutation import Permutation, alternating, network_grid, permute
from flowbench.flows.solver import (
    ButcherTableau,
    DormandPrince,
    Euler,
    Field,
    FixedStepSolver,
    Heun,
    Midpoint,
    RungeKutta4,
    Solution,
    Solver,
    SolverStats,
)
from flowbench.flows.source import GaussianSource, Source
from flowbench.flows.weight import GibbsWeight, UniformWeight, Weight, WeightResult, marginal_tilt

__all__ = [
    "AffineBlock",
    "AutoInverse",
    "AutoregressiveFlow",
    "AutoregressiveGuidance",
    "Bijector",
    "ButcherTableau",
    "CausalNetwork",
    "ClassifierFreeGuidance",
    "CosinePath",
    "Coupling",
    "Divergence",
    "DormandPrince",
    "Euler",
    "ExactDivergence",
    "Field",
    "FixedStepSolver",
    "GaussianSource",
    "GibbsWeight",
    "GuidanceRule",
    "Heun",
    "HutchinsonDivergence",
    "IndependentCoupling",
    "InverseMethod",
    "Inversion",
    "JacobiInverse",
    "Likelihood",
    "LinearPath",
    "Midpoint",
    "OptimalTransportCoupling",
    "Path",
    "PathCoefficients",
    "PathSample",
    "Permutation",
    "RungeKutta4",
    "SequentialInverse",
    "SinkhornCoupling",
    "Solution",
    "Solver",
    "SolverStats",
    "Source",
    "UniformWeight",
    "VariancePreservingPath",
    "Weight",
    "WeightResult",
    "alternating",
    "bits_per_dim",
    "guided_gaussian",
    "log_likelihood",
    "marginal_tilt",
    "network_grid",
    "patchify",
    "permute",
    "sinkhorn_plan",
    "squared_distances",
    "unpatchify",
]
