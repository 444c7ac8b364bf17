"""One optimiser with a stateless rule for matrices and AdamW for everything else.

Shape suffixes: K matrices of one shape, M rows (outputs), N columns (inputs).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flowbench.core.checks import check_scale
from flowbench.training.optimizers.routing import inner_matrices, parameter_groups
from flowbench.training.optimizers.settings import KIND, OptimizerSettings, check_saved_groups

__all__ = ["MatrixOptimizer", "MatrixSettings"]

# Gradients of equal shape are stepped together, because a matrix of a small network costs Python more than arithmetic;
# no more numbers than these at a time, because each batch is a copy.
MOST_AT_ONCE = 1 << 24

ADAMW = "adamw"


@dataclass(frozen=True)
class MatrixSettings(OptimizerSettings):
    """A rule for the matrices inside of networks, which keeps no state, and AdamW for all other parameters.

    Matrices are the weights of ``nn.Linear`` layers but those that a network names in ``end_layers``. Embeddings,
    heads, convolutions, norms, biases and tables go to AdamW at the rate `lr`. A matrix W with the gradient G moves by
    -lr * alpha * :meth:`direction` (G).

    Gradients are accumulated, averaged over processes and clipped before the rule sees them. Weights that are shared
    out among processes are refused: a process has a part of each matrix only.

    Attributes:
        lr: peak learning rate, in (0, 1000].
        alpha: rate of the matrices as a multiple of `lr`, in [1e-12, 1e12].
        weight_decay: decoupled decay, in [0, 1000], of matrices as of AdamW's kernels: at the rate `lr` without alpha.

    Example:
        >>> rule: MatrixSettings = SinkGD()
        >>> rule.num_moments(torch.nn.Linear(100, 50))  # two for each number of the bias, none for the weight
        100
    """

    weight_decay: float = 0.0
    alpha: float = 0.05

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: when a value is out of its range.
        """
        super().__post_init__()
        check_scale("optimizer.alpha", self.alpha, hint="it multiplies lr for matrices")

    @abstractmethod
    def direction(self, grad_KMN: Tensor) -> Tensor:
        """What is subtracted from the matrices, before the rates.

        Args:
            grad_KMN: gradients of K matrices, float32 or float64.

        Returns:
            Directions of the same shape.
        """

    def check(self, module: nn.Module, *, sharded: bool = False) -> None:
        """See :meth:`OptimizerSettings.check`."""
        name = type(self).__name__
        if sharded:
            raise ValueError(
                f"{name} needs whole matrices, and this strategy shares each out among processes: "
                "set trainer.strategy=ddp, or take AdamW"
            )
        if not inner_matrices(module):
            raise ValueError(f"{name} is for linear layers inside of networks, and this model has none: take AdamW")

    def num_moments(self, module: nn.Module) -> int:
        """See :meth:`OptimizerSettings.num_moments`."""
        return super().num_moments(module) - 2 * sum(matrix.numel() for matrix in inner_matrices(module))

    def build(self, module: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
        """See :meth:`OptimizerSettings.build`; the first group holds the matrices."""
        self.check(module, sharded=any(isinstance(parameter, DTensor) for parameter in module.parameters()))
        matrices = inner_matrices(module)
        rest = parameter_groups(module, self.weight_decay, without=matrices)
        options = {"lr": self.lr, "betas": self.betas, "eps": self.eps, "fused": fused or None}
        adamw = torch.optim.AdamW(rest, **options) if rest else None  # type: ignore[arg-type]
        kind = type(self).__name__.lower()
        group = {KIND: kind, "lr": self.lr, "alpha": self.alpha, "weight_decay": self.weight_decay, "fused": fused}
        return MatrixOptimizer({"params": matrices, **group}, adamw, self.direction)


class MatrixOptimizer(torch.optim.Optimizer):
    """Steps a group of matrices along a direction of their gradients alone, and lets AdamW step the other groups.

    Lightning's automatic optimisation, schedules, clipping and checkpoints see one optimiser. ``state`` holds AdamW's
    moments; matrices have no entry in it.

    Args:
        matrices: group with ``params``, ``kind``, ``lr``, ``alpha``, ``weight_decay`` and ``fused``.
        adamw: of all other parameters; None where there are none.
        direction: from the gradients of matrices of one shape, (K, M, N), to what is subtracted from them.
    """

    def __init__(
        self,
        matrices: dict[str, Any],
        adamw: torch.optim.AdamW | None,
        direction: Callable[[Tensor], Tensor],
    ) -> None:
        self._adamw = adamw
        self._direction = direction
        super().__init__([matrices, *(adamw.param_groups if adamw else [])], {KIND: ADAMW})
        # As in PyTorch's fused optimisers: a step is skipped on the device where ``found_inf`` is 1.
        self._step_supports_amp_scaling = bool(matrices["fused"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all groups.

        Args:
            closure: computes the loss and its gradients again.

        Returns:
            The closure's loss; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_adamw()
        for group in self.param_groups:
            if group[KIND] != ADAMW:
                for parameters in _batches(group["params"]):
                    self._step_matrices(parameters, group["lr"], group["alpha"], group["weight_decay"])
        return loss

    def _step_adamw(self) -> None:
        if self._adamw is None:
            return
        # Looked up at each step: loading a state replaces groups and state.
        self._adamw.param_groups = [group for group in self.param_groups if group[KIND] == ADAMW]
        self._adamw.state = self.state
        self._adamw.found_inf = getattr(self, "found_inf", None)  # type: ignore[attr-defined]
        self._adamw.step()

    def _step_matrices(self, parameters: list[Tensor], lr: float, alpha: float, weight_decay: float) -> None:
        grad_KMN = torch.stack([parameter.grad for parameter in parameters if parameter.grad is not None])
        dtype = torch.promote_types(grad_KMN.dtype, torch.float32)
        step_KMN = lr * alpha * self._direction(grad_KMN.to(dtype))
        if weight_decay:
            step_KMN += lr * weight_decay * torch.stack(parameters)
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            step_KMN = torch.where(found_inf > 0, 0.0, step_KMN)
        torch._foreach_sub_(parameters, step_KMN.to(grad_KMN.dtype).unbind())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimiser of the same groups.

        Raises:
            ValueError: for the state of another optimiser.
        """
        check_saved_groups(self, state_dict)
        super().load_state_dict(state_dict)


def _batches(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters that have a gradient, those of one shape, dtype and device together, in pieces of limited size."""
    alike: defaultdict[Any, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            alike[parameter.shape, parameter.dtype, parameter.device].append(parameter)
    for (shape, _, _), found in alike.items():
        size = max(1, MOST_AT_ONCE // shape.numel())
        for start in range(0, len(found), size):
            yield found[start : start + size]
