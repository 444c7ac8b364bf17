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
from flowbench.flows.coupling_conditional import ConditionalCoupling
from flowbench.flows.coupling_entropic import SchrodingerBridgeCoupling, UnbalancedCoupling
from flowbench.flows.coupling_partial import PartialCoupling
from flowbench.flows.diffusion_solver import DDIM, DPMSolverPlusPlus2M, EulerMaruyama
from flowbench.flows.guidance import ClassifierFreeGuidance, Guidance
from flowbench.flows.guided_gaussian import GuidanceRule, guided_gaussian
from flowbench.flows.inverse_jacobi import AutoInverse, JacobiInverse
from flowbench.flows.inversion import InverseMethod, Inversion, SequentialInverse
from flowbench.flows.likelihood import (
    Divergence,
    ExactDivergence,
    HutchinsonDivergence,
    Likelihood,
    bits_per_dim,
    log_likelihood,
    sample_with_log_prob,
)
from flowbench.flows.patch import patchify, unpatchify
from flowbench.flows.path import (
    CosinePath,
    LinearPath,
    Path,
    PathCoefficients,
    PathSample,
    SchrodingerBridgePath,
    TargetConditionalPath,
    VariancePreservingPath,
)
from flowbench.flows.permutation import Permutation, alternating, network_grid, permute
from flowbench.flows.ratio_aware_guidance import RatioAwareGuidance, RatioProfile, ratio_profile
from flowbench.flows.reschedule import RescheduledField
from flowbench.flows.solver import (
    ButcherTableau,
    ConditionedField,
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
from flowbench.flows.source_mixture import GaussianMixtureSource
from flowbench.flows.source_pruned import PrunedSource
from flowbench.flows.source_radial import NormAlignedSource, RadialSource
from flowbench.flows.source_von_mises_fisher import VonMisesFisherSource
from flowbench.flows.time import LogitNormalTimes, PointTimes, TimeDistribution, UniformTimes, UShapedTimes
from flowbench.flows.time_grid import CosineGrid, EDMGrid, LogitNormalGrid, TimeGrid, UniformGrid
from flowbench.flows.weight import GibbsWeight, UniformWeight, Weight, WeightResult, marginal_tilt
from flowbench.flows.weight_epsilon import EffectiveSampleEpsilon, ElbowEpsilon, EpsilonRule
from flowbench.flows.weight_tilt import TransportDecomposition, transport_decomposition

__all__ = [
    "DDIM",
    "AffineBlock",
    "AutoInverse",
    "AutoregressiveFlow",
    "AutoregressiveGuidance",
    "Bijector",
    "ButcherTableau",
    "CausalNetwork",
    "ClassifierFreeGuidance",
    "ConditionalCoupling",
    "ConditionedField",
    "CosineGrid",
    "CosinePath",
    "Coupling",
    "DPMSolverPlusPlus2M",
    "Divergence",
    "DormandPrince",
    "EDMGrid",
    "EffectiveSampleEpsilon",
    "ElbowEpsilon",
    "EpsilonRule",
    "Euler",
    "EulerMaruyama",
    "ExactDivergence",
    "Field",
    "FixedStepSolver",
    "GaussianMixtureSource",
    "GaussianSource",
    "GibbsWeight",
    "Guidance",
    "GuidanceRule",
    "Heun",
    "HutchinsonDivergence",
    "IndependentCoupling",
    "InverseMethod",
    "Inversion",
    "JacobiInverse",
    "Likelihood",
    "LinearPath",
    "LogitNormalGrid",
    "LogitNormalTimes",
    "Midpoint",
    "NormAlignedSource",
    "OptimalTransportCoupling",
    "PartialCoupling",
    "Path",
    "PathCoefficients",
    "PathSample",
    "Permutation",
    "PointTimes",
    "PrunedSource",
    "RadialSource",
    "RatioAwareGuidance",
    "RatioProfile",
    "RescheduledField",
    "RungeKutta4",
    "SchrodingerBridgeCoupling",
    "SchrodingerBridgePath",
    "SequentialInverse",
    "SinkhornCoupling",
    "Solution",
    "Solver",
    "SolverStats",
    "Source",
    "TargetConditionalPath",
    "TimeDistribution",
    "TimeGrid",
    "TransportDecomposition",
    "UShapedTimes",
    "UnbalancedCoupling",
    "UniformGrid",
    "UniformTimes",
    "UniformWeight",
    "VariancePreservingPath",
    "VonMisesFisherSource",
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
    "ratio_profile",
    "sample_with_log_prob",
    "sinkhorn_plan",
    "squared_distances",
    "transport_decomposition",
    "unpatchify",
]
