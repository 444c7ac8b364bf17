"""A run ends at the first loss that is not finite, before it reaches the weights; the host never waits for it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flowbench.core.devices import reading_waits

__all__ = ["LossGuard", "NonFiniteLoss"]

# Losses that are kept before they are read, where the trainer logs more seldom.
LONGEST_WAIT = 100


@dataclass(frozen=True)
class NonFiniteLoss:
    """The first loss of a run that was not finite.

    Attributes:
        value: NaN or an infinity.
        step: optimiser step that it was to move, counted from 0.
        index: this process's samples of that batch, int64 (B,), or None where they have no numbers.
    """

    value: float
    step: int
    index: Tensor | None


class LossGuard:
    """Watches the losses of a training run.

    Where reading a value is free, on the CPU, each loss is read at once. Elsewhere losses stay on the device and are
    read together by :meth:`first`; until then a flag on the device makes the optimiser leave weights and moments alone
    (``found_inf``, which the fused optimisers of PyTorch heed for the sake of scaled losses). Optimisers without that,
    and those of sharded weights, have each loss read at once.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[int, Tensor, Tensor | None]] = deque()
        self._found: Tensor | None = None

    def watch(self, value: Tensor, step: int, index: Tensor | None, optimizer: torch.optim.Optimizer | None) -> bool:
        """Take the loss of a batch, a scalar that is the same on all processes.

        Returns:
            Whether :meth:`first` should be called now.
        """
        self._pending.append((step, value, index))
        if not reading_waits(value.device) or optimizer is None or not _can_skip(optimizer):
            return True
        bad = (~torch.isfinite(value)).to(torch.float32)
        self._found = bad if self._found is None else torch.maximum(self._found, bad)
        optimizer.found_inf = self._found  # type: ignore[attr-defined]
        return len(self._pending) >= LONGEST_WAIT

    def first(self) -> NonFiniteLoss | None:
        """Read what was watched since the last call: the first loss that was not finite, if there was any."""
        pending = list(self._pending)
        self._pending.clear()
        if not pending:
            return None
        values = torch.stack([value.detach().float() for _, value, _ in pending]).tolist()
        for (step, _, index), value in zip(pending, values, strict=True):
            if value - value != 0:  # NaN and infinities alone
                return NonFiniteLoss(value, step, index)
        return None

    def reset(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Forget a run; its optimisers step again."""
        self._pending.clear()
        self._found = None
        for optimizer in optimizers:
            if hasattr(optimizer, "found_inf"):
                del optimizer.found_inf


def _can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimiser leaves everything alone where ``found_inf`` is 1, without the host's help."""
    groups = optimizer.param_groups
    fused = bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and all(
        group.get("fused") for group in groups
    )
    return fused and not any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"])
