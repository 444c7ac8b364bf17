"""The likelihood of the test split."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import lightning as L
from torch import Tensor

from flowbench.core.checks import check_count, check_number
from flowbench.data import DataSpec, FlowDataModule
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.densities import log_densities
from flowbench.evaluation.measurement import Measurement, MetricInfo, unmeasured
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.override import SamplerOverride
from flowbench.evaluation.probe import Probe, Setup
from flowbench.evaluation.prospect import Prospect
from flowbench.families import FlowModule
from flowbench.flows import bits_per_dim
from flowbench.tasks.generation.likelihood_check import (
    RefinedDensities,
    RefinedLogDensities,
    solved_at,
    solved_values,
)

__all__ = [
    "Densities",
    "LogDensities",
    "NegativeLogLikelihood",
    "has_likelihood",
    "protocol_of",
    "scale_of",
    "value_of",
]


@dataclass(frozen=True)
class Densities:
    """Log-densities of the test split.

    Attributes:
        log_prob: in nats, shape (N,).
        kind: `exact`, `ode`, `bound`, or the `head` of a flow map.
        method: solver and divergence; empty where they are closed form.
        reports_bits_per_dim: whether they may be given in bits per dimension: not those of a flow of noisy data.
        given_label: whether they are those of the points given their labels.
        dequantize: how grey levels were placed: `uniform`, or `none` for the centres of the bins.
    """

    log_prob: Tensor
    kind: str = "exact"
    method: str = ""
    reports_bits_per_dim: bool = True
    given_label: bool = False
    dequantize: str = "uniform"


@dataclass(frozen=True)
class LogDensities(Probe[Densities]):
    """The log-density of every test sample; in a sweep of network evaluations by a solver that spends so many."""

    stage = "likelihood"
    follows_sampler = True

    def check(self, module: L.LightningModule, data: FlowDataModule) -> None:
        """Refuse a density that does not exist in the module's space; a family without any has no rows of it."""
        if has_likelihood(module):
            module.check_density()

    def check_sampling(self, module: L.LightningModule, override: SamplerOverride) -> None:
        """Refuse evaluations that the likelihood's solver cannot spend."""
        solved_at(module, override)

    def ask(self, setup: Setup) -> Densities | None:
        """Batch by batch of the test split; a collective."""
        flow = setup.module
        if not has_likelihood(flow):
            return None
        facts = flow.describe()
        method = facts.likelihood_method
        if not setup.override.axis:
            log_prob = log_densities(setup)
            assert log_prob is not None, "asked above"
        elif (density := solved_at(flow, setup.override)) is not None:
            log_prob, method = solved_values(setup, density)[:, 0], density.method
        else:
            return None
        return Densities(
            log_prob,
            facts.likelihood,
            method,
            facts.reports_bits_per_dim,
            flow.num_classes is not None,
            setup.data.dequantize,
        )


def has_likelihood(module: object) -> TypeGuard[FlowModule]:
    """Whether a module is a flow whose family has a density."""
    return isinstance(module, FlowModule) and module.describe().likelihood != "none"


