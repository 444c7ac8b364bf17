"""The table of `flowbench/data/reference_transport.py`: W2^2 between sources and densities, with a standard error.

    python benchmarks/reference_transport.py                       # all pairs, about half an hour on one core
    python benchmarks/reference_transport.py moons eight_gaussians   # one pair

Where a closed form exists it is printed: two Gaussians (Bures), and two rotation-invariant densities, whose optimal
map moves along the radius (1-D quadrature). Every pair is also estimated: exact transport (POT's network simplex)
between n points on each side, for several n, extrapolated to infinitely many. Points are scrambled Sobol sequences
taken through the quantile functions of the densities, so the error that is linear in the samples nearly vanishes and
the rest falls as 1 / n; independent scramblings give the standard error. The closed forms check the procedure.
"""

from __future__ import annotations

import argparse
import math
from functools import cache

import numpy as np
import torch
from scipy.integrate import cumulative_trapezoid
from scipy.linalg import sqrtm
from scipy.special import i0e, ndtri
from scipy.stats import qmc

from flowbench.data import DENSITIES, get_density
from flowbench.data.densities import Gaussian, Ring
from flowbench.data.reference_transport import STANDARD_NORMAL
from flowbench.metrics import wasserstein2_squared

PAIRS = [
    *((STANDARD_NORMAL, name) for name in DENSITIES),
    ("moons", "eight_gaussians"),
    ("gaussian_mixture", "five_gaussians"),
]
# Cells on each side of the grid on which a density is tabulated.
GRID = 1_500


@cache
def _table(name: str, grid: int) -> np.ndarray:
    """Density at the centres of a grid of cells over the bounds, shape (grid, grid), x first."""
    density = get_density(name)
    x_min, x_max, y_min, y_max = density.bounds
    centre = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    xs, ys = x_min + (x_max - x_min) * centre, y_min + (y_max - y_min) * centre
    rows = [density.log_prob(torch.cartesian_prod(part, ys)).exp() for part in xs.split(10)]
    return torch.cat(rows).reshape(grid, grid).numpy()


def quantile_points(name: str, u: np.ndarray, grid: int = GRID) -> np.ndarray:
    """Points of a density from points of the unit square: quantiles of x, then of y given x (Rosenblatt's map).

    The density is taken as constant in each cell of a fine grid, which adds about a twelfth of the squared cell width
    to its variances (1e-5).
    """
    x_min, x_max, y_min, y_max = get_density(name).bounds
    mass = _table(name, grid)
    column, share_x = _invert(mass.sum(axis=1)[None], np.zeros(len(u), dtype=int), u[:, 0])
    row, share_y = _invert(mass, column, u[:, 1])
    x = x_min + (x_max - x_min) * (column + share_x) / grid
    return np.stack([x, y_min + (y_max - y_min) * (row + share_y) / grid], axis=1)


def _invert(mass: np.ndarray, line: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cell, and place within it, of the quantile u of the masses in a given line of a table."""
    cell, share = np.empty(len(u), dtype=int), np.empty(len(u))
    for number in np.unique(line):
        mine = line == number
        edges = np.concatenate([[0.0], np.cumsum(mass[number])])
        wanted = u[mine] * edges[-1]
        found = np.clip(np.searchsorted(edges, wanted, side="right") - 1, 0, mass.shape[1] - 1)
        cell[mine] = found
        share[mine] = (wanted - edges[found]) / mass[number][found]
    return cell, share


def points(name: str, num: int, seed: int) -> torch.Tensor:
    """A scrambled Sobol set of a source or density, float64, shape (num, 2); num must be a power of two."""
    u = qmc.Sobol(2, scramble=True, rng=np.random.default_rng(seed)).random(num)
    return torch.from_numpy(ndtri(u) if name == STANDARD_NORMAL else quantile_points(name, u))


def estimate(source: str, target: str, num: int, repeats: int) -> tuple[float, float]:
    """W2^2 extrapolated in 1 / n from n = num / 2 and num points, and its standard error.

    The error is that of the mean over independent scramblings and, added in squares, the difference to the same
    extrapolation from half as many points: what is left of the bias.
    """
    sizes = (num // 4, num // 2, num)
    values = np.empty((repeats, 3))
    for repeat in range(repeats):
        x, y = (points(name, num, 2 * repeat + side) for side, name in enumerate((source, target)))
        # The beginning of a Sobol sequence is one itself.
        values[repeat] = [wasserstein2_squared(x[:n], y[:n]) for n in sizes]
    before, limit = (2 * values[:, k + 1] - values[:, k] for k in (0, 1))
    spread = np.std(limit, ddof=1) / math.sqrt(repeats)
    return float(limit.mean()), math.hypot(spread, limit.mean() - before.mean())


def closed_form(source: str, target: str) -> float | None:
    """W2^2 from the standard normal where it is known."""
    if source != STANDARD_NORMAL:
        return None
    density = get_density(target)
    if isinstance(density, Gaussian):
        (xx, xy, yy), mean = density.covariances[0], np.asarray(density.means[0])
        root = np.real(sqrtm(np.array([[xx, xy], [xy, yy]])))
        return float(mean @ mean + 2.0 + xx + yy - 2.0 * np.trace(root))
    return radial(density) if isinstance(density, Ring) else None


def radial(ring: Ring) -> float:
    """E (R - Q)^2 with the radius Q of the ring and R of the standard normal coupled by their quantiles."""
    variance = ring.noise_std**2
    q = np.linspace(max(0.0, ring.radius - 12 * ring.noise_std), ring.radius + 12 * ring.noise_std, 2_000_001)
    rice = q / variance * np.exp(-((q - ring.radius) ** 2) / (2 * variance)) * i0e(q * ring.radius / variance)
    below = np.clip(cumulative_trapezoid(rice, q, initial=0.0), 0.0, 1.0)
    above = np.clip(cumulative_trapezoid(rice[::-1], -q[::-1], initial=0.0)[::-1], 1e-300, 1.0)
    # Rayleigh: P(R > r) = exp(-r^2 / 2).
    r = np.sqrt(-2.0 * np.where(above < 0.5, np.log(above), np.log1p(-np.minimum(below, 0.75))))
    return float(np.trapezoid((r - q) ** 2 * rice, q))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", nargs="*", help="source and target; all pairs of the table without it")
    parser.add_argument("--points", type=int, default=8192, help="on each side, a power of two")
    parser.add_argument("--repeats", type=int, default=6, help="independent scramblings")
    given = parser.parse_args()
    if len(given.pair) not in (0, 2):
        parser.error(f"name a source and a target, or nothing for all pairs; got {' '.join(given.pair)}")
    for source, target in [given.pair] if given.pair else PAIRS:
        value, error = estimate(source, target, given.points, given.repeats)
        exact = closed_form(source, target)
        known = "" if exact is None else f", closed form {exact:.8f} ({(value - exact) / error:+.1f} standard errors)"
        print(f"{source} -> {target}: {value:.6f} +- {error:.6f}{known}", flush=True)


if __name__ == "__main__":
    main()
