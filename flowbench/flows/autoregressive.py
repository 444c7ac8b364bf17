"""Autoregressive flows: affine blocks around a causal network, their composition, and guided sampling.

The data end is x, the noise end is z. ``forward`` maps data to noise in parallel; ``inverse`` maps noise to
data token by token.

Shape suffixes: B batch, N tokens, D token dimension, K blocks, P = 2 D parameters.

References:
    Zhai et al. (2024), Normalizing Flows are Capable Generative Models (TARFlow), arXiv:2412.06329;
    Gu et al. (2025), STARFlow, arXiv:2506.06276.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowbench.flows.guidance import guided_gaussian
from flowbench.flows.permutation import Permutation, check_permutation, permute

__all__ = [
    "AffineBlock",
    "AutoregressiveFlow",
    "AutoregressiveGuidance",
    "Bijector",
    "CausalNetwork",
    "InverseStats",
]

# softplus(x + UNIT) is 1 at x = 0.
_SOFTPLUS_UNIT = math.log(math.e - 1)


class CausalNetwork(Protocol):
    """What an affine block asks of its network (an ``nn.Module``).

    Attributes:
        num_tokens: sequence length N.
        token_dim: token dimension D.
        num_classes: number of classes; the null label is index ``num_classes``. None: unconditional.
        num_slots: one-token evaluations that a sequential pass needs.
    """

    num_tokens: int
    token_dim: int
    num_classes: int | None
    num_slots: int

    def __call__(self, x_BND: Tensor, label: Tensor | None = None) -> Tensor:
        """Parameters (B, N, 2 D): means, then raw scales; row i depends on tokens before i only."""
        ...

    def allocate_cache(self, batch_size: int) -> Any:
        """State of one sequential pass, owned by the caller."""
        ...

    def step(self, previous_BD: Tensor | None, position: int, cache: Any, label: Tensor | None = None) -> Tensor:
        """Parameters (B, 2 D) of the token at ``position``, given the one before it (None at position 0)."""
        ...


@dataclass(frozen=True)
class AutoregressiveGuidance:
    """Classifier-free guidance of the Gaussians of a sequential inverse.

    Attributes:
        scale: s >= 1; tokens are drawn from p(x | label)^s p(x)^(1 - s), normalised. 1 = no guidance.
        blocks: "all" conditional blocks (TARFlow), or only the "deep" one, nearest the noise (STARFlow).

    Raises:
        ValueError: for a scale below 1 (for unconditional samples pass no label instead), or unknown blocks.
    """

    scale: float = 1.0
    blocks: Literal["all", "deep"] = "all"

    def __post_init__(self) -> None:
        if not 1 <= self.scale < math.inf:
            raise ValueError(f"guidance scale must be finite and at least 1 (1 = none), got {self.scale}")
        if self.blocks not in ("all", "deep"):
            raise ValueError(f"guidance blocks must be 'all' or 'deep', got {self.blocks!r}")

    @property
    def weight(self) -> float:
        """Guidance weight w = scale - 1 of STARFlow, proposition 2; 0 = none."""
        return self.scale - 1


@dataclass(frozen=True)
class InverseStats:
    """Cost of one inverse, per sample.

    Attributes:
        network_evaluations: arithmetic, in passes of a sample through all blocks; each block counts with its
            share of the parameters, and twice where it is guided. The cache makes N steps cost one pass.
        sequential_steps: one-token evaluations that wait for each other; both guidance branches share a step.
    """

    network_evaluations: float
    sequential_steps: int


class Bijector(nn.Module, ABC):
    """An invertible map with a tractable log-determinant."""

    @abstractmethod
    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to noise: z in the shape of x, and log |det dz/dx| in nats, shape (B,)."""

    @abstractmethod
    def inverse(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """Noise to data."""


class AffineBlock(Bijector):
    """One autoregressive affine map, z_i = (x_i - mean_i(x_<i)) / std_i(x_<i), in the block's token order.

    State, mean, scale and log-determinant are kept in float32 or wider whatever autocast does to the network.

    Args:
        network: a causal network; it sees the tokens in the block's order.
        permutation: "identity", or "flip" to visit the last token first.
        scale: "exp", std = exp(a) (TARFlow), or "softplus", std = softplus(a + ln(e - 1)) (STARFlow).
        soft_clip: c > 0 bounds means and raw scales, out <- c tanh(out / c) (STARFlow: 4); None: unbounded.

    Raises:
        ValueError: for an unknown permutation or scale, or a soft_clip that is not positive.
    """

    def __init__(
        self,
        network: CausalNetwork,
        permutation: Permutation = "identity",
        scale: Literal["exp", "softplus"] = "exp",
        soft_clip: float | None = None,
    ) -> None:
        super().__init__()
        check_permutation(permutation)
        if scale not in _SCALES:
            raise ValueError(f"scale must be 'exp' or 'softplus', got {scale!r}")
        if soft_clip is not None and not soft_clip > 0:
            raise ValueError(f"soft_clip must be positive, or None for no bound, got {soft_clip}")
        self.network = network
        self.permutation = permutation
        self.scale = scale
        self.soft_clip = soft_clip

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to noise, all tokens in parallel.

        Args:
            x: tokens, shape (B, N, D).
            condition: labels in 0..num_classes (num_classes = null), int64, shape (B,); None = null for all.

        Returns:
            Tokens z, shape (B, N, D), and log |det dz/dx| in nats, shape (B,).

        Raises:
            ValueError: for another shape, or a label given to an unconditional network.
        """
        x_BND = permute(self._state(x), self.permutation)
        mean_BND, std_BND, log_std_BND = self._moments(self.network(x_BND, condition))
        z_BND = (x_BND - mean_BND) / std_BND
        return permute(z_BND, self.permutation), -log_std_BND.sum(dim=(1, 2))

    @torch.no_grad()
    def inverse(self, z: Tensor, condition: Tensor | None = None, guidance_weight: float = 0.0) -> Tensor:
        """Noise to data, token by token with a key/value cache; builds no autograd graph.

        Args:
            z: tokens, shape (B, N, D); not changed.
            condition: as in :meth:`forward`.
            guidance_weight: w >= 0 of :func:`~flowbench.flows.guidance.guided_gaussian`; 0 = none.

        Returns:
            Tokens x, shape (B, N, D).

        Raises:
            ValueError: as :meth:`forward`; also if guidance is asked for without a label.
        """
        z_BND = permute(self._state(z), self.permutation)
        guided = guidance_weight != 0
        # Both branches run as one batch with twice the rows, so that guidance adds no sequential step.
        label = self._with_null(condition) if guided else condition
        cache = self.network.allocate_cache(2 * len(z) if guided else len(z))
        tokens: list[Tensor] = []
        previous: Tensor | None = None
        for position, z_BD in enumerate(z_BND.unbind(1)):
            mean, std, _ = self._moments(self.network.step(previous, position, cache, label))
            if guided:
                (mean_c, mean_u), (std_c, std_u) = mean.chunk(2), std.chunk(2)
                mean, std = guided_gaussian(mean_c, std_c, mean_u, std_u, guidance_weight)
            tokens.append(mean + std * z_BD)
            previous = tokens[-1].repeat(2, 1) if guided else tokens[-1]
        return permute(torch.stack(tokens, dim=1), self.permutation)

    def _moments(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, standard deviation and its logarithm, in float32 or wider."""
        params = _at_least_float32(params)
        if self.soft_clip is not None:
            params = self.soft_clip * torch.tanh(params / self.soft_clip)
        mean, raw = params.chunk(2, dim=-1)
        return mean, *_SCALES[self.scale](raw)

    def _state(self, x: Tensor) -> Tensor:
        expected = (self.network.num_tokens, self.network.token_dim)
        if x.shape[1:] != expected:
            raise ValueError(f"tokens must have shape (B, {expected[0]}, {expected[1]}), got {tuple(x.shape)}")
        return _at_least_float32(x)

    def _with_null(self, condition: Tensor | None) -> Tensor:
        if condition is None or self.network.num_classes is None:
            raise ValueError("guidance needs a label and a conditional network; pass condition, or scale 1 for none")
        return torch.cat([condition, torch.full_like(condition, self.network.num_classes)])


class AutoregressiveFlow(Bijector):
    """Composition of affine blocks.

    Labels go to the conditional blocks only; STARFlow conditions the deep block alone.

    Args:
        blocks: K >= 1 blocks in the order data -> noise; the last one, nearest the noise, is the deep block.

    Raises:
        ValueError: without blocks, or if their token shapes or class counts differ.
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

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to noise.

        Args:
            x: tokens, shape (B, N, D).
            condition: labels in 0..num_classes (num_classes = null), int64, shape (B,); None = null for all.

        Returns:
            Tokens z, shape (B, N, D), and log |det dz/dx| in nats, shape (B,).

        Raises:
            ValueError: for another shape, or a label given to a flow without conditional blocks.
        """
        *_, (z, logdet) = self._forward_steps(x, condition)
        return z, logdet

    def states(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """The way from data to noise: x, then the state after each block, shape (K + 1, B, N, D)."""
        return torch.stack([state for state, _ in self._forward_steps(x, condition)])

    def inverse(
        self, z: Tensor, condition: Tensor | None = None, guidance: AutoregressiveGuidance | None = None
    ) -> Tensor:
        """Noise to data, without autograd; see :meth:`inverse_stats` for the cost.

        Args:
            z: tokens, shape (B, N, D); not changed.
            condition: as in :meth:`forward`.
            guidance: None = none.

        Returns:
            Tokens x, shape (B, N, D).

        Raises:
            ValueError: as :meth:`forward`; also if guidance is asked for without a label, or where no guided
                block is conditional.
        """
        *_, x = self._inverse_steps(z, condition, guidance)
        return x

    def inverse_states(
        self, z: Tensor, condition: Tensor | None = None, guidance: AutoregressiveGuidance | None = None
    ) -> Tensor:
        """The way from noise to data: z, then the state after each block, shape (K + 1, B, N, D)."""
        return torch.stack(list(self._inverse_steps(z, condition, guidance)))

    def inverse_stats(self, guidance: AutoregressiveGuidance | None = None) -> InverseStats:
        """What :meth:`inverse` costs per sample; it depends on the architecture and the guidance only."""
        sizes = [max(1, sum(p.numel() for p in block.parameters())) for block in self.blocks]
        branches = [1 if weight == 0 else 2 for weight in self._guidance_weights(guidance)]
        return InverseStats(
            network_evaluations=sum(map(int.__mul__, sizes, branches)) / sum(sizes),
            sequential_steps=sum(block.network.num_slots for block in self._blocks()),
        )

    def _forward_steps(self, x: Tensor, condition: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        self._check_condition(condition)
        state = _at_least_float32(x)
        logdet = state.new_zeros(len(state))
        yield state, logdet
        for block in self._blocks():
            state, change = block(state, _label_for(block, condition))
            logdet = logdet + change
            yield state, logdet

    def _inverse_steps(
        self, z: Tensor, condition: Tensor | None, guidance: AutoregressiveGuidance | None
    ) -> Iterator[Tensor]:
        self._check_condition(condition)
        weights = self._guidance_weights(guidance)
        if condition is None and any(weights):
            raise ValueError("guidance needs labels; pass condition, or guidance scale 1 for none")
        state = _at_least_float32(z)
        yield state
        for block, weight in reversed(list(zip(self._blocks(), weights, strict=True))):
            state = block.inverse(state, _label_for(block, condition), weight)
            yield state

    def _guidance_weights(self, guidance: AutoregressiveGuidance | None) -> list[float]:
        """Weight of every block, data to noise; 0 = not guided."""
        weights = [0.0] * len(self.blocks)
        if guidance is None or guidance.weight == 0:
            return weights
        chosen = range(len(weights)) if guidance.blocks == "all" else [len(weights) - 1]
        for index in chosen:
            if self._blocks()[index].network.num_classes is not None:
                weights[index] = guidance.weight
        if not any(weights):
            raise ValueError(
                f"guidance of blocks={guidance.blocks!r} needs a conditional block; build its network with num_classes"
            )
        return weights

    def _check_condition(self, condition: Tensor | None) -> None:
        if condition is not None and self.num_classes is None:
            raise ValueError("label given to an unconditional flow; build a network with num_classes")

    def _blocks(self) -> list[AffineBlock]:
        return cast("list[AffineBlock]", list(self.blocks))


def _label_for(block: AffineBlock, condition: Tensor | None) -> Tensor | None:
    return None if block.network.num_classes is None else condition


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _exponential(raw: Tensor) -> tuple[Tensor, Tensor]:
    return raw.exp(), raw


def _softplus(raw: Tensor) -> tuple[Tensor, Tensor]:
    std = F.softplus(raw + _SOFTPLUS_UNIT)
    return std, std.log()


_SCALES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"exp": _exponential, "softplus": _softplus}
