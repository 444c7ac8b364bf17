"""What all optimisers share: AdamW's numbers for parameters without a rule of their own, and the schedule."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from flowbench.core.checks import check_number, check_numbers

__all__ = ["KIND", "OptimizerSettings", "check_saved_groups", "learning_rate_factor"]

KIND = "kind"
"""Key of a parameter group: which rule steps it, where an optimiser has several; AdamW alone has none."""


@dataclass(frozen=True)
class OptimizerSettings(ABC):
    """A learning rate with a warm-up and a schedule over the whole budget; a subclass builds the optimiser.

    Attributes:
        lr: peak learning rate, in (0, 1000].
        betas: decay rates of AdamW's two moments, each in [0, 1).
        weight_decay: decoupled decay of matrices and kernels, in [0, 1000]; a step of rate r shrinks them by
            r * weight_decay. Biases, norms and embeddings are never decayed.
        eps: added to the root of AdamW's second moment, in (0, 1]: without it a gradient of zero is divided by zero.
        warmup_fraction: share of the budget with a linearly rising rate, in [0, 1).
        schedule: `cosine` falls to `final_fraction * lr` at the end of the budget, `constant` stays.
        final_fraction: where the cosine ends, as a share of `lr`, in [0, 1].

    Example:
        >>> settings: OptimizerSettings = AdamW(lr=1e-3, weight_decay=0.0)
        >>> settings.num_moments(torch.nn.Linear(3, 2))  # two for each of six weights and two biases
        16
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

    def check(self, module: nn.Module, *, sharded: bool = False) -> None:  # noqa: B027 - AdamW trains any module
        """Refuse what this optimiser cannot train.

        Args:
            module: what is trained; it may lie on the meta device.
            sharded: whether each process holds a part of every weight.

        Raises:
            ValueError: one line with what to change.
        """

    def num_moments(self, module: nn.Module) -> int:
        """Numbers that are kept between steps, beside one counter for each tensor.

        Args:
            module: what is trained; it may lie on the meta device.
        """
        return 2 * sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)

    @abstractmethod
    def build(self, module: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
        """One optimiser over the trainable parameters of `module`, each of them in one group.

        Args:
            module: what is trained.
            fused: AdamW in one kernel for all parameters. Not where the loss is scaled (float16): that kernel unscales
                the gradients itself, after they were clipped.

        Raises:
            ValueError: as :meth:`check`.
        """


def check_saved_groups(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Refuse the state of another optimiser, whose groups PyTorch would take for these where there are as many.

    Args:
        optimizer: that is to go on.
        state_dict: of the checkpoint.

    Raises:
        ValueError: names both sides' groups.
    """
    saved, own = (
        [group.get(KIND) for group in groups] for groups in (state_dict["param_groups"], optimizer.param_groups)
    )
    if saved != own:
        raise ValueError(
            f"the checkpoint's optimiser has groups {saved}, this one {own}: "
            "pass the configuration saved beside the checkpoint"
        )


def learning_rate_factor(settings: OptimizerSettings, progress: float) -> float:
    """The learning rate as a share of its peak.

    Args:
        settings: warm-up and schedule.
        progress: share of the budget that is used up, in [0, 1]; steps and seconds serve alike.

    Returns:
        A factor in [0, 1].
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < settings.warmup_fraction:
        return progress / settings.warmup_fraction
    if settings.schedule == "constant":
        return 1.0
    after = (progress - settings.warmup_fraction) / (1.0 - settings.warmup_fraction)
    return settings.final_fraction + (1.0 - settings.final_fraction) * 0.5 * (1.0 + math.cos(math.pi * after))