class NegativeLogLikelihood(Metric):
    """Mean negative log-likelihood of the test split, with its kind in the protocol.

    A likelihood of the kind `ode` is worth what its solver is: one of a few steps is the density of no flow, and can
    lie far below every code length. So the first test points are solved again, with twice the steps or a tenth of the
    tolerances; from the differences follows `nll_error`, the mean error of a point that the solver made, in the unit of
    `nll`. Above `tolerance` the row of `nll` is `unconverged`: it stands in no claim and in no comparison. Exact
    likelihoods and bounds have no `nll_error`.

    Args:
        num_checked: test points that are solved again, >= 0, counted from the first; 0 checks none.
        tolerance: largest `nll_error` of a likelihood that has converged, in (0, 1e12], in the unit of `nll`.
        in_sweep: measured at every point of a sweep of network evaluations too, which the likelihood's solver spends.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> from flowbench.evaluation import Evaluator
        >>> Evaluator({"nll": NegativeLogLikelihood()}, num_likelihood=1000).metrics["nll"].names
        ('nll',)
    """

    declares = (MetricInfo("nll", "down"), MetricInfo("nll_error", always=False))

    def __init__(self, num_checked: int = 16, tolerance: float = 0.01, in_sweep: bool = False) -> None:
        check_count("num_checked", num_checked, at_least=0, hint="0 checks none")
        check_number("tolerance", tolerance, above=0)
        self.num_checked, self.tolerance, self.in_sweep = num_checked, tolerance, in_sweep

    def probes(self) -> tuple[Probe[Any], ...]:
        """The log-densities, and those of the first points by a stricter solve."""
        return (LogDensities(), RefinedLogDensities(self.num_checked)) if self.num_checked else (LogDensities(),)

    def expected(self, who: Prospect) -> tuple[str, ...]:
        """See :meth:`Metric.expected`; held-out data and noise have none, nor has anybody at a scale of guidance."""
        has_density = has_likelihood(who.module) or (who.reference is not None and who.reference.has_density)
        solved = who.swept != "guidance" and solved_at(who.module, SamplerOverride()) is not None
        if not has_density or (who.swept and not solved):
            return ()
        refined = solved and solved_at(who.module, SamplerOverride(), refined=True) is not None
        return (*self.names, "nll_error") if refined and self.num_checked else self.names

    def measure(self, answers: Answers) -> list[Measurement]:
        """`nll`: bits/dim of uniformly dequantised data (an upper bound on the discrete one), else nats.

        The density of continuous data is that in the units of their file, see :attr:`flowbench.data.DataSpec.units`.
        The density of noisy data is in nats/dim: it is no code length, and the unit keeps it from being compared.
        """
        found, spec = answers[LogDensities()], answers.spec
        if found is None:
            return []
        (value, unit), n, protocol = value_of(found, spec), len(found.log_prob), protocol_of(found, spec)
        error, unconverged, details = self._checked(answers, found, unit)
        return [Measurement("nll", value, n, protocol, unit, unconverged=unconverged, details=details), *error]

    def _checked(
        self, answers: Answers, found: Densities, unit: str
    ) -> tuple[list[Measurement], str, Mapping[str, Any]]:
        """The row of the error, why the likelihood has not converged, and its standard error over the probes."""
        probe = RefinedLogDensities(self.num_checked)
        if not self.num_checked:
            return [], "", {}
        if reason := answers.failure(probe):
            return unmeasured(["nll_error"], reason), f"not converged (its error is not known: {reason})", {}
        if (refined := answers.get(probe)) is None:
            return [], "", {}
        refined, scale = refined.first(self.num_checked), scale_of(answers.spec, unit)
        error, num = scale * refined.error_of(found.log_prob), len(refined.log_prob)
        protocol = "/".join([found.kind, "test", f"first-{num}", f"against {refined.method}", found.method])
        details = _over_probes(refined, scale, len(found.log_prob))
        row = Measurement("nll_error", error, num, protocol, unit)
        if error <= self.tolerance:
            return [row], "", details
        return [row], f"not converged (error {error:.2g} {unit}, tolerance {self.tolerance:g})", details


def value_of(found: Densities, spec: DataSpec) -> tuple[float, str]:
    """The mean negative log-likelihood, and its unit; see :meth:`NegativeLogLikelihood.measure`."""
    mean = found.log_prob.double().mean()
    if spec.levels is None:
        return float(-mean) + spec.log_volume, "nats"
    if not found.reports_bits_per_dim:
        return float(-mean) / spec.num_dims, "nats/dim"
    return float(bits_per_dim(mean, spec.num_dims, spec.bin_width)), "bits/dim"


def protocol_of(found: Densities, spec: DataSpec) -> str:
    """Kind, split, N, and whatever else moves the value: labels, the place in the bins, the solver."""
    parts = [found.kind, "test", str(len(found.log_prob))]
    if found.given_label:
        parts.append("given-label")
    if spec.levels is not None:
        place = "uniform-dequantisation" if found.dequantize == "uniform" else "bin-centres"
        parts.append(f"{place}-{spec.levels}-levels")
    if spec.units is not None:
        parts.append("data-units")
    return "/".join([*parts, found.method] if found.method else parts)


def scale_of(spec: DataSpec, unit: str) -> float:
    """A nat of log-density in a unit of the metric."""
    return {"nats": 1.0, "nats/dim": 1 / spec.num_dims, "bits/dim": 1 / (spec.num_dims * math.log(2))}[unit]


def _over_probes(refined: RefinedDensities, scale: float, num: int) -> dict[str, float]:
    """The standard error of a mean over `num` points, each with probes of its own, by those that were solved again."""
    if refined.standard_error is None:
        return {}
    each = float(refined.standard_error.square().mean().sqrt())
    return {"probe_standard_error": scale * each / math.sqrt(num)}
