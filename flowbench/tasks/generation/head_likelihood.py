"""Likelihoods by few evaluations beside the converged ODE: those of a flow map's divergence head, and of a solver."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from flowbench.core.checks import check_count, check_number
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.measurement import Measurement, MetricInfo, unmeasured
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.override import SamplerOverride
from flowbench.evaluation.probe import Probe, Setup
from flowbench.evaluation.prospect import Prospect
from flowbench.families import FlowModule, SolvedDensity
from flowbench.tasks.generation.head_mass import HeadMass, has_mass
from flowbench.tasks.generation.likelihood import Densities, LogDensities, protocol_of, scale_of, value_of
from flowbench.tasks.generation.likelihood_check import solved_at, solved_values

__all__ = ["Converged", "ConvergedLogDensities", "FewStepLikelihood", "HeadDensities", "head_at"]

A = TypeVar("A")

# Share of a distance from the converged ODE that the error of the latter may make up.
LARGEST_SHARE = 0.1


def head_at(module: object, override: SamplerOverride) -> SolvedDensity | None:
    """The log-density that a flow's divergence head estimates at a point of a sweep.

    Args:
        module: any.
        override: what the sweep imposes; network evaluations are those of the estimate.

    Returns:
        None for a module without a head, and at a scale of guidance.

    Raises:
        ValueError: when those evaluations cannot be spent.
    """
    if not isinstance(module, FlowModule) or override.guidance is not None:
        return None
    return module.head_density(override.network_evaluations)


@dataclass(frozen=True)
class HeadDensities(Probe[Densities]):
    """What a divergence head says of every test sample; in a sweep by as many jumps."""

    stage = "head likelihood"
    follows_sampler = True

    def check_sampling(self, module: Any, override: SamplerOverride) -> None:
        """Refuse evaluations that the head cannot spend."""
        head_at(module, override)

    def ask(self, setup: Setup) -> Densities | None:
        """Batch by batch of the test split; a collective."""
        flow = setup.module
        if (density := head_at(flow, setup.override)) is None:
            return None
        assert isinstance(flow, FlowModule), "a flow gave the density"
        return Densities(
            solved_values(setup, density)[:, 0],
            "head",
            density.method,
            flow.describe().reports_bits_per_dim,
            flow.num_classes is not None,
            setup.data.dequantize,
        )


@dataclass(frozen=True)
class Converged:
    """Log-densities of the first test points by a stricter solve of a flow's ODE than that of its likelihood.

    Attributes:
        log_prob: in nats, float64, shape (K,).
        error: the mean of their estimated errors in nats.
        method: how they were solved, for the protocol.
    """

    log_prob: Tensor
    error: float
    method: str


@dataclass(frozen=True)
class ConvergedLogDensities(Probe[Converged]):
    """The first test points by a stricter solve, whatever a sweep imposes; solved once for all of its points.

    Attributes:
        num_points: how many; at most as many as the evaluator measures the likelihood of.
    """

    num_points: int
    stage = "converged likelihood"
    follows_sampler = True

    def key(self) -> Hashable:
        """Other numbers of points have other answers."""
        return self

    def ask(self, setup: Setup) -> Converged | None:
        """The points in passes of their own; a collective. None where nothing is compared with them."""
        swept = setup.override.network_evaluations is not None
        if not swept and head_at(setup.module, setup.override) is None:
            return None
        return setup.once(self, lambda: self._solved(setup))

    def _solved(self, setup: Setup) -> Converged | None:
        flow = setup.module
        stricter = _stricter(flow)
        if stricter is None:
            return None
        assert isinstance(flow, FlowModule), "a flow gave the density"
        own = flow.solved_density()
        assert own is not None, "its refinement was given"
        num = self.num_points if setup.num_likelihood is None else min(self.num_points, setup.num_likelihood)
        first = replace(setup, num_likelihood=num, override=SamplerOverride())
        coarse, fine = (solved_values(first, density)[:, 0] for density in (own, stricter))
        # What the stricter solve removes of the error is all but the share that remains.
        error = float((coarse - fine).abs().mean()) * stricter.remaining / (1 - stricter.remaining)
        return Converged(fine, error, f"{stricter.method} of {own.method}")


def _stricter(module: object) -> SolvedDensity | None:
    """The stricter solve of a flow's ODE; None where there is no such thing."""
    if not isinstance(module, FlowModule) or module.density != "ode":
        return None
    return module.solved_density(refined=True)


