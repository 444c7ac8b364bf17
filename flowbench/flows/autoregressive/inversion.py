"""Inverting an autoregressive flow: what a method returns, what it costs, and the exact sequential one.

Shape suffixes: B batch, N tokens, D token dimension, K blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.flows.autoregressive.affine_guided import GuidedBlock

__all__ = ["InverseMethod", "Inversion", "SequentialInverse"]


@dataclass(frozen=True)
class Inversion:
    """Data found from noise, with the cost of finding them.

    Attributes:
        x: tokens, shape (B, N, D).
        network_evaluations: arithmetic per sample, mean over the batch, in passes of a sample through all blocks. A
            block counts with its share of the parameters, twice where it is guided; an iteration counts with the share
            of the tokens that it evaluates, so that a sequential inverse with a cache costs one pass. Certificates
            count.
        sequential_steps: network calls that wait for each other.
        iterations: network calls that each sample needed in each block, int64, shape (K, B), blocks from data to noise.
        residual: the certificate max |f(x) - z| of each sample, f with the same labels and guidance, shape (B,); None
            where the method does not compute it.

    Example:
        >>> from flowbench.networks import CausalTransformer
        >>> network = CausalTransformer(num_tokens=4, token_dim=2, width=8, depth=1, head_dim=4)
        >>> flow = AutoregressiveFlow([AffineBlock(network)])
        >>> inversion = flow.invert(torch.zeros(3, 4, 2), method=SequentialInverse(certify=True))
        >>> inversion.x.shape, inversion.iterations
        (torch.Size([3, 4, 2]), tensor([[4, 4, 4]]))
        >>> inversion.network_evaluations, inversion.residual  # one pass to invert, one for the certificate
        (2.0, tensor([0., 0., 0.]))
    """

    x: Tensor
    network_evaluations: float
    sequential_steps: int
    iterations: Tensor
    residual: Tensor | None


@dataclass(frozen=True)
class BlockInversion:
    """One block inverted; tokens in the flow's order.

    Attributes:
        x: tokens, shape (B, N, D).
        error: f(x) - z of this block alone as far as the method computed it, same shape; None: rounding only.
        iterations: network calls that each sample needed, int64, shape (B,).
        evaluations: arithmetic, summed over samples, in passes of a sample through the whole flow.
        steps: network calls that wait for each other.
    """

    x: Tensor
    error: Tensor | None
    iterations: Tensor
    evaluations: float
    steps: int


class InverseMethod(ABC):
    """A method that inverts an autoregressive flow: noise to data, with the cost and perhaps a residual.

    Example:
        >>> methods = [SequentialInverse(), JacobiInverse(tolerance=1e-2), AutoInverse()]
        >>> [isinstance(method, InverseMethod) for method in methods]
        [True, True, True]
        >>> [method.name for method in methods]
        ['sequential', 'jacobi(1e-02)', 'auto(jacobi(1e-03))']
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The method with the options that change samples, for protocol strings."""

    @abstractmethod
    def trace(self, blocks: Sequence[GuidedBlock], z: Tensor) -> tuple[Inversion, list[Tensor]]:
        """Invert all blocks, the last one first.

        Args:
            blocks: K blocks in the order data -> noise.
            z: tokens in float32 or wider, shape (B, N, D); not changed.

        Returns:
            The inversion, and the K + 1 states from z to x.
        """


class SequentialInverse(InverseMethod):
    """Token by token with a preallocated key/value cache; exact to rounding.

    The cache makes all steps together cost the arithmetic of one pass. They wait for each other, never for the host.

    Args:
        chunk: invert at most this many samples, >= 1, at a time, so that their cache and activations stay near the
            processor; None: the whole batch at once.
        certify: compute the residual, one more pass.

    Raises:
        ValueError: for a chunk below 1.

    Example:
        >>> from flowbench.networks import CausalTransformer
        >>> network = CausalTransformer(num_tokens=4, token_dim=2, width=8, depth=1, head_dim=4)
        >>> flow = AutoregressiveFlow([AffineBlock(network)])
        >>> inversion = flow.invert(torch.zeros(3, 4, 2), method=SequentialInverse())
        >>> inversion.sequential_steps, inversion.network_evaluations  # a step for each token, one pass in all
        (4, 1.0)
    """

    def __init__(self, chunk: int | None = None, certify: bool = False) -> None:
        check_count("chunk", chunk, or_none=True, hint="None is the whole batch")
        self.chunk = chunk
        self.certify = certify

    @property
    def name(self) -> str:
        """The chunk is no part of it: samples do not depend on their batch."""
        return "sequential"

    def trace(self, blocks: Sequence[GuidedBlock], z: Tensor) -> tuple[Inversion, list[Tensor]]:
        """As :meth:`InverseMethod.trace`."""
        solved: list[BlockInversion] = []
        states = [z]
        for block in reversed(blocks):
            solved.append(invert_sequentially(block, states[-1], self.chunk))
            states.append(solved[-1].x)
        return assemble(blocks, states, solved, self.certify), states


def invert_sequentially(guided: GuidedBlock, z: Tensor, chunk: int | None = None) -> BlockInversion:
    """One block token by token."""
    z_BND = guided.block.ordered(z)
    size = chunk or max(len(z), 1)
    slices = [slice(first, first + size) for first in range(0, len(z), size)]
    parts = [guided.rows(rows).sequential(z_BND[rows]) for rows in slices]
    x_BND = parts[0] if len(parts) == 1 else torch.cat([z_BND[:0], *parts])
    slots = guided.block.network.num_slots
    iterations = torch.full((len(z),), slots, device=z.device)
    evaluations = len(z) * guided.cost(0, guided.num_tokens)
    return BlockInversion(guided.block.restored(x_BND), None, iterations, evaluations, slots * len(slices))


def assemble(
    blocks: Sequence[GuidedBlock], states: Sequence[Tensor], solved: Sequence[BlockInversion], certify: bool
) -> Inversion:
    """The inversion from its blocks, which come in the order in which they were inverted."""
    evaluations = sum(one.evaluations for one in solved) / max(len(states[0]), 1)
    steps = sum(one.steps for one in solved)
    residual = None
    if certify:
        residual, more, calls = certificate(blocks, states, solved[-1].error)
        evaluations, steps = evaluations + more, steps + calls
    iterations = torch.stack([one.iterations for one in reversed(solved)])
    return Inversion(states[-1], evaluations, steps, iterations, residual)


def certificate(
    blocks: Sequence[GuidedBlock], states: Sequence[Tensor], first_error: Tensor | None
) -> tuple[Tensor, float, int]:
    """Residual max |f(x) - z| of each sample, the arithmetic per sample and the calls that it took.

    Where the method has already computed the error of the block at the data end, at x itself, that pass is saved.
    """
    state, rest = states[-1], list(blocks)
    if first_error is not None:
        state, rest = states[-2] + first_error, rest[1:]
    for guided in rest:
        x_BND = guided.block.ordered(state)
        mean, std = guided.parallel(x_BND)
        state = guided.block.restored((x_BND - mean) / std)
    error = (state - states[0]).abs().flatten(1)
    cost = sum(guided.cost(0, guided.num_tokens) for guided in rest) if len(state) else 0.0
    return error.amax(dim=1), cost, len(rest)
