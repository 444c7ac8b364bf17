"""An affine block as an inverse sees it: the Gaussian of each token given those before, with labels and guidance.

Shape suffixes: B batch, R network rows (B, or 2 B where guided), N tokens, L some of them, D token dimension.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from flowbench.flows.autoregressive.affine import AffineBlock, told
from flowbench.flows.autoregressive.guidance import AutoregressiveGuidance

__all__ = ["GuidedBlock"]


@dataclasses.dataclass(frozen=True)
class GuidedBlock:
    """A block with its labels, guidance and noise level bound; tokens are in the block's own order.

    The branches of a guided block share one batch, [first; second], and the guided tokens, so that guidance adds
    arithmetic but no sequential step.

    Attributes:
        block: the affine block.
        label: labels, int64, shape (B,); None = null, or an unconditional network.
        guidance: None = none.
        share: the block's share of the flow's parameters, which weighs its evaluations.
        level: noise level of each point, shape (B,), for a network that is told; else None.
    """

    block: AffineBlock
    label: Tensor | None
    guidance: AutoregressiveGuidance | None
    share: float
    level: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Sequence length N."""
        return self.block.network.num_tokens

    @property
    def branches(self) -> int:
        """Network rows per sample: 2 where guided, else 1."""
        return 1 if self.guidance is None else 2

    def cost(self, start: int, stop: int) -> float:
        """Arithmetic of the tokens start..stop-1, in passes of one sample through all blocks of the flow."""
        network = self.block.network
        free = network.num_tokens - network.num_slots
        slots = max(stop - max(start, free), 0)
        return self.share * self.branches * slots / max(network.num_slots, 1)

    def rows(self, rows: Tensor | slice) -> GuidedBlock:
        """The same for some of the samples."""
        label = None if self.label is None else self.label[rows]
        level = None if self.level is None else self.level[rows]
        return dataclasses.replace(self, label=label, level=level)

    def parallel(self, x_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of all tokens, each (B, N, D), in one pass."""
        rows = self._doubled(x_BND)
        return self._gaussian(self.block.network(rows, self._labels(), **self._options(rows)), 0)

    def allocate_cache(self, batch_size: int) -> Any:
        """The network's cache for ``batch_size`` samples."""
        return self.block.network.allocate_cache(self.branches * batch_size)

    def cache_rows(self, cache: Any, rows: Tensor, batch_size: int) -> Any:
        """A copy of a cache of ``batch_size`` samples for some of them."""
        return _take(cache, torch.cat([rows + branch * batch_size for branch in range(self.branches)]))

    def extend(self, previous_BLD: Tensor, start: int, cache: Any) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of tokens start..start+L-1 given each one's predecessor, (B, L, D) each."""
        rows = self._doubled(previous_BLD)
        params = self.block.network.extend(rows, start, cache, self._labels(), **self._options(rows))
        return self._gaussian(params, start)

    def sequential(self, z_BND: Tensor) -> Tensor:
        """Invert the block token by token, shape (B, N, D); the host never waits for the device."""
        branches, (batch, num_tokens, _) = self.branches, z_BND.shape
        network, cache, label = self.block.network, self.allocate_cache(batch), self._labels()
        # Both branches read the state, so it is written to both.
        x_RND = z_BND.new_empty(branches * batch, *z_BND.shape[1:])
        x_branches = x_RND.unflatten(0, (branches, batch))
        options = self._options(x_RND)
        for i in range(num_tokens):
            params = network.step(x_RND[:, max(i - 1, 0)], i, cache, label, **options)
            mean, std = self._gaussian(params[:, None], i)
            x_branches[:, :, i] = mean[:, 0] + std[:, 0] * z_BND[:, i]
        return x_RND[:batch]

    def _gaussian(self, params: Tensor, start: int) -> tuple[Tensor, Tensor]:
        mean, std, _ = self.block.moments(params)
        if self.guidance is None:
            return mean, std
        return self.guidance.combine(mean, std, start, self.num_tokens)

    def _doubled(self, x: Tensor) -> Tensor:
        return x if self.guidance is None else torch.cat([x, x])

    def _labels(self) -> Tensor | None:
        if self.guidance is None or self.label is None:
            return self.label
        return torch.cat([self.label, torch.full_like(self.label, self.block.network.num_classes or 0)])

    def _options(self, rows: Tensor) -> dict[str, Tensor]:
        level = None if self.level is None else self._doubled(self.level)
        return {**self._temperature(rows), **told(level)}

    def _temperature(self, rows: Tensor) -> dict[str, Tensor]:
        if self.guidance is None or self.guidance.temperature == 1:
            return {}
        temperature = rows.new_ones(len(rows))
        temperature[len(rows) // 2 :] = self.guidance.temperature
        return {"temperature": temperature}


def _take(value: Any, rows: Tensor) -> Any:
    """Rows of all tensors in a nest of tuples and dataclasses."""
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, tuple):
        return tuple(_take(item, rows) for item in value)
    fields = {field.name: _take(getattr(value, field.name), rows) for field in dataclasses.fields(value)}
    return dataclasses.replace(value, **fields)
