"""Which choices of a matching flow exclude each other."""

from __future__ import annotations

import math

from flowbench.families.pairing.base import Pairing
from flowbench.flows import (
    GaussianSource,
    GibbsWeight,
    Objective,
    Path,
    RescheduledField,
    SchrodingerBridgeCoupling,
    SchrodingerBridgePath,
    Solver,
    Source,
    UniformWeight,
    Weight,
)

__all__ = ["check_combination"]


def check_combination(
    *,
    path: Path,
    sampling_path: Path | None,
    source: Source,
    sampling_source: Source | None,
    pairing: Pairing,
    weight: Weight,
    objective: Objective,
    solver: Solver,
    likelihood_solver: Solver,
    labelled: bool = False,
    conditioned: bool = False,
) -> None:
    """Refuse combinations that would train or sample something else than they state.

    Args:
        path: interpolation of the training.
        sampling_path: of the samples; None is that of the training.
        source: where the flow starts.
        sampling_source: where samples start; None is `source`.
        pairing: makes the pairs.
        weight: of the pairs.
        objective: what the network predicts, and the weight of its errors over time.
        solver: integrates samples.
        likelihood_solver: integrates log-densities.
        labelled: the flow is conditioned on class labels.
        conditioned: the flow has a conditioner, which makes conditions of the loader's data.

    Raises:
        ValueError: one line with both choices and what to take instead.
    """
    independent = pairing.is_independent and not source.is_paired
    _check_data(source, pairing, labelled, conditioned)
    _check_path(path, source, pairing, independent)
    objective.for_path(path)  # has its own refusals
    unweighted = isinstance(weight, UniformWeight)
    if objective.needs_gaussian_source and not (isinstance(source, GaussianSource) and independent and unweighted):
        raise ValueError(
            f"{objective!r} needs a Gaussian source and independent pairs of one weight, got {source!r}, {pairing!r} "
            f"and {type(weight).__name__}: predict velocity, data or noise, with the weight natural or velocity"
        )
    if isinstance(weight, GibbsWeight) and weight.correction != "none" and not independent:
        raise ValueError(
            f"correction {weight.correction} is that of independent pairs, got {pairing!r} and {source!r}: set "
            "correction: none, or pair independently"
        )
    if sampling_path is not None:
        RescheduledField(lambda t, x: x, path, sampling_path)  # has its own refusals
    if not likelihood_solver.any_field:
        raise ValueError(
            f"{likelihood_solver!r} follows a path and cannot integrate a density: take a Runge-Kutta method as "
            "likelihood_solver"
        )
    solver.for_path(sampling_path or path)
    std = source.std if isinstance(source, GaussianSource) else None
    apart = independent and unweighted and sampling_source is None
    if solver.source_std is not None and not (std == solver.source_std and apart):
        raise ValueError(
            f"{solver!r} needs a Gaussian source of its source_std and independent pairs of one weight, got "
            f"{source!r}, {pairing!r} and {type(weight).__name__}: take an ODE solver"
        )


def _check_data(source: Source, pairing: Pairing, labelled: bool, conditioned: bool) -> None:
    """Refuse pairs of other data points than their conditions or their noise were made for."""
    if pairing.looks_up_data and (conditioned or source.is_paired):
        other = "the loader's data, which a condition was made from" if conditioned else f"those that {source!r} saw"
        raise ValueError(f"{pairing!r} looks up other data points than {other}: take a coupling that permutes noise")
    if source.is_paired and (labelled or conditioned):
        # p(x0 | condition) is another than p(x0), which samples start from.
        given = "conditional=false" if labelled else "conditioner to null"
        raise ValueError(
            f"{source!r} draws noise for a data point, so that a condition gets noise that its samples do not start "
            f"from: set {given}, or take a source that does not look at the data point"
        )


def _check_path(path: Path, source: Source, pairing: Pairing, independent: bool) -> None:
    """Refuse a path that is right for other pairs."""
    if path.needs_standard_normal and not (source.is_standard_normal and independent):
        raise ValueError(
            f"{path!r} is right for standard normal noise and independent pairs only, got {source!r} and {pairing!r}: "
            "take LinearPath"
        )
    coupling = pairing.coupling
    if isinstance(path, SchrodingerBridgePath) and isinstance(coupling, SchrodingerBridgeCoupling):
        if not math.isclose(path.sigma, coupling.sigma):
            raise ValueError(
                f"a bridge has one sigma, got {path.sigma:g} on the path and {coupling.sigma:g} in the coupling: set "
                "both alike"
            )
