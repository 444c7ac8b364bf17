"""AdamW for every parameter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from flowbench.training.optimizers.routing import parameter_groups
from flowbench.training.optimizers.settings import OptimizerSettings, check_saved_groups

__all__ = ["AdamW"]


@dataclass(frozen=True)
class AdamW(OptimizerSettings):
    """AdamW for every parameter, by PyTorch; two numbers of state for each number trained.

    Attributes: those of :class:`~flowbench.training.optimizers.OptimizerSettings`.

    References:
        Loshchilov & Hutter (2019), Decoupled Weight Decay Regularization, arXiv 1711.05101.

    Example:
        >>> AdamW(lr=2e-3).build(torch.nn.Linear(3, 2)).param_groups[0]["lr"]
        0.002
    """

    def build(self, module: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
        """See :meth:`OptimizerSettings.build`."""
        groups = parameter_groups(module, self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused or None)
        optimizer.register_load_state_dict_pre_hook(check_saved_groups)
        return optimizer
