"""One block of an autoregressive flow: an affine map of each token around a causal network.

The data end is x, the noise end is z. ``forward`` maps data to noise in parallel; ``inverse`` maps noise to
data token by token.

Shape suffixes: B batch, N tokens, L some of them, D token dimension, P = 2 D parameters.

References:
    Zhai et al. (2024), Normalizing Flows are Capable Generative Models (TARFlow), arXiv:2412.06329;
    Gu et al. (2025), STARFlow, arXiv:2506.06276.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowbench.core.checks import check_scale
from flowbench.flows.autoregressive.permutation import Permutation, check_permutation, permute

__all__ = ["AffineBlock", "Bijector", "CausalNetwork"]

# softplus(x + UNIT) is 1 at x = 0.
_SOFTPLUS_UNIT = math.log(math.e - 1)


class CausalNetwork(Protocol):
    """The interface that an affine block needs of its network (an ``nn.Module``).

    Attributes:
        num_tokens: sequence length N.
        token_dim: token dimension D.
        num_classes: number of classes; the null label is index ``num_classes``. None: unconditional.
        num_slots: one-token evaluations that a sequential pass needs.

    Example:
        >>> class PreviousToken(torch.nn.Module):  # each token's mean is the token before it, its log std is 0
        ...     num_tokens, token_dim, num_classes, num_slots = 3, 1, None, 3
        ...     def forward(self, x, label=None, *, temperature=1.0):
        ...         previous = torch.nn.functional.pad(x, (0, 0, 1, -1))
        ...         return torch.cat([previous, torch.zeros_like(x)], dim=-1)
        >>> z, log_det = AffineBlock(PreviousToken())(torch.tensor([[[1.0], [3.0], [6.0]]]))
        >>> z.flatten()  # a random walk becomes its steps
        tensor([1., 2., 3.])
    """

    num_tokens: int
    token_dim: int
    num_classes: int | None
    num_slots: int

    def __call__(self, x_BND: Tensor, label: Tensor | None = None, *, temperature: Tensor | float = 1.0) -> Tensor:
        """Parameters (B, N, 2 D): means, then raw scales; row i depends on tokens before i only.

        ``temperature`` divides the attention logits: a number, or one per row, shape (B,). A network that is told the
        noise level of its points takes ``level``, shape (B,), too, here and below; others are never given one.
        """
        ...

    def allocate_cache(self, batch_size: int) -> Any:
        """State of one pass, owned by the caller: a nest of dataclasses and tuples of tensors, batch first."""
        ...

    def extend(
        self,
        previous_BLD: Tensor,
        start: int,
        cache: Any,
        label: Tensor | None = None,
        *,
        temperature: Tensor | float = 1.0,
    ) -> Tensor:
        """Parameters (B, L, 2 D) of tokens start..start+L-1, given each one's predecessor (no matter what at 0).

        Writes the cache rows of these tokens and reads those before; may be called again for the same tokens.
        """
        ...

    def step(
        self,
        previous_BD: Tensor,
        position: int,
        cache: Any,
        label: Tensor | None = None,
        *,
        temperature: Tensor | float = 1.0,
    ) -> Tensor:
        """:meth:`extend` by one token: parameters (B, 2 D)."""
        ...


class Bijector(nn.Module, ABC):
    """An invertible map with a tractable log-determinant.

    Example:
        >>> class Double(Bijector):
        ...     def forward(self, x, condition=None):
        ...         return 2 * x, torch.full((len(x),), 2.0).log() * x[0].numel()
        ...     def inverse(self, z, condition=None):
        ...         return z / 2
        >>> Double()(torch.ones(1, 2))  # log |det| = 2 ln 2
        (tensor([[2., 2.]]), tensor([1.3863]))
    """

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
        permutation: "identity", "flip" to visit the last token first, or an order of the grid, see
            :func:`~flowbench.flows.autoregressive.permutation.permute`.
        scale: "exp", std = exp(a) (TARFlow), or "softplus", std = softplus(a + ln(e - 1)) (STARFlow).
        soft_clip: c in [1e-12, 1e12] bounds means and raw scales, out <- c tanh(out / c) (STARFlow: 4); None:
            unbounded.
        grid: (rows, columns) of the tokens, for the orders that need it.

    Raises:
        ValueError: for an unknown permutation or scale, a grid that does not hold the tokens, or a soft_clip out
            of range.

    Example:
        >>> from flowbench.networks import CausalTransformer
        >>> network = CausalTransformer(num_tokens=4, token_dim=2, width=8, depth=1, head_dim=4)
        >>> block = AffineBlock(network, permutation="flip", scale="softplus")
        >>> x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
        >>> z, log_det = block(x)
        >>> z.shape, log_det.shape
        (torch.Size([3, 4, 2]), torch.Size([3]))
        >>> torch.allclose(block.inverse(z), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        network: CausalNetwork,
        permutation: Permutation = "identity",
        scale: Literal["exp", "softplus"] = "exp",
        soft_clip: float | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_permutation(permutation, grid, network.num_tokens)
        if scale not in _SCALES:
            raise ValueError(f"scale must be 'exp' or 'softplus', got {scale!r}")
        check_scale("soft_clip", soft_clip, or_none=True, hint="None is no bound")
        self.network = network
        self.permutation = permutation
        self.scale = scale
        self.soft_clip = soft_clip
        self.grid = grid

    def forward(self, x: Tensor, condition: Tensor | None = None, level: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to noise, all tokens in parallel.

        Args:
            x: tokens, shape (B, N, D).
            condition: labels in 0..num_classes (num_classes = null), int64, shape (B,); None = null for all.
            level: noise level of each point, shape (B,), for a network that is told; else None.

        Returns:
            Tokens z, shape (B, N, D), and log |det dz/dx| in nats, shape (B,).

        Raises:
            ValueError: for another shape, or a label given to an unconditional network.
        """
        x_BND = self.ordered(x)
        mean_BND, std_BND, log_std_BND = self.moments(self.network(x_BND, condition, **told(level)))
        z_BND = (x_BND - mean_BND) / std_BND
        return self.restored(z_BND), -log_std_BND.sum(dim=(1, 2))

    @torch.no_grad()
    def inverse(self, z: Tensor, condition: Tensor | None = None, level: Tensor | None = None) -> Tensor:
        """Noise to data, token by token with a key/value cache; builds no autograd graph.

        Other methods, and guidance, belong to :meth:`AutoregressiveFlow.invert`.

        Args:
            z: tokens, shape (B, N, D); not changed.
            condition: as in :meth:`forward`.
            level: as in :meth:`forward`.

        Returns:
            Tokens x, shape (B, N, D).

        Raises:
            ValueError: as :meth:`forward`.
        """
        z_BND = self.ordered(z)
        x_BND = torch.empty_like(z_BND)
        cache = self.network.allocate_cache(len(z))
        for i in range(z.shape[1]):
            previous_BD = x_BND[:, i - 1] if i else z_BND[:, 0]
            mean_BD, std_BD, _ = self.moments(self.network.step(previous_BD, i, cache, condition, **told(level)))
            x_BND[:, i] = mean_BD + std_BD * z_BND[:, i]
        return self.restored(x_BND)

    def moments(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, standard deviation and its logarithm of the network's output, in float32 or wider."""
        params = at_least_float32(params)
        if self.soft_clip is not None:
            params = self.soft_clip * torch.tanh(params / self.soft_clip)
        mean, raw = params.chunk(2, dim=-1)
        return mean, *_SCALES[self.scale](raw)

    def ordered(self, x: Tensor) -> Tensor:
        """Tokens in the block's order, in float32 or wider.

        Raises:
            ValueError: for tokens of another shape.
        """
        expected = (self.network.num_tokens, self.network.token_dim)
        if x.shape[1:] != expected:
            raise ValueError(f"tokens must have shape (B, {expected[0]}, {expected[1]}), got {tuple(x.shape)}")
        return permute(at_least_float32(x), self.permutation, self.grid)

    def restored(self, x_BND: Tensor) -> Tensor:
        """Tokens in the flow's order, from the block's."""
        return permute(x_BND, self.permutation, self.grid, inverse=True)


def told(level: Tensor | None) -> dict[str, Tensor]:
    """The noise level as an argument of a network that is told it; none for one that is not."""
    return {} if level is None else {"level": level}


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor, widened to float32 where it is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _exponential(raw: Tensor) -> tuple[Tensor, Tensor]:
    return raw.exp(), raw


def _softplus(raw: Tensor) -> tuple[Tensor, Tensor]:
    std = F.softplus(raw + _SOFTPLUS_UNIT)
    return std, std.log()


_SCALES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"exp": _exponential, "softplus": _softplus}
