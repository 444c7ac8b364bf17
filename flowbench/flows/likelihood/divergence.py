"""Divergence of a field from vector-Jacobian products: the exact trace and Hutchinson's estimate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.core.no_solution import NoSolutionError

__all__ = ["Divergence", "ExactDivergence", "Generators", "HutchinsonDivergence"]

Generators = torch.Generator | Sequence[torch.Generator]


class Divergence(ABC):
    """The divergence of a field as vector-Jacobian products ``p^T J p`` with a set of probes p.

    The field must treat the samples of a batch independently (no batch normalisation).

    Args:
        probes_per_pass: probes that one backward pass takes, >= 1. More than one is vectorised by ``torch.vmap``:
            faster where passes are bound by their overhead (small batches, accelerators), at as many times the memory,
            and no faster on large batches on a CPU. Numbers agree to rounding.

    Example:
        >>> source, x, rng = GaussianSource(), torch.zeros(1, 2), torch.Generator().manual_seed(0)
        >>> arguments = (lambda t, x: 3 * x, x, source.log_prob, RungeKutta4(num_steps=20))
        >>> for divergence in (ExactDivergence(), HutchinsonDivergence(num_probes=2)):
        ...     print(log_likelihood(*arguments, divergence, rng).log_prob)  # -ln(2 pi) - 6
        tensor([-7.8379], dtype=torch.float64)
        tensor([-7.8379], dtype=torch.float64)
    """

    probes_per_pass: int = 1

    def __init__(self, probes_per_pass: int = 1) -> None:
        check_count("probes_per_pass", probes_per_pass)
        self.probes_per_pass = probes_per_pass

    @abstractmethod
    def probes(self, x: Tensor, generator: Generators | None) -> Tensor:
        """Probes for states x of shape (B, *D): shape (K, B, *D), kept for the whole path."""

    def integrand(self, products: Tensor) -> Tensor:
        """What is integrated over time, from the products ``p^T J p`` of all probes (K, B): shape (M, B), linear."""
        return products

    @abstractmethod
    def reduce(self, integrals: Tensor) -> tuple[Tensor, Tensor | None]:
        """Turn the integrals (M, B) into that of the divergence (B,) and its standard error (B,) or None.

        Linear up to the standard error, so it applies to the integrand itself as well.
        """

    def products(self, velocity: Tensor, x: Tensor, probes: Tensor) -> Tensor:
        """The products ``p^T J p`` of the Jacobian of velocity at x, float64, shape (K, B).

        Args:
            velocity: shape (B, *D), with the graph that leads to x.
            x: shape (B, *D), requires grad.
            probes: shape (K, B, *D).

        Raises:
            NoSolutionError: if the field cannot be vectorised over several probes.
        """
        if not velocity.requires_grad:  # a constant field
            return torch.zeros(probes.shape[:2], dtype=torch.float64, device=x.device)
        rows = [self._pass(velocity, x, some) for some in probes.split(self.probes_per_pass)]
        return torch.cat(rows)

    def _pass(self, velocity: Tensor, x: Tensor, probes: Tensor) -> Tensor:
        single = len(probes) == 1
        vectors = (probes[0] if single else probes).to(velocity)
        try:
            (gradient,) = torch.autograd.grad(
                velocity, x, vectors, retain_graph=True, materialize_grads=True, is_grads_batched=not single
            )
        except RuntimeError as error:
            if single or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).splitlines()[0][:120]
            raise NoSolutionError(
                f"the field cannot be differentiated for {len(probes)} probes at once ({reason}): set probes_per_pass=1"
            ) from error
        return (gradient.double().view(probes.shape) * probes).flatten(2).sum(2)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class ExactDivergence(Divergence):
    """The trace of the Jacobian, one product per dimension: for up to about a hundred dimensions.

    Args:
        probes_per_pass: see :class:`Divergence`; the number of dimensions takes the whole Jacobian at once.

    Example:
        >>> divergence, x = ExactDivergence(), torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> products = divergence.products(x**2, x, divergence.probes(x, None))
        >>> products.flatten(), divergence.integrand(products)  # the diagonal 2 x of the Jacobian, and its trace
        (tensor([2., 4.], dtype=torch.float64), tensor([[6.]], dtype=torch.float64))
    """

    def probes(self, x: Tensor, generator: Generators | None) -> Tensor:
        """The d unit vectors, the same for every sample."""
        num_dims = x.shape[1:].numel()
        basis = torch.eye(num_dims, dtype=x.dtype, device=x.device).view(num_dims, 1, *x.shape[1:])
        return basis.expand(num_dims, *x.shape)

    def integrand(self, products: Tensor) -> Tensor:
        """The trace, shape (1, B)."""
        return products.sum(0, keepdim=True)

    def reduce(self, integrals: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sum of the diagonal; no standard error."""
        return integrals.sum(0), None


class HutchinsonDivergence(Divergence):
    """Hutchinson's unbiased estimate, with probes that stay fixed along the path.

    Fixed probes keep the right-hand side smooth, so adaptive solvers see no noise, and the result is a
    deterministic function of the generator. With S the symmetric part of the Jacobian, the variance per probe
    is ``2 (||S||^2 - sum S_ii^2)`` for Rademacher and ``2 ||S||^2`` for Gaussian probes.

    Args:
        num_probes: K >= 1 independent probes per sample; two or more give a standard error.
        distribution: "rademacher" (signs) or "gaussian".
        probes_per_pass: see :class:`Divergence`.

    References:
        Hutchinson 1990, doi 10.1080/03610919008812866; Grathwohl et al. 2019, arXiv 1810.01367 (FFJORD).

    Example:
        >>> divergence, x = HutchinsonDivergence(num_probes=2), torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> products = divergence.products(x**2, x, divergence.probes(x, torch.Generator().manual_seed(0)))
        >>> divergence.reduce(products)  # signs are exact for a diagonal Jacobian: no error
        (tensor([6.], dtype=torch.float64), tensor([0.], dtype=torch.float64))
    """

    def __init__(
        self,
        num_probes: int = 1,
        distribution: Literal["rademacher", "gaussian"] = "rademacher",
        probes_per_pass: int = 1,
    ) -> None:
        super().__init__(probes_per_pass)
        check_count("num_probes", num_probes)
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

    def reduce(self, integrals: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean over the probes, and its standard error for two probes or more."""
        error = integrals.std(0) / math.sqrt(self.num_probes) if self.num_probes > 1 else None
        return integrals.mean(0), error

    def __repr__(self) -> str:
        return f"HutchinsonDivergence(num_probes={self.num_probes}, distribution={self.distribution!r})"
