"""Mixtures of Gaussians, chosen by the likelihood of the validation split."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from flowbench.core.checks import check_counts, check_seed
from flowbench.core.seeds import derive_seed

__all__ = ["MIXTURE_POINTS", "MIXTURE_SIZES", "MixtureSampler", "affordable", "fit_mixture"]

# Size and floor of the covariances are chosen on the validation split; full covariances throughout.
MIXTURE_SIZES = (1, 5, 10, 20, 40)
# Added to the diagonal of every covariance, as scikit-learn does, in squared model units.
COVARIANCE_FLOORS = (1e-4, 1e-3, 1e-2)
# More points than this change a mixture of forty components little and cost much.
MIXTURE_POINTS = 10_000
# Multiplications of one step of expectation maximisation: above the first, the floor is chosen with one component
# instead of with each size; above the second, a size is left out. Images of 28x28 try five components, of 32x32x3 one.
MIXTURE_GRID_WORK, MIXTURE_WORK = 1e9, 4e10


def fit_mixture(train: np.ndarray, val: np.ndarray, sizes: Sequence[int], seed: int) -> GaussianMixture:
    """The full-covariance mixture with the best validation likelihood.

    Args:
        train: points, shape (N, D); the first 10,000 are used.
        val: validation points, shape (M, D).
        sizes: numbers of components to try, >= 1; those with fewer than ten points a component, or whose fit would take
            minutes in this dimension, are left out.
        seed: keys the initial assignment.

    Returns:
        A fitted scikit-learn mixture. A warning says where it has not converged.
    """
    check_counts("sizes", sizes)
    check_seed("seed", seed)
    train = train[:MIXTURE_POINTS]
    state = derive_seed(seed, "mixture") % 2**31
    work = train.size * train.shape[1]

    def fit(size: int, floor: float) -> GaussianMixture:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of those that are not chosen nobody need know
            return GaussianMixture(size, covariance_type="full", reg_covar=floor, random_state=state).fit(train)

    def best(models: Iterable[GaussianMixture]) -> GaussianMixture:
        return max(models, key=lambda model: model.score(val))

    sizes = affordable(sizes, train)
    if sizes == (1,):  # the grid of floors, once
        chosen = best(fit(1, floor) for floor in COVARIANCE_FLOORS)
    else:
        floors: Sequence[float] = COVARIANCE_FLOORS
        if max(sizes) * work > MIXTURE_GRID_WORK:
            floors = [best(fit(1, floor) for floor in COVARIANCE_FLOORS).reg_covar]
        chosen = best(fit(size, floor) for size in sizes for floor in floors)
    if not chosen.converged_:
        warnings.warn(
            f"the reference mixture of {chosen.n_components} Gaussians has not converged after {chosen.n_iter_} steps:"
            " its rows are those of its last step, and a better mixture may exist",
            stacklevel=2,
        )
    return chosen


def affordable(sizes: Sequence[int], train: np.ndarray) -> tuple[int, ...]:
    """Sizes with ten points a component and few enough multiplications; a single component always."""
    most, work = len(train) // 10, train.size * train.shape[1]
    return tuple(size for size in sizes if size == 1 or (size <= most and size * work <= MIXTURE_WORK))


class MixtureSampler:
    """Samples of a mixture by a torch generator, in order: scikit-learn's own sampler groups them by component."""

    def __init__(self, model: GaussianMixture, num: int, rng: torch.Generator) -> None:
        self.means = torch.from_numpy(model.means_)
        self.factors = torch.linalg.cholesky(torch.from_numpy(model.covariances_))
        self.component = torch.multinomial(torch.from_numpy(model.weights_), num, replacement=True, generator=rng)
        self.rng = rng

    def draw(self, index: Tensor) -> Tensor:
        """The next samples, at indices that follow the last ones', shape (B, D)."""
        component = self.component[index]
        noise = torch.randn(len(index), self.means.shape[1], generator=self.rng, dtype=self.means.dtype)
        points = self.means[component]
        # A factor at a time: one for every sample would not fit into memory for images.
        for number in component.unique().tolist():
            mine = component == number
            points[mine] += noise[mine] @ self.factors[number].T
        return points
