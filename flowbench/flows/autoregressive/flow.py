"""Autoregressive flows: composition of affine blocks, data to noise in parallel and back by a choice of methods.

Shape suffixes: B batch, N tokens, D token dimension, K blocks.

References:
    Zhai et al. (2024), Normalizing Flows are Capable Generative Models (TARFlow), arXiv:2412.06329;
    Gu et al. (2025), STARFlow, arXiv:2506.06276.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from flowbench.flows.autoregressive.affine import AffineBlock, Bijector, at_least_float32, told
from flowbench.flows.autoregressive.affine_guided import GuidedBlock
from flowbench.flows.autoregressive.guidance import AutoregressiveGuidance
from flowbench.flows.autoregressive.inversion import InverseMethod, Inversion, SequentialInverse

__all__ = ["AutoregressiveFlow"]


class AutoregressiveFlow(Bijector):
    """Composition of affine blocks.

    Labels go to the conditional blocks only; STARFlow conditions the deep block alone.

    Args:
        blocks: K >= 1 blocks in the order data -> noise; the last one, nearest the noise, is the deep block.

    Raises:
        ValueError: without blocks, or if their token shapes or class counts differ.

    Example:
        >>> from flowbench.networks import CausalTransformer
        >>> network = lambda: CausalTransformer(num_tokens=4, token_dim=2, width=8, depth=1, head_dim=4)
        >>> flow = AutoregressiveFlow([AffineBlock(network(), order) for order in alternating(2, last="flip")])
        >>> z = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
        >>> inversion = flow.invert(z)
        >>> inversion.x.shape, inversion.network_evaluations
        (torch.Size([3, 4, 2]), 1.0)
        >>> torch.allclose(flow(inversion.x)[0], z, atol=1e-5)
        True
    """

    def __init__(self, blocks: Iterable[AffineBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        if not self.blocks:
            raise ValueError("blocks must hold at least one block, got none")
        networks = [block.network for block in self._blocks()]
        shapes = {(network.num_tokens, network.token_dim) for network in networks}
        classes = {network.num_classes for network in networks if network.num_classes is not None}
        if len(shapes) > 1 or len(classes) > 1:
            raise ValueError(f"blocks must agree on (N, D) and classes, got {sorted(shapes)} and {sorted(classes)}")
        self.num_classes = next(iter(classes), None)

    def forward(self, x: Tensor, condition: Tensor | None = None, level: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to noise.

        Args:
            x: tokens, shape (B, N, D).
            condition: labels in 0..num_classes (num_classes = null), int64, shape (B,); None = null for all.
            level: noise level of each point, shape (B,), where the networks are told; else None.

        Returns:
            Tokens z, shape (B, N, D), and log |det dz/dx| in nats, shape (B,).

        Raises:
            ValueError: for tokens or labels of another shape, or a label given to a flow without conditional blocks.
        """
        *_, (z, logdet) = self._forward_steps(x, condition, level)
        return z, logdet

    def states(self, x: Tensor, condition: Tensor | None = None, level: Tensor | None = None) -> Tensor:
        """States from data to noise: x, then the state after each block, shape (K + 1, B, N, D)."""
        return torch.stack([state for state, _ in self._forward_steps(x, condition, level)])

    def inverse(
        self,
        z: Tensor,
        condition: Tensor | None = None,
        guidance: AutoregressiveGuidance | None = None,
        method: InverseMethod | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """Noise to data, shape (B, N, D); :meth:`invert` without the cost."""
        return self.invert(z, condition, guidance, method, level).x

    def invert(
        self,
        z: Tensor,
        condition: Tensor | None = None,
        guidance: AutoregressiveGuidance | None = None,
        method: InverseMethod | None = None,
        level: Tensor | None = None,
    ) -> Inversion:
        """Noise to data, with the cost and, from methods that have one, the certificate; without autograd.

        Args:
            z: tokens, shape (B, N, D); not changed.
            condition: as in :meth:`forward`.
            guidance: None = none.
            method: None = token by token.
            level: as in :meth:`forward`.

        Returns:
            Tokens x and the cost of finding them.

        Raises:
            ValueError: as :meth:`forward`; also for guidance where no block has two branches that differ.
        """
        return self._trace(z, condition, guidance, method, level)[0]

    def inverse_states(
        self,
        z: Tensor,
        condition: Tensor | None = None,
        guidance: AutoregressiveGuidance | None = None,
        method: InverseMethod | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """States from noise to data: z, then the state after each block, shape (K + 1, B, N, D)."""
        return torch.stack(self._trace(z, condition, guidance, method, level)[1])

    @torch.no_grad()
    def _trace(
        self,
        z: Tensor,
        condition: Tensor | None,
        guidance: AutoregressiveGuidance | None,
        method: InverseMethod | None,
        level: Tensor | None,
    ) -> tuple[Inversion, list[Tensor]]:
        self._check_condition(condition, z)
        blocks = self._guided_blocks(condition, guidance, level)
        return (method or SequentialInverse()).trace(blocks, at_least_float32(z))

    def _forward_steps(
        self, x: Tensor, condition: Tensor | None, level: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        self._check_condition(condition, x)
        state = at_least_float32(x)
        logdet = state.new_zeros(len(state))
        yield state, logdet
        for block in self._blocks():
            state, change = block(state, _label_for(block, condition), **told(level))
            logdet = logdet + change
            yield state, logdet

    def _guided_blocks(
        self, condition: Tensor | None, guidance: AutoregressiveGuidance | None, level: Tensor | None
    ) -> list[GuidedBlock]:
        blocks = self._blocks()
        sizes = [max(1, sum(p.numel() for p in block.parameters())) for block in blocks]
        guided = self._are_guided(condition, guidance)
        return [
            GuidedBlock(block, _label_for(block, condition), guidance if chosen else None, size / sum(sizes), level)
            for block, chosen, size in zip(blocks, guided, sizes, strict=True)
        ]

    def _are_guided(self, condition: Tensor | None, guidance: AutoregressiveGuidance | None) -> list[bool]:
        """Whether each block has a second branch, data to noise."""
        count = len(self.blocks)
        if guidance is None or guidance.weight == 0:
            return [False] * count
        chosen = [guidance.blocks == "all" or index == count - 1 for index in range(count)]
        if guidance.temperature != 1:
            return chosen
        labelled = [
            use and block.network.num_classes is not None for use, block in zip(chosen, self._blocks(), strict=True)
        ]
        if not any(labelled):
            raise ValueError(
                f"guidance of blocks={guidance.blocks!r} needs a conditional block; build its network with "
                "num_classes, or guide by a temperature"
            )
        if condition is None:
            raise ValueError("guidance needs labels; pass condition, guidance scale 1 for none, or a temperature")
        return labelled

    def _check_condition(self, condition: Tensor | None, tokens: Tensor) -> None:
        if condition is None:
            return
        if self.num_classes is None:
            raise ValueError("label given to an unconditional flow; build a network with num_classes")
        if condition.shape != tokens.shape[:1]:
            raise ValueError(f"label must have shape ({len(tokens)},), got {tuple(condition.shape)}")

    def _blocks(self) -> list[AffineBlock]:
        return cast("list[AffineBlock]", list(self.blocks))


def _label_for(block: AffineBlock, condition: Tensor | None) -> Tensor | None:
    return None if block.network.num_classes is None else condition
