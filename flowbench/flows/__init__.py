"""The mathematics of flows, in plain torch: paths, couplings, weights, solvers, likelihoods, bijectors."""

from __future__ import annotations

from flowbench.flows.autoregressive.affine import AffineBlock, Bijector, CausalNetwork
from flowbench.flows.autoregressive.flow import AutoregressiveFlow
from flowbench.flows.autoregressive.guidance import AutoregressiveGuidance
from flowbench.flows.autoregressive.guided_gaussian import GuidanceRule, guided_gaussian
from flowbench.flows.autoregressive.inversion import InverseMethod, Inversion, SequentialInverse
from flowbench.flows.autoregressive.jacobi import AutoInverse, JacobiInverse
from flowbench.flows.autoregressive.patch import patchify, unpatchify
from flowbench.flows.autoregressive.permutation import Permutation, alternating, network_grid, permute
from flowbench.flows.coupling.base import Coupling, squared_distances
from flowbench.flows.coupling.conditional import ConditionalCoupling
from flowbench.flows.coupling.entropic import (
    SchrodingerBridgeCoupling,
    SinkhornCoupling,
    UnbalancedCoupling,
    sinkhorn_plan,
)
from flowbench.flows.coupling.exact import IndependentCoupling, OptimalTransportCoupling
from flowbench.flows.coupling.partial import PartialCoupling
from flowbench.flows.coupling.semidiscrete import SemidiscreteDual, SemidiscretePotential, chi_squared
from flowbench.flows.flow_map.base import FlowMapObjective, JumpBatch, jumped
from flowbench.flows.flow_map.jumps import Composition, Jumps, Renoise
from flowbench.flows.flow_map.lagrangian import Lagrangian
from flowbench.flows.flow_map.mean_flow import MeanFlow
from flowbench.flows.flow_map.semigroup import Progressive, Shortcut
from flowbench.flows.flow_map.solution import ConsistencyTraining, JumpsToData, SolutionConsistency
from flowbench.flows.flow_map.times import BothWays, DyadicPairs, JumpTimes, LogitNormalPairs, UniformPairs
from flowbench.flows.guidance.classifier_free import ClassifierFreeGuidance, Guidance
from flowbench.flows.guidance.ratio_aware import RatioAwareGuidance, RatioProfile, ratio_profile
from flowbench.flows.likelihood.change_of_variables import (
    Likelihood,
    bits_per_dim,
    log_likelihood,
    sample_with_log_prob,
)
from flowbench.flows.likelihood.divergence import Divergence, ExactDivergence, HutchinsonDivergence
from flowbench.flows.objective.base import ErrorWeight, Objective
from flowbench.flows.objective.predictions import DataObjective, NoiseObjective, ScoreObjective, VelocityObjective
from flowbench.flows.path.affine import CosinePath, LinearPath, TargetConditionalPath
from flowbench.flows.path.base import Path, PathCoefficients, PathSample
from flowbench.flows.path.bridge import SchrodingerBridgePath
from flowbench.flows.path.diffusion import VariancePreservingPath
from flowbench.flows.path.reschedule import RescheduledField
from flowbench.flows.solver.adaptive import DormandPrince
from flowbench.flows.solver.base import ConditionedField, Field, Refinement, Solution, Solver, SolverStats
from flowbench.flows.solver.diffusion import DDIM, DPMSolverPlusPlus2M, EulerMaruyama
from flowbench.flows.solver.fixed_step import ButcherTableau, Euler, FixedStepSolver, Heun, Midpoint, RungeKutta4
from flowbench.flows.solver.time_grid import CosineGrid, EDMGrid, LogitNormalGrid, TimeGrid, UniformGrid
from flowbench.flows.source.base import GaussianSource, Source
from flowbench.flows.source.low_frequency import LowFrequencySource
from flowbench.flows.source.mixture import GaussianMixtureSource
from flowbench.flows.source.pruned import PrunedSource
from flowbench.flows.source.radial import NormAlignedSource, RadialSource
from flowbench.flows.source.von_mises_fisher import VonMisesFisherSource
from flowbench.flows.time import LogitNormalTimes, PointTimes, TimeDistribution, UniformTimes, UShapedTimes
from flowbench.flows.weight.base import UniformWeight, Weight, WeightResult
from flowbench.flows.weight.epsilon import EffectiveSampleEpsilon, ElbowEpsilon, EpsilonRule
from flowbench.flows.weight.gibbs import GibbsWeight
from flowbench.flows.weight.tilt import TransportDecomposition, transport_decomposition

__all__ = [
    "DDIM",
    "AffineBlock",
    "AutoInverse",
    "AutoregressiveFlow",
    "AutoregressiveGuidance",
    "Bijector",
    "BothWays",
    "ButcherTableau",
    "CausalNetwork",
    "ClassifierFreeGuidance",
    "Composition",
    "ConditionalCoupling",
    "ConditionedField",
    "ConsistencyTraining",
    "CosineGrid",
    "CosinePath",
    "Coupling",
    "DPMSolverPlusPlus2M",
    "DataObjective",
    "Divergence",
    "DormandPrince",
    "DyadicPairs",
    "EDMGrid",
    "EffectiveSampleEpsilon",
    "ElbowEpsilon",
    "EpsilonRule",
    "ErrorWeight",
    "Euler",
    "EulerMaruyama",
    "ExactDivergence",
    "Field",
    "FixedStepSolver",
    "FlowMapObjective",
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
    "JumpBatch",
    "JumpTimes",
    "Jumps",
    "JumpsToData",
    "Lagrangian",
    "Likelihood",
    "LinearPath",
    "LogitNormalGrid",
    "LogitNormalPairs",
    "LogitNormalTimes",
    "LowFrequencySource",
    "MeanFlow",
    "Midpoint",
    "NoiseObjective",
    "NormAlignedSource",
    "Objective",
    "OptimalTransportCoupling",
    "PartialCoupling",
    "Path",
    "PathCoefficients",
    "PathSample",
    "Permutation",
    "PointTimes",
    "Progressive",
    "PrunedSource",
    "RadialSource",
    "RatioAwareGuidance",
    "RatioProfile",
    "Refinement",
    "Renoise",
    "RescheduledField",
    "RungeKutta4",
    "SchrodingerBridgeCoupling",
    "SchrodingerBridgePath",
    "ScoreObjective",
    "SemidiscreteDual",
    "SemidiscretePotential",
    "SequentialInverse",
    "Shortcut",
    "SinkhornCoupling",
    "Solution",
    "SolutionConsistency",
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
    "UniformPairs",
    "UniformTimes",
    "UniformWeight",
    "VariancePreservingPath",
    "VelocityObjective",
    "VonMisesFisherSource",
    "Weight",
    "WeightResult",
    "alternating",
    "bits_per_dim",
    "chi_squared",
    "guided_gaussian",
    "jumped",
    "log_likelihood",
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
