"""Exponential moving average of the weights, with a warm-up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ExponentialMovingAverage"]


class ExponentialMovingAverage:
    """Shadow weights ``s <- d s + (1 - d) w`` with ``d = min(decay, (1 + n) / (10 + n))`` after n updates.

    The warm-up lets a run of a thousand steps forget its initialisation. Only parameters are averaged; buffers are
    shared with the live model.

    Args:
        module: the live module; its parameters are tracked in order of their names.
        decay: the final decay, in [0, 1); 0 makes the shadow equal to the live weights.

    Raises:
        ValueError: when `decay` is out of range.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema_decay must lie in [0, 1), got {decay}: try 0.999, or 0 for none")
        self.decay = decay
        self.num_updates = 0
        self._live = dict(module.named_parameters())
        self._shadow = {name: p.detach().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Fold the live weights in, once per optimiser step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        live = [p.detach() for p in self._live.values()]
        shadow = [self._on_device(name, p) for name, p in self._live.items()]
        torch._foreach_lerp_(shadow, live, 1.0 - decay)

    def _on_device(self, name: str, parameter: Tensor) -> Tensor:
        """The shadow follows the module when it is moved to another device or dtype."""
        if self._shadow[name].device != parameter.device or self._shadow[name].dtype != parameter.dtype:
            self._shadow[name] = self._shadow[name].to(parameter)
        return self._shadow[name]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the module holds the averaged weights; the live ones come back whatever happens.

        Tensors are exchanged, not copied, so entering and leaving cost nothing and restore the exact bits.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, parameter in self._live.items():
            shadow = self._on_device(name, parameter)
            self._shadow[name], parameter.data = parameter.data, shadow

    def state_dict(self) -> dict[str, Any]:
        """Shadow weights and the number of updates."""
        return {"num_updates": self.num_updates, "shadow": dict(self._shadow)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave.

        Raises:
            ValueError: when the names differ from those of the module.
        """
        if state["shadow"].keys() != self._shadow.keys():
            unknown = sorted(state["shadow"].keys() ^ self._shadow.keys())
            raise ValueError(f"the averaged weights do not fit this model: {unknown[0]} is on one side only")
        self.num_updates = int(state["num_updates"])
        self._shadow = {name: state["shadow"][name].to(self._live[name]).clone() for name in self._live}
