"""Likelihood of a continuous flow by the instantaneous change of variables, and bits per dimension."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowbench.flows.solver import Field, Solver

__all__ = [
    "Divergence",
    "ExactDivergence",
    "HutchinsonDivergence",
    "Likelihood",
    "bits_per_dim",
    "log_likelihood",
]


Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihood of a batch under a continuous flow.

    Attributes:
        log_prob: log-density in nats, float64, shape (B,).
        source: the points at the source end that flow to x, shape (B, *D).
        network_evaluations: evaluations of the field; each also costs one backward pass per probe.
        probe_standard_error: standard error of log_prob over the probes, in nats, shape (B,); None for an
            exact divergence or a single probe. It says nothing about the error of the solver.
    """

    log_prob: Tensor
    source: Tensor
    network_evaluations: int
    probe_standard_error: Tensor | None


class Divergence(ABC):
    """The divergence of a field as vector-Jacobian products ``p^T J p`` with a set of probes p.

    The field must treat the samples of a batch independently (no batch normalisation).
    """

    @abstractmethod
    def probes(self, x: Tensor, generator: Generators | None) -> Tensor:
        """Probes for states x of shape (B, *D): shape (K, B, *D), kept for the whole path."""

    @abstractmethod
    def reduce(self, products: Tensor) -> tuple[Tensor, Tensor | None]:
        """Turn ``p^T J p`` of all probes, shape (K, B), into the divergence (B,) and its standard error (B,).

        Linear in the products up to the standard error, so it applies to their integrals over time as well.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class ExactDivergence(Divergence):
    """The trace of the Jacobian, one backward pass per dimension: for up to about a hundred dimensions."""

    def probes(self, x: Tensor, generator: Generators | None) -> Tensor:
        """The d unit vectors, the same for every sample."""
        num_dims = x[0].numel()
        basis = torch.eye(num_dims, dtype=x.dtype, device=x.device).view(num_dims, 1, *x.shape[1:])
        return basis.expand(num_dims, *x.shape)

    def reduce(self, products: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sum of the diagonal; no standard error."""
        return products.sum(0), None


