"""A source that imitates the data's density."""

from __future__ import annotations

import math
import time
import warnings

import torch
from torch import Tensor

from flowbench.core.checks import check_count, check_scale
from flowbench.flows.source.base import FittedSource

__all__ = ["GaussianMixtureSource"]


class GaussianMixtureSource(FittedSource):
    """A mixture of Gaussians with full covariances, fitted to the data's density by expectation maximisation.

    The paper's negative result: where the approximation has lost a mode, the flow must carry mass across, and sources
    close to the data's density do worse than a Gaussian. Memory and checkpoint grow with K d^2.

    Args:
        num_components: K, at least 1.
        covariance_floor: added to the diagonal of every covariance, in squared data units, in [1e-12, 1e12].

    References:
        Lee, Kim, Lee (2025), arXiv 2512.18184: density approximation and mode discrepancy.

    Example:
        >>> source = GaussianMixtureSource(num_components=2, covariance_floor=1.0)
        >>> source.fit(torch.tensor([[-5.0], [-5.0], [5.0], [5.0]]), torch.Generator().manual_seed(0))
        >>> source.log_prob(torch.tensor([[5.0]]))  # half of N(5, 1): ln(1 / 2) - ln(2 pi) / 2
        tensor([-1.6121], dtype=torch.float64)
        >>> source.sample(3, (1,), torch.Generator().manual_seed(0)).shape
        torch.Size([3, 1])
    """

    def __init__(self, num_components: int = 10, covariance_floor: float = 1e-3) -> None:
        super().__init__()
        check_count("num_components", num_components)
        check_scale("covariance_floor", covariance_floor, hint="try 1e-3")
        self.num_components, self.covariance_floor = num_components, covariance_floor
        self._cost = (0.0, 0.0)

    @property
    def fit_flops(self) -> float:
        """Operations of expectation maximisation: a step whitens every point and adds up every covariance."""
        return self._cost[0]

    @property
    def fit_seconds(self) -> float:
        """Wall time of expectation maximisation."""
        return self._cost[1]

    def _fit(self, points: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        # Slow to import, and only this source needs it.
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        if self.num_components > len(points):
            raise ValueError(
                f"{self.num_components} components need as many data points, got {len(points)}: lower num_components"
            )
        start = time.perf_counter()
        state = int(torch.randint(2**31 - 1, (), generator=generator))
        model = GaussianMixture(self.num_components, reg_covar=self.covariance_floor, max_iter=200, random_state=state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # replaced by our own below
            model.fit(points.numpy())
        if not model.converged_:
            warnings.warn(
                f"GaussianMixtureSource: expectation maximisation of {self.num_components} components has not converged"
                f" after {model.n_iter_} steps, its last step is used: lower num_components or raise"
                " covariance_floor",
                stacklevel=2,
            )
        flops = 4.0 * model.n_iter_ * self.num_components * points.shape[0] * points.shape[1] ** 2
        self._cost = (flops, time.perf_counter() - start)
        return {
            "weight": torch.from_numpy(model.weights_),
            "mean": torch.from_numpy(model.means_),
            "factor": torch.linalg.cholesky(torch.from_numpy(model.covariances_)).float(),
        }

    def sample(
        self, num: int, shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw components, then points; on the generator's device, and move."""
        self._check_shape(shape)
        weight, mean, factor = (self._fitted(name, generator.device) for name in ("weight", "mean", "factor"))
        u = torch.rand(num, generator=generator, device=generator.device, dtype=torch.float64)
        component = torch.searchsorted(weight.cumsum(0), u, right=True).clamp(max=len(weight) - 1)
        points = torch.randn(num, mean.shape[1], generator=generator, device=generator.device)
        # A factor at a time: one for every sample would not fit into memory for images.
        for number in component.unique().tolist():
            mine = component == number
            points[mine] = mean[number].float() + points[mine] @ factor[number].T
        return points.reshape(num, *shape).to(device)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats, float64, shape (B,)."""
        self._check_shape(tuple(x.shape[1:]))
        weight, mean, factor = (self._fitted(name, x.device).double() for name in ("weight", "mean", "factor"))
        flat = x.flatten(1).double()
        parts = []
        for number in range(len(weight)):
            white = torch.linalg.solve_triangular(factor[number], (flat - mean[number]).T, upper=False)
            log_det = factor[number].diagonal().log().sum()
            parts.append(weight[number].log() - log_det - 0.5 * white.square().sum(0))
        return torch.stack(parts).logsumexp(0) - flat.shape[1] / 2 * math.log(2 * math.pi)

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return f"num_components={self.num_components}, covariance_floor={self.covariance_floor:g}"
