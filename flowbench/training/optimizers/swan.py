"""SWAN: gradients with standardised rows, whitened, in place of moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

from flowbench.core.checks import check_count
from flowbench.training.optimizers.matrix import MatrixSettings

__all__ = ["SWAN", "standardize_rows", "whiten"]


@dataclass(frozen=True)
class SWAN(MatrixSettings):
    """Stochastic gradient descent with whitening and normalisation; no state for matrices.

    Rows of the gradient are standardised, its singular values made equal by Newton-Schulz iterations, and the result
    is scaled to entries of root mean square 1, like Adam's. As under
    :class:`~flowbench.training.optimizers.SinkGD` the scale of the gradient does not matter, and clipping by the norm
    does nothing.

    Attributes: those of :class:`~flowbench.training.optimizers.MatrixSettings`, and
        iterations: of Newton and Schulz, 1 to 100; each lifts a small singular value by a half, so 15 reach those down
            to about 1/400 of the largest.

    References:
        Ma et al. (2024), SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training, arXiv 2412.13148;
        as an instance of multi-normalisation: Scetbon et al. (2025), arXiv 2502.06742.

    Example:
        >>> SWAN().direction(torch.tensor([[[1.0, 2.0, 3.0], [1.0, 5.0, 3.0]]]))[0].square().mean().round(decimals=4)
        tensor(1.)
    """

    lr: float = 0.02
    iterations: int = 15

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: when a value is out of its range.
        """
        super().__post_init__()
        check_count("optimizer.iterations", self.iterations, at_most=100, hint="try 15")

    def direction(self, grad_KMN: Tensor) -> Tensor:
        """See :meth:`MatrixSettings.direction`."""
        standard = standardize_rows(grad_KMN)
        white = whiten(standard, self.iterations)
        before, after = (vector_norm(x, dim=(-2, -1), keepdim=True) for x in (standard, white))
        return white * (before / after.masked_fill(after == 0, 1.0))


def standardize_rows(matrix: Tensor) -> Tensor:
    """Subtract the mean of each row and divide by its standard deviation, 1/N under the root.

    Rows of equal numbers become zero, those too that differ by rounding alone.

    Args:
        matrix: shape (..., M, N), floating.

    Returns:
        Matrices of the same shape.
    """
    centred = matrix - matrix.mean(dim=-1, keepdim=True)
    std = centred.square().mean(dim=-1, keepdim=True).sqrt()
    is_constant = std <= 4 * torch.finfo(matrix.dtype).eps * matrix.abs().amax(dim=-1, keepdim=True)
    return (centred / std.masked_fill(is_constant, 1.0)).masked_fill(is_constant, 0.0)


def whiten(matrix: Tensor, iterations: int) -> Tensor:
    """(G G^T)^(-1/2) G by the cubic iteration of Newton and Schulz: G with singular values of 1.

    Singular values of 0 stay 0, up to rounding, which each iteration multiplies by 1.5. The iteration works on the
    shorter side, in the precision of `matrix`.

    Args:
        matrix: matrices G, shape (..., M, N), floating.
        iterations: >= 1.

    Returns:
        Matrices of the same shape.

    References:
        Higham (2008), Functions of Matrices, section 8.3.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        return whiten(matrix.mT, iterations).mT
    # At least the largest singular value, and closer to it than the Frobenius norm of the matrix itself.
    bound = vector_norm(matrix @ matrix.mT, dim=(-2, -1), keepdim=True).sqrt()
    x = matrix / bound.masked_fill(bound == 0, 1.0)
    for _ in range(iterations):
        x = 1.5 * x - 0.5 * (x @ x.mT) @ x
    return x
