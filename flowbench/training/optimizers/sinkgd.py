"""SinkGD: gradients whose rows and columns are normalised in turn, in place of moments."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.linalg import vector_norm

from flowbench.core.checks import check_count
from flowbench.training.optimizers.matrix import MatrixSettings

__all__ = ["SinkGD", "normalize_rows_and_columns"]


@dataclass(frozen=True)
class SinkGD(MatrixSettings):
    """Multi-normalised gradient descent by square-root Sinkhorn iterations; no state for matrices.

    The direction of a matrix of M rows and N columns has rows of norm sqrt(N) and columns of norm sqrt(M), hence
    entries of root mean square 1, like Adam's. It does not depend on the scale of the gradient: clipping by the norm
    does nothing to it, and only the schedule makes steps smaller. Query, key and value weights that lie in one layer
    are one matrix.

    Attributes: those of :class:`~flowbench.training.optimizers.MatrixSettings`, and
        iterations: normalisations of rows, then columns, 1 to 1,000; the last one leaves columns exact.

    References:
        Scetbon et al. (2025), Gradient Multi-Normalization for Stateless and Memory-Efficient LLM Training,
        arXiv 2502.06742, algorithms 3 and 4.

    Example:
        >>> SinkGD().direction(torch.tensor([[[2.0, 0.0], [0.0, -0.1]]]))[0].square().round(decimals=3).tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """

    lr: float = 0.02
    iterations: int = 5

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: when a value is out of its range.
        """
        super().__post_init__()
        check_count("optimizer.iterations", self.iterations, at_most=1000, hint="try 5")

    def direction(self, grad_KMN: Tensor) -> Tensor:
        """See :meth:`MatrixSettings.direction`."""
        return normalize_rows_and_columns(grad_KMN, self.iterations)


def normalize_rows_and_columns(matrix: Tensor, iterations: int) -> Tensor:
    """Square-root Sinkhorn iterations: rows to norm sqrt(N), then columns to norm sqrt(M), again and again.

    The squares of the entries go through Sinkhorn's own iterations, so the result is D1 G D2 with positive diagonal
    matrices. Rows and columns of zeros stay zero.

    Args:
        matrix: matrices G, shape (..., M, N), floating.
        iterations: >= 1.

    Returns:
        Matrices of the same shape.
    """
    rows, columns = matrix.shape[-2:]
    for _ in range(iterations):
        matrix = matrix * (columns**0.5 / _positive(vector_norm(matrix, dim=-1, keepdim=True)))
        matrix = matrix * (rows**0.5 / _positive(vector_norm(matrix, dim=-2, keepdim=True)))
    return matrix


def _positive(norm: Tensor) -> Tensor:
    """A divisor that leaves zeros alone."""
    return norm.masked_fill(norm == 0, 1.0)