class HutchinsonDivergence(Divergence):
    """Hutchinson's unbiased estimate, with probes that stay fixed along the path.

    Fixed probes keep the right-hand side smooth, so adaptive solvers see no noise, and the result is a
    deterministic function of the generator. With S the symmetric part of the Jacobian, the variance per probe
    is ``2 (||S||^2 - sum S_ii^2)`` for Rademacher and ``2 ||S||^2`` for Gaussian probes.

    Args:
        num_probes: K >= 1 independent probes per sample; two or more give a standard error.
        distribution: "rademacher" (signs) or "gaussian".

    References:
        Hutchinson 1990, doi 10.1080/03610919008812866; Grathwohl et al. 2019, arXiv 1810.01367 (FFJORD).
    """

    def __init__(self, num_probes: int = 1, distribution: Literal["rademacher", "gaussian"] = "rademacher") -> None:
        if num_probes < 1:
            raise ValueError(f"num_probes must be at least 1, got {num_probes}")
        if distribution not in ("rademacher", "gaussian"):
            raise ValueError(f'distribution must be "rademacher" or "gaussian", got {distribution!r}')
        self.num_probes = num_probes
        self.distribution = distribution

    def probes(self, x: Tensor, generator: Generators | None) -> Tensor:
        """K independent draws per sample, made on the generators' device."""
        if generator is None:
            raise ValueError(f"{self!r} draws probes: pass a torch.Generator")
        if isinstance(generator, torch.Generator):
            noise = self._draw(x.shape, generator)
        elif len(generator) == len(x):
            noise = torch.stack([self._draw(x.shape[1:], g) for g in generator], dim=1)
        else:
            raise ValueError(f"one generator per sample: {len(x)} samples, {len(generator)} generators")
        if self.distribution == "rademacher":
            noise = torch.where(noise < 0, -1.0, 1.0)
        return noise.to(x)

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(self.num_probes, *shape, generator=generator, device=generator.device)

    def reduce(self, products: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean over the probes, and its standard error for two probes or more."""
        error = products.std(0) / math.sqrt(self.num_probes) if self.num_probes > 1 else None
        return products.mean(0), error

    def __repr__(self) -> str:
        return f"HutchinsonDivergence(num_probes={self.num_probes}, distribution={self.distribution!r})"


def log_likelihood(
    field: Field,
    x: Tensor,
    source_log_prob: Callable[[Tensor], Tensor],
    solver: Solver,
    divergence: Divergence,
    generator: Generators | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Likelihood:
    """Log-likelihood of data under the flow of a field (Chen et al. 2018, arXiv 1806.07366, equation 8).

    Integrates ``d log p / dt = -div v`` from the data back to the source, the state and the divergence
    accumulated in float64 while the field sees the dtype of x. Works under ``torch.no_grad`` and
    ``torch.inference_mode``; tensors that the field closes over (labels, say) must not themselves be
    inference tensors. The result carries no gradient. Use eval mode (no dropout) and full precision. An
    adaptive solver controls one error norm over states and divergences together, so in high dimension the
    divergence hardly influences the step size.

    Args:
        field: the velocity ``field(t, x)``, differentiable in x.
        x: data points, floating point, shape (B, *D).
        source_log_prob: log-density of the source, ``(B, *D) -> (B,)`` in nats.
        solver: integrates from ``interval[1]`` to ``interval[0]``.
        divergence: exact or estimated.
        generator: draws the probes of an estimated divergence; one generator per sample makes the result of a
            sample independent of its batch; an exact divergence needs none.
        interval: source and data time; a path that is singular at an end needs its own ``interval``.

    Returns:
        Log-density of x at time ``interval[1]`` with its cost and error.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().detach()
        augmented = _AugmentedField(field, x, divergence.probes(x, generator))
        times = torch.tensor([interval[1], interval[0]], dtype=torch.float64)
        solution = solver.solve(augmented, augmented.pack(x), times)
    source, products = augmented.unpack(solution.states[-1])
    # Integrated backward, the products hold minus the integral over increasing time.
    change, error = divergence.reduce(products)
    return Likelihood(source_log_prob(source).double() + change, source, solution.stats.network_evaluations, error)


def bits_per_dim(log_prob: Tensor, num_dims: int, bin_width: float) -> Tensor:
    """Bits per dimension of uniformly dequantised integers: ``-log p(x) / (D ln 2) - log2(bin width)``.

    Args:
        log_prob: log-density of the dequantised points in nats, any shape.
        num_dims: D, the number of dimensions.
        bin_width: width of one level in the units of x: 2 / 256 for 8-bit images in [-1, 1).

    Returns:
        An upper bound on the negative log-likelihood of the integers, in bits per dimension, same shape.

    References:
        Theis, van den Oord and Bethge 2016, arXiv 1511.01844, section 3.1.
    """
    return -log_prob / (num_dims * math.log(2)) - math.log2(bin_width)


class _AugmentedField:
    """Velocity and probe products as one flat float64 state of shape (B, d + K)."""

    def __init__(self, field: Field, x: Tensor, probes: Tensor) -> None:
        self.field = field
        self.shape, self.dtype = x.shape, x.dtype
        self.probes = probes

    def pack(self, x: Tensor, products: Tensor | None = None) -> Tensor:
        if products is None:
            products = torch.zeros(self.probes.shape[:2], device=x.device)
        return torch.cat([x.flatten(1).double(), products.T.double()], 1)

    def unpack(self, state: Tensor) -> tuple[Tensor, Tensor]:
        num_products = len(self.probes)
        return state[:, :-num_products].to(self.dtype).view(self.shape), state[:, -num_products:].T

    def __call__(self, t: Tensor, state: Tensor) -> Tensor:
        x = self.unpack(state)[0].detach().requires_grad_()
        velocity = self.field(t.to(torch.promote_types(self.dtype, torch.float32)), x)
        return self.pack(velocity.detach(), self._products(velocity, x))

    def _products(self, velocity: Tensor, x: Tensor) -> Tensor:
        if not velocity.requires_grad:  # a constant field
            return torch.zeros(self.probes.shape[:2], device=x.device)
        rows = []
        for probe in self.probes:
            (gradient,) = torch.autograd.grad(
                velocity, x, probe.to(velocity), retain_graph=True, materialize_grads=True
            )
            rows.append((gradient.double() * probe).flatten(1).sum(1))
        return torch.stack(rows)
