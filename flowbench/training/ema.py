"""Exponential moving average of the weights, with a warm-up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flowbench.core.checks import check_number
from flowbench.training.parallel import full_tensor, local_tensor, sharded_like

__all__ = ["ExponentialMovingAverage", "check_ema_decay"]


def check_ema_decay(decay: float) -> None:
    """Refuse a decay outside of [0, 1)."""
    check_number("ema.decay", decay, at_least=0, below=1, hint="try 0.999, or 0 for none")


class ExponentialMovingAverage:
    """Shadow weights ``s <- d s + (1 - d) w`` with ``d = min(decay, (1 + n) / (10 + n))`` after n updates.

    The warm-up lets a run of a thousand steps forget its initialisation. Only parameters are averaged; buffers are
    shared with the live model. The shadow of a sharded parameter is sharded alike, and its state is whole.

    Args:
        module: the live module; its parameters are tracked in order of their names.
        decay: the final decay, in [0, 1); 0 makes the shadow equal to the live weights.

    Raises:
        ValueError: when `decay` is out of range.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        check_ema_decay(decay)
        self.decay = decay
        self.num_updates = 0
        self._module = module
        self._shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    def _pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Shadow and live weight by name; looked up at each use, for sharding replaces parameters."""
        return {name: (self._placed(name, p), p.detach()) for name, p in self._module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Fold the live weights in, once per optimiser step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        shadow, live = zip(*self._pairs().values(), strict=True)
        torch._foreach_lerp_(list(shadow), list(live), 1.0 - decay)

    def _placed(self, name: str, parameter: Tensor) -> Tensor:
        """The shadow follows the module when it is sharded, or moved to another device or dtype."""
        self._shadow[name] = sharded_like(self._shadow[name], parameter.detach())
        return self._shadow[name]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the module holds the averaged weights; the live ones come back whatever happens.

        Tensors are exchanged, not copied, so entering and leaving cost nothing and restore the exact bits; of sharded
        ones the values are exchanged, because the gathering of weights refers to the memory they lie in.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        parameters = dict(self._module.named_parameters())
        for name, (shadow, live) in self._pairs().items():
            if isinstance(live, DTensor):
                kept = local_tensor(live).clone()
                local_tensor(live).copy_(local_tensor(shadow))
                local_tensor(shadow).copy_(kept)
            else:
                self._shadow[name], parameters[name].data = parameters[name].data, shadow

    def state_dict(self) -> dict[str, Any]:
        """Shadow weights, whole, and the number of updates; a collective call where the model is sharded."""
        shadow = {name: full_tensor(value) for name, value in self._shadow.items()}
        return {"num_updates": self.num_updates, "shadow": shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave.

        Raises:
            ValueError: when the names differ from those of the module.
        """
        if state["shadow"].keys() != self._shadow.keys():
            unknown = sorted(state["shadow"].keys() ^ self._shadow.keys())
            raise ValueError(f"the averaged weights do not fit this model: {unknown[0]} is on one side only")
        self.num_updates = int(state["num_updates"])
        live = self._module.named_parameters()
        self._shadow = {name: sharded_like(state["shadow"][name], p.detach()).clone() for name, p in live}
