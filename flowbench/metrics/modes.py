"""How well points near known modes are hit: nearest data, failures, the shares of the modes, transport within them."""

from __future__ import annotations

import torch
from torch import Tensor

from flowbench.core.checks import check_scale
from flowbench.core.no_solution import NoSolutionError
from flowbench.metrics.pairwise import distance_blocks
from flowbench.metrics.table_checks import check_tables

__all__ = ["average_minimum_distance", "failure_rate", "mode_discrepancy", "mode_matched_w2", "nearest_mode"]

_MAX_ITERATIONS = 100_000_000


def average_minimum_distance(generated: Tensor, reference: Tensor) -> float:
    """Mean Euclidean distance from a generated point to the nearest reference point.

    The modes need not all be reached, so a model that has lost all but one can be perfect: read it beside
    :func:`mode_discrepancy`.

    Args:
        generated: shape (N, *D).
        reference: shape (M, *D).

    Returns:
        Data units.

    References:
        Lee, Kim, Lee (2025), arXiv 2512.18184, 2-D simulation: AMD.

    Raises:
        ValueError: an empty side, widths that differ, or values that are not finite.
    """
    return float(_nearest_distance(generated, reference).mean())


def failure_rate(generated: Tensor, reference: Tensor, radius: float) -> float:
    """Share of generated points that are farther than ``radius`` from every reference point.

    Args:
        generated: shape (N, *D).
        reference: shape (M, *D).
        radius: data units, in [1e-12, 1e12].

    Returns:
        Per cent, 0 to 100.

    References:
        Lee, Kim, Lee (2025), arXiv 2512.18184, 2-D simulation: failure rate, at radius 1 in its units.

    Raises:
        ValueError: as :func:`average_minimum_distance`, or a radius out of range.
    """
    check_scale("radius", radius)
    return 100.0 * float((_nearest_distance(generated, reference) > radius).double().mean())


def _nearest_distance(generated: Tensor, reference: Tensor) -> Tensor:
    generated, reference = check_tables(generated, reference, ("generated", "reference"))
    return torch.cat([block.nearest(1).distances[:, 0] for block in distance_blocks(generated, reference)])


def nearest_mode(x: Tensor, modes: Tensor) -> Tensor:
    """Index of the mode nearest to each point.

    Args:
        x: points, shape (N, *D).
        modes: one point for each mode, shape (K, *D).

    Returns:
        int64, shape (N,).

    Raises:
        ValueError: an empty side, widths that differ, or values that are not finite.
    """
    x, modes = check_tables(x, modes, ("x", "modes"))
    return torch.cat([block.nearest(1).indices[:, 0] for block in distance_blocks(x, modes)])


def _shares(x: Tensor, modes: Tensor) -> Tensor:
    return nearest_mode(x, modes).bincount(minlength=len(modes)).double() / len(x)


def mode_discrepancy(generated: Tensor, reference: Tensor, modes: Tensor) -> float:
    """Kullback-Leibler divergence of the modes' shares, reference from generated, every point at its nearest mode.

    Args:
        generated: shape (N, *D).
        reference: shape (M, *D).
        modes: one point for each mode, shape (K, *D).

    Returns:
        Nats, at least 0; infinite when a mode of the reference was never generated.

    References:
        Lee, Kim, Lee (2025), arXiv 2512.18184, 2-D simulation: MDD.

    Raises:
        ValueError: an empty side, widths that differ, or values that are not finite.
    """
    true, found = _shares(reference, modes), _shares(generated, modes)
    terms = torch.where(true > 0, true * (true / found).log(), torch.zeros_like(true))
    return max(0.0, float(terms.sum()))


def mode_matched_w2(generated: Tensor, reference: Tensor, modes: Tensor) -> float:
    """Wasserstein-2 distance to the reference when each mode is given the share that was generated.

    The plain distance is dominated by the few points in a wrong mode, which must cross the plane; this one leaves them
    to :func:`mode_discrepancy`. The authors' code draws reference points anew with the generated counts; here the given
    points are weighted, which needs no draw. (The paper's text describes another normalisation, by the mean distance.)

    Args:
        generated: shape (N, *D).
        reference: shape (M, *D), with points in every mode that was generated.
        modes: one point for each mode, shape (K, *D).

    Returns:
        Data units.

    References:
        Lee, Kim, Lee (2025), arXiv 2512.18184, 2-D simulation: normalised Wasserstein, as its code computes it.

    Raises:
        ValueError: an empty side, widths that differ, values that are not finite, or a mode without reference points.
        NoSolutionError: the linear program did not reach its optimum.
    """
    import ot  # slow to import (it probes every array library), and only this function needs it

    own, share = nearest_mode(reference, modes), _shares(generated, modes)
    count = own.bincount(minlength=len(modes))
    lost = ((count == 0) & (share > 0)).nonzero().flatten().tolist()
    if lost:
        raise ValueError(f"modes {lost} were generated but hold no reference point; give modes of the reference")
    x, y = check_tables(generated, reference, ("generated", "reference"))
    weight = (share / count.clamp(min=1))[own].cpu().numpy()
    cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square().cpu().numpy()
    value, log = ot.emd2([], weight / weight.sum(), cost, numItermax=_MAX_ITERATIONS, log=True)
    if log["warning"] is not None:
        raise NoSolutionError(f"optimal transport between {len(x)} and {len(y)} samples failed: {log['warning']}")
    return max(0.0, float(value)) ** 0.5
