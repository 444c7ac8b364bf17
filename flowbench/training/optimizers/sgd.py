"""Plain gradient descent for matrices: what a rule for gradients is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowbench.training.optimizers.matrix import MatrixSettings

__all__ = ["SGD"]


@dataclass(frozen=True)
class SGD(MatrixSettings):
    """Stochastic gradient descent without momentum for matrices, AdamW for all other parameters.

    Attributes: those of :class:`~flowbench.training.optimizers.MatrixSettings`; `alpha` is large, because gradients
        are smaller than Adam's directions.

    Example:
        >>> len(SGD().build(torch.nn.Linear(3, 2)).param_groups)  # the weight; the bias under AdamW
        2
    """

    alpha: float = 100.0

    def direction(self, grad_KMN: Tensor) -> Tensor:
        """The gradient itself; see :meth:`MatrixSettings.direction`."""
        return grad_KMN
