"""Optimiser settings, parameter groups and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from flowbench.core.checks import check_number, check_numbers

__all__ = ["OptimizerConfig", "learning_rate_factor", "parameter_groups"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a warm-up and a schedule over the whole budget (Loshchilov & Hutter, 2019, arXiv 1711.05101).

    Attributes:
        lr: peak learning rate, in (0, 1000].
        betas: decay rates of the two moments, each in [0, 1).
        weight_decay: decoupled decay of matrices, in [0, 1000]; biases, norms and embeddings are never decayed.
        eps: added to the root of the second moment, in (0, 1]: without it a gradient of zero is divided by zero.
        warmup_fraction: share of the budget with a linearly rising rate, in [0, 1).
        schedule: `cosine` falls to `final_fraction * lr` at the end of the budget, `constant` stays.
        final_fraction: where the cosine ends, as a share of `lr`, in [0, 1].
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-4
    eps: float = 1e-8
    warmup_fraction: float = 0.05
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: when a value is out of its range.
        """
        check_number("optimizer.lr", self.lr, above=0, at_most=1000, hint="try 1e-3")
        check_numbers("optimizer.betas", self.betas, length=2, at_least=0, below=1, hint="try [0.9, 0.95]")
        check_number("optimizer.weight_decay", self.weight_decay, at_least=0, at_most=1000, hint="0 is none")
        check_number("optimizer.eps", self.eps, above=0, at_most=1, hint="try 1e-8")
        check_number("optimizer.warmup_fraction", self.warmup_fraction, at_least=0, below=1, hint="0 is none")
        check_number("optimizer.final_fraction", self.final_fraction, at_least=0, at_most=1)
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"optimizer.schedule must be cosine or constant, got {self.schedule!r}")


def _is_decayed(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Decay matrices and kernels only: shrinking a norm's gain or an embedding has no regularising meaning."""
    return name.endswith("weight") and parameter.ndim >= 2 and not isinstance(module, nn.Embedding)


def _named_leaves(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    seen: set[int] = set()
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield owner, name, parameter


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into a decayed and an undecayed group; each parameter appears once.

    Args:
        module: the module whose parameters are trained.
        weight_decay: the decay of the first group.

    Returns:
        Groups for a ``torch.optim`` optimiser; empty groups are left out.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for owner, name, parameter in _named_leaves(module):
        (decayed if _is_decayed(owner, name, parameter) else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate_factor(config: OptimizerConfig, progress: float) -> float:
    """The learning rate as a share of its peak.

    Args:
        config: warm-up and schedule.
        progress: share of the budget that is used up, in [0, 1]; steps and seconds serve alike.

    Returns:
        A factor in [0, 1].
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < config.warmup_fraction:
        return progress / config.warmup_fraction
    if config.schedule == "constant":
        return 1.0
    after = (progress - config.warmup_fraction) / (1.0 - config.warmup_fraction)
    return config.final_fraction + (1.0 - config.final_fraction) * 0.5 * (1.0 + math.cos(math.pi * after))


def build_optimizer(module: nn.Module, config: OptimizerConfig, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `module`.

    Args:
        module: what is trained.
        config: rates and decays.
        fused: all parameters in one kernel. Not where the loss is scaled (float16): that kernel unscales the gradients
            itself, after they were clipped.
    """
    groups = parameter_groups(module, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused or None)