class FewStepLikelihood(Metric):
    """What a likelihood by few network evaluations says, and how far it is from that of the flow's converged ODE.

    `nll_head` is the mean negative log-likelihood of the test split by the divergence head of a flow map, with as many
    jumps as samples take. It is no density and no bound, and nothing keeps it above the entropy: a low value is no
    merit, so it has no goal. What it is worth says `nll_head_rmse`, the root mean square distance of single points from
    the log-likelihood of the same network's ODE by a stricter solve, and `nll_head_bias`, the mean distance, below 0
    where the head flatters. Without it `nll_head` is `unconverged`; a claim that compares it with another metric is
    refused. For points in the plane without labels `head_mass` is the integral of the head's density over a rectangle
    around the test data, which should be 1.

    At the points of a sweep `nll_rmse` and `nll_bias` are the same distances of the likelihood that a solver of as many
    evaluations has, for every flow of the kind `ode`. All distances are in the unit of `nll`.

    Args:
        num_checked: test points that the distances are measured on, >= 1, counted from the first.
        tolerance: largest mean error of the converged log-likelihoods, in (0, 1e12], in the unit of `nll`; also a tenth
            of the distance will do. Above both the distances are `unconverged`.
        mass_points: of the grid of `head_mass` along each axis, 16 to 4,096.

    Raises:
        ValueError: for a number out of range.

    References:
        Ai et al. (2025), F2D2, arXiv 2512.02636.

    Example:
        >>> FewStepLikelihood(num_checked=64).info("nll_head").beside
        'nll_head_rmse'
    """

    declares = (
        MetricInfo("nll_head", always=False, beside="nll_head_rmse"),
        MetricInfo("nll_head_rmse", "down", always=False),
        MetricInfo("nll_head_bias", "zero", always=False),
        MetricInfo("head_mass", always=False),
        MetricInfo("nll_rmse", "down", always=False),
        MetricInfo("nll_bias", "zero", always=False),
    )
    in_sweep = True

    def __init__(self, num_checked: int = 64, tolerance: float = 0.01, mass_points: int = 128) -> None:
        check_count("num_checked", num_checked)
        check_number("tolerance", tolerance, above=0)
        check_count("mass_points", mass_points, at_least=16, at_most=4096)
        self.num_checked, self.tolerance, self.mass_points = num_checked, tolerance, mass_points

    def probes(self) -> tuple[Probe[Any], ...]:
        """The head's log-densities and their integral, those of the ODE, and those of its stricter solve."""
        converged = ConvergedLogDensities(self.num_checked)
        return HeadDensities(), LogDensities(), converged, HeadMass(self.mass_points)

    def expected(self, who: Prospect) -> tuple[str, ...]:
        """See :meth:`Metric.expected`."""
        if who.swept == "guidance":
            return ()
        known = _stricter(who.module) is not None
        names: list[str] = []
        if head_at(who.module, SamplerOverride()) is not None:
            names += ["nll_head", *(["nll_head_rmse", "nll_head_bias"] if known else [])]
            names += ["head_mass"] * has_mass(who.module)
        if who.swept and known and solved_at(who.module, SamplerOverride()) is not None:
            names += ["nll_rmse", "nll_bias"]
        return tuple(names)

    def measure(self, answers: Answers) -> list[Measurement]:
        """All numbers that there are; of who has neither a head nor an ODE, none."""
        rows: list[Measurement] = []
        if (found := _known(answers, HeadDensities(), ["nll_head"], rows)) is not None:
            (value, unit), protocol = value_of(found, answers.spec), protocol_of(found, answers.spec)
            distances, unknown = self._distances("nll_head", found, answers)
            rows.append(Measurement("nll_head", value, len(found.log_prob), protocol, unit, unconverged=unknown))
            rows += distances
        if (mass := _known(answers, HeadMass(self.mass_points), ["head_mass"], rows)) is not None:
            rows.append(Measurement("head_mass", mass.value, mass.num_points, mass.protocol))
        if answers.override.network_evaluations is None:
            return rows
        if (solved := _known(answers, LogDensities(), ["nll_rmse", "nll_bias"], rows)) is not None:
            rows += self._distances("nll", solved, answers)[0]
        return rows

    def _distances(self, name: str, found: Densities, answers: Answers) -> tuple[list[Measurement], str]:
        """Distances from the converged ODE, and why they are not known; empty where they are."""
        probe, names = ConvergedLogDensities(self.num_checked), [f"{name}_rmse", f"{name}_bias"]
        if reason := answers.failure(probe):
            return unmeasured(names, reason), f"its distance from the converged ODE is not known: {reason}"
        if (converged := answers[probe]) is None:
            return [], "its distance from the converged ODE is not known: there is no stricter solve"
        unit = value_of(found, answers.spec)[1]
        scale, num = scale_of(answers.spec, unit), len(converged.log_prob)
        distance = scale * (converged.log_prob - found.log_prob[:num].double())
        rmse, error = math.sqrt(float(distance.square().mean())), scale * converged.error
        # Not finite, too: such distances are rows of their own status.
        certain = not error > max(self.tolerance, LARGEST_SHARE * rmse)
        unknown = "" if certain else f"the ODE has not converged (error {error:.2g} {unit}, distance {rmse:.2g})"
        protocol = "/".join(["distance", found.kind, "test", f"first-{num}", f"from {converged.method}", found.method])
        rows = [
            Measurement(each, value, num, protocol, unit, unconverged=unknown)
            for each, value in zip(names, (rmse, float(distance.mean())), strict=True)
        ]
        return rows, unknown and f"its distance from the ODE is not known: {unknown}"


def _known(answers: Answers, probe: Probe[A], names: list[str], rows: list[Measurement]) -> A | None:
    """An answer; None where there is none, and where it could not be computed: rows of `names` say so."""
    if reason := answers.failure(probe):
        rows += unmeasured(names, reason)
        return None
    return answers[probe]
