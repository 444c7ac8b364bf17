"""Inverting an autoregressive flow by fixed-point iteration: Jacobi, and Gauss-Seidel-Jacobi by windows.

Shape suffixes: B batch, A unfinished samples of it, N tokens, L evaluated tokens, D token dimension, K blocks.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowbench.core.autocast import active_autocast_dtype
from flowbench.core.checks import check_count, check_counts, check_number
from flowbench.flows.autoregressive.affine_guided import GuidedBlock
from flowbench.flows.autoregressive.inversion import (
    BlockInversion,
    InverseMethod,
    Inversion,
    SequentialInverse,
    assemble,
    invert_sequentially,
)

__all__ = ["AutoInverse", "JacobiInverse"]


class JacobiInverse(InverseMethod):
    """Fixed-point iteration x <- mean(x_<) + std(x_<) z of all tokens of a window at once.

    One evaluation at x gives the next iterate and the residual of x itself, |(x - mean) / std - z|. The leading tokens
    whose residual is within the tolerance are accepted as they are, so that the key/value cache holds exactly what was
    accepted, and leave the iteration. The first token that is not gets its next iterate, which is exact because all
    before it are accepted: the N tokens of a block take at most N evaluations whatever the network does, and are never
    returned unconverged. The window of ``block_size`` tokens begins at the first one that is not accepted and moves
    along with it: Gauss-Seidel to its left, Jacobi within. Samples have windows of their own, leave the batch when they
    are done, and are independent of each other, values and iterations alike.

    Guarantee: within each block the residual of every token is at most ``tolerance``, plus the rounding of the state,
    32 epsilon max(1, |x|), over the std of the token. Blocks nearer the noise magnify the errors of those nearer the
    data, so that blocks get a quarter (the last one) or a sixteenth of the tolerance. With ``certify`` the residual of
    the whole flow is computed, and samples above ``tolerance`` are iterated further, at last with tolerance 0, so that
    what remains above is rounding, and a warning says so once. Where the network is coarser than the state the rounding
    is the network's (in 16 bits one epsilon): a tolerance below its precision, 1e-2 in bfloat16, costs iterations and
    buys nothing.

    Args:
        tolerance: in [0, 1e12], in units of the noise; 0 iterates to the fixed point (to rounding), which is the
            sequential inverse.
        block_size: tokens of a window: None for the whole sequence, 1 for the sequential inverse, or a list with one
            entry for each block of the flow, data to noise. Where the evaluation of many tokens costs more than that
            of one, as on a CPU, a small window is best for the block nearest the noise, whose tokens depend on each
            other in long chains: 32 to 64 at batch 1, 1 from batch 4 on.
        max_iterations: evaluations of windows in a block, after which its remaining tokens are evaluated one at a
            time; None: no bound but N.
        certify: compute the residual of the whole flow, one more pass at most, and act on it.

    Raises:
        ValueError: for a tolerance, block_size or max_iterations out of range.

    References:
        Song et al. (2021), Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving,
        arXiv:2002.03629, for Jacobi and Gauss-Seidel-Jacobi iteration and the bound on their number.

    Example:
        >>> from flowbench.networks import CausalTransformer
        >>> network = CausalTransformer(num_tokens=4, token_dim=2, width=8, depth=1, head_dim=4)
        >>> flow = AutoregressiveFlow([AffineBlock(network)])
        >>> z = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
        >>> inversion = flow.invert(z, method=JacobiInverse(tolerance=1e-3))
        >>> bool((inversion.residual <= 1e-3).all()), inversion.sequential_steps <= 4
        (True, True)
    """

    def __init__(
        self,
        tolerance: float = 1e-3,
        block_size: int | Sequence[int | None] | None = None,
        max_iterations: int | None = None,
        certify: bool = True,
    ) -> None:
        check_number("tolerance", tolerance, at_least=0, hint="0 iterates to the fixed point")
        if isinstance(block_size, Sequence):
            check_counts("block_size", block_size, or_none=True)
        else:
            check_count("block_size", block_size, or_none=True, hint="None is the whole sequence")
        check_count("max_iterations", max_iterations, or_none=True)
        self.tolerance = float(tolerance)
        self.block_size = list(block_size) if isinstance(block_size, Sequence) else block_size
        self.max_iterations = max_iterations
        self.certify = certify
        self._has_warned = False

    @property
    def name(self) -> str:
        """Tolerance and what else changes the samples, e.g. "jacobi(1e-03)"."""
        short = f"{self.tolerance:.0e}"
        parts = [short if float(short) == self.tolerance else repr(self.tolerance)]
        if self.block_size is not None:
            parts.append(f"block={self.block_size}".replace(" ", ""))
        if self.max_iterations is not None:
            parts.append(f"iterations={self.max_iterations}")
        if not self.certify:
            parts.append("uncertified")
        return f"jacobi({','.join(parts)})"

    def trace(self, blocks: Sequence[GuidedBlock], z: Tensor) -> tuple[Inversion, list[Tensor]]:
        """As :meth:`InverseMethod.trace`.

        Raises:
            ValueError: if block_size is a list of another length than the flow.
        """
        sizes = [
            guided.num_tokens if size is None else size
            for guided, size in zip(blocks, self.block_sizes(len(blocks)), strict=True)
        ]
        solved = self._sweep(blocks, sizes, [z], self.tolerance)
        states = [z, *(one.x for one in solved)]
        inversion = assemble(blocks, states, solved, self.certify)
        if self.certify and self.tolerance > 0:
            for tolerance in (self.tolerance / 16, 0.0):
                inversion = self._refined(blocks, sizes, states, inversion, tolerance)
            self._warn_above(inversion)
        return inversion, states

    def _warn_above(self, inversion: Inversion) -> None:
        """Warn once where rounding keeps samples above the tolerance."""
        assert inversion.residual is not None
        above = ~(inversion.residual <= self.tolerance)
        if self._has_warned or not bool(above.any()):
            return
        self._has_warned = True
        warnings.warn(
            f"{int(above.sum())} of {len(above)} samples are inverted to max |f(x) - z| ="
            f" {float(inversion.residual.max()):.2g}, not to tolerance={self.tolerance:g}: rounding of the network or"
            " of the state is larger; raise the tolerance or the precision",
            stacklevel=2,
        )

    def _refined(
        self,
        blocks: Sequence[GuidedBlock],
        sizes: list[int],
        states: list[Tensor],
        inversion: Inversion,
        tolerance: float,
    ) -> Inversion:
        """The samples above the tolerance iterated on from where they are; changes the states."""
        assert inversion.residual is not None
        rows = (~(inversion.residual <= self.tolerance)).nonzero()[:, 0]
        if not len(rows):
            return inversion
        chosen = [guided.rows(rows) for guided in blocks]
        starts = [state[rows] for state in states]
        solved = self._sweep(chosen, sizes, starts, tolerance)
        again = assemble(chosen, [starts[0], *(one.x for one in solved)], solved, certify=True)
        for state, one in zip(states[1:], solved, strict=True):
            state[rows] = one.x
        assert again.residual is not None
        residual, iterations = inversion.residual.clone(), inversion.iterations.clone()
        residual[rows] = again.residual
        iterations[:, rows] += again.iterations
        evaluations = inversion.network_evaluations + again.network_evaluations * len(rows) / len(states[0])
        steps = inversion.sequential_steps + again.sequential_steps
        return Inversion(states[-1], evaluations, steps, iterations, residual)

    def _sweep(
        self, blocks: Sequence[GuidedBlock], sizes: list[int], states: list[Tensor], tolerance: float
    ) -> list[BlockInversion]:
        """All blocks once, the last one first; states are z and, where there are, first guesses of what follows."""
        solved: list[BlockInversion] = []
        state = states[0]
        for guided, size in zip(reversed(blocks), reversed(sizes), strict=True):
            if size == 1:
                solved.append(invert_sequentially(guided, state))
            else:
                guess = states[len(solved) + 1] if len(states) > 1 else None
                # Errors grow on the way from the data to the noise: the last block's reach the certificate as they are.
                margin = _MARGIN if guided is blocks[-1] else _MARGIN / 4
                keep_error = self.certify and guided is blocks[0]
                iteration = _Iteration(guided, state, guess, margin * tolerance, self.max_iterations, keep_error)
                solved.append(iteration.run(size))
            state = solved[-1].x
        return solved

    def block_sizes(self, num_blocks: int) -> list[int | None]:
        """The window of each block.

        Raises:
            ValueError: if block_size is a list of another length than the flow.
        """
        sizes = self.block_size if isinstance(self.block_size, list) else [self.block_size] * num_blocks
        if len(sizes) != num_blocks:
            raise ValueError(f"block_size must have one entry for each of {num_blocks} blocks, got {len(sizes)}")
        return sizes


@dataclass
class _Samples:
    """The samples that are evaluated together; tokens in the block's order."""

    guided: GuidedBlock
    cache: Any
    index: np.ndarray  # into the batch, (A,)
    accepted: np.ndarray  # leading tokens that are accepted, (A,)
    x_ATD: Tensor  # T = N + 1: a row that stands before the first token, so that predecessors are a view
    z_AND: Tensor
    error_AND: Tensor | None  # f(x) - z where accepted

    def rows(self, rows: np.ndarray) -> _Samples:
        """Some of them, as copies."""
        at = torch.from_numpy(rows).to(self.z_AND.device)
        cache = self.guided.cache_rows(self.cache, at, len(self.index))
        error = None if self.error_AND is None else self.error_AND[at]
        samples = (self.index[rows], self.accepted[rows], self.x_ATD[at], self.z_AND[at], error)
        return _Samples(self.guided.rows(at), cache, *samples)


class _Iteration:
    """The iteration of one block.

    Which tokens are accepted is kept on the host, which decides after every evaluation what to evaluate next.
    """

    def __init__(
        self,
        guided: GuidedBlock,
        z: Tensor,
        guess: Tensor | None = None,
        tolerance: float = 0.0,
        max_iterations: int | None = None,
        keep_error: bool = False,
    ) -> None:
        z_BND = guided.block.ordered(z)
        self.x_BTD = F.pad(z_BND if guess is None else guided.block.ordered(guess), (0, 0, 1, 0))
        self.error_BND = torch.zeros_like(z_BND) if keep_error else None
        self.iterations = np.zeros(len(z), dtype=np.int64)
        index, accepted = np.arange(len(z)), np.zeros(len(z), dtype=np.int64)
        cache = guided.allocate_cache(len(z))
        self.samples = _Samples(guided, cache, index, accepted, self.x_BTD, z_BND, self.error_BND)
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.rounding = _rounding(z, guided.block)
        # Iterates far from the solution may overflow; squares of what is let through do not.
        self.bound = torch.finfo(z.dtype).max ** 0.25
        self.evaluations, self.steps = 0.0, 0

    def run(self, size: int) -> BlockInversion:
        """Iterate windows of ``size`` tokens, each sample's from its first token that is not accepted."""
        guided = self.samples.guided
        while len(self.samples.index):
            samples = self.samples
            first, stop = int(samples.accepted.min()), min(int(samples.accepted.max()) + size, guided.num_tokens)
            if self.steps == self.max_iterations:
                size = 1
            if size == 1:  # samples ahead wait for the others rather than widen the evaluation
                stop = first + 1
            self.iterations[samples.index] += samples.accepted < stop
            self._evaluate(samples, first, stop, size)
            unfinished = np.flatnonzero(samples.accepted < guided.num_tokens)
            if len(unfinished) < len(samples.index):
                self._store(samples)
                self.samples = samples.rows(unfinished)
        x = guided.block.restored(self.x_BTD[:, 1:])
        error = None if self.error_BND is None else guided.block.restored(self.error_BND)
        iterations = torch.from_numpy(self.iterations).to(x.device)
        return BlockInversion(x, error, iterations, self.evaluations, self.steps)

    def _evaluate(self, samples: _Samples, first: int, stop: int, size: int) -> None:
        """Evaluate tokens first..stop-1; in each window accept what is within the tolerance, replace the rest."""
        guided, x_ATD = samples.guided, samples.x_ATD
        mean, std = guided.extend(x_ATD[:, first:stop], first, samples.cache)
        self.evaluations += len(mean) * guided.cost(first, stop)
        self.steps += 1
        old = x_ATD[:, first + 1 : stop + 1]
        new = torch.addcmul(mean, std, samples.z_AND[:, first:stop])
        magnitude = new.abs()
        change = old - new
        limit = magnitude.clamp(min=1).mul_(self.rounding).add_(std, alpha=self.tolerance)
        close = (change.abs() <= limit).all(dim=2).cpu().numpy()

        token, begin = np.arange(first, stop), samples.accepted[:, None]
        end = np.minimum(begin + size, stop)  # of the windows
        close |= (token < begin) | (token >= end)
        run = np.where(close.all(axis=1), stop, first + close.argmin(axis=1))[:, None]
        # The first token that is not close: all before it are accepted, so its next iterate is exact.
        exact = np.minimum(run, end)
        samples.accepted = np.maximum(begin, np.minimum(exact + 1, end))[:, 0]
        if not magnitude.amax() <= self.bound:
            guess = new.nan_to_num(nan=0.0, posinf=self.bound, neginf=-self.bound).clamp(-self.bound, self.bound)
            new = torch.where(_mask(token == exact, new), new, guess)
        if samples.error_AND is not None:
            _copy_runs(samples.error_AND[:, first:stop], change / std, begin - first, exact - first)
        _copy_runs(old, new, exact - first, end - first)

    def _store(self, samples: _Samples) -> None:
        if samples.x_ATD is self.x_BTD:
            return
        at = torch.from_numpy(samples.index).to(self.x_BTD.device)
        self.x_BTD[at] = samples.x_ATD
        if self.error_BND is not None and samples.error_AND is not None:
            self.error_BND[at] = samples.error_AND


def _copy_runs(target_ALD: Tensor, source_ALD: Tensor, begin_A1: np.ndarray, end_A1: np.ndarray) -> None:
    """Copy each sample's tokens begin..end-1."""
    if len(target_ALD) == 1:  # the usual case where latency counts: no mask
        run = slice(begin_A1.item(), end_A1.item())
        target_ALD[:, run] = source_ALD[:, run]
        return
    token = np.arange(target_ALD.shape[1])
    mask = _mask((token >= begin_A1) & (token < end_A1), target_ALD)
    target_ALD.copy_(torch.where(mask, source_ALD, target_ALD))


def _mask(mask_AL: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(mask_AL).to(like.device)[:, :, None]


class AutoInverse(InverseMethod):
    """Jacobi iteration for small batches, token by token for large ones.

    With the cache a sequential inverse does the arithmetic of one pass in N steps that wait for each other; Jacobi does
    several passes in few steps. So Jacobi is faster as long as one token of the batch does not occupy the processor.

    Args:
        tolerance: of :class:`JacobiInverse`.
        crossover: largest batch for Jacobi, >= 0; None: 4 on a CPU, 64 elsewhere (an estimate, not a measurement).
        block_size: of :class:`JacobiInverse`; None: the whole sequence, but in the block nearest the noise on a CPU 48
            tokens at batches 1 and 2, and one token above.
        max_iterations: of :class:`JacobiInverse`.
        certify: compute the residual of the whole flow, one more pass, whichever method is chosen.

    Raises:
        ValueError: for a crossover below 0, or as :class:`JacobiInverse`.

    Example:
        >>> method = AutoInverse(crossover=4)
        >>> method.chosen(batch_size=2, num_blocks=1, device=torch.device("cpu")).name
        'jacobi(1e-03,block=[48])'
        >>> method.chosen(batch_size=64, num_blocks=1, device=torch.device("cpu")).name
        'sequential'
    """

    def __init__(
        self,
        tolerance: float = 1e-3,
        crossover: int | None = None,
        block_size: int | Sequence[int | None] | None = None,
        max_iterations: int | None = None,
        certify: bool = True,
    ) -> None:
        check_count("crossover", crossover, at_least=0, or_none=True, hint="a batch size, None is the device's own")
        self.jacobi = JacobiInverse(tolerance, block_size, max_iterations, certify)
        self.crossover = crossover

    @property
    def name(self) -> str:
        """Which of the two a batch gets is decided by its size and, without a crossover, by its device."""
        crossover = "" if self.crossover is None else f",crossover={self.crossover}"
        return f"auto({self.jacobi.name}{crossover})"

    def chosen(self, batch_size: int, num_blocks: int, device: torch.device) -> InverseMethod:
        """The method for a batch.

        Raises:
            ValueError: if block_size is a list of another length than the flow.
        """
        self.jacobi.block_sizes(num_blocks)
        on_cpu = device.type == "cpu"
        crossover = self.crossover
        if crossover is None:
            crossover = _CROSSOVER_CPU if on_cpu else _CROSSOVER_ACCELERATOR
        if batch_size > crossover:
            return SequentialInverse(certify=self.jacobi.certify)
        if self.jacobi.block_size is not None or not on_cpu:
            return self.jacobi
        sizes = [*[None] * (num_blocks - 1), _DEEP_WINDOW if batch_size <= _DEEP_WINDOW_BATCH else 1]
        return JacobiInverse(self.jacobi.tolerance, sizes, self.jacobi.max_iterations, self.jacobi.certify)

    def trace(self, blocks: Sequence[GuidedBlock], z: Tensor) -> tuple[Inversion, list[Tensor]]:
        """As :meth:`InverseMethod.trace`."""
        return self.chosen(len(z), len(blocks), z.device).trace(blocks, z)


# Tolerance of the last block over that of the flow. Measured on MNIST, errors of the other blocks reach the noise up to
# seven times as large; convergence is faster than linear, so that a small margin is cheaper than iterating again.
_MARGIN = 0.25

# On one thread of an AMD EPYC (Zen 5), TARFlows of 4 blocks of 2 layers on MNIST, tolerance 1e-3 with certificate:
# sequential over Jacobi processor time at batches 4, 8 and 16 is 1.4, 1.2 and 0.9 (49 tokens, width 64), 1.6, 0.9 and
# 0.6 (196 tokens, width 64), 2.1, 1.5 and 0.9 (196 tokens, width 32), with one token at a time in the block nearest the
# noise. It depends on its tokens in long chains: at batch 1 a window of 48 tokens there makes 1.9, 2.2 and 2.6 into
# 2.1, 2.7 and 4.2, at batch 4 1.4, 1.6 and 2.1 into 1.2, 1.3 and 2.1. No accelerator was at hand.
_CROSSOVER_CPU = 4
_DEEP_WINDOW, _DEEP_WINDOW_BATCH = 48, 2
_CROSSOVER_ACCELERATOR = 64


def _rounding(state: Tensor, network: nn.Module) -> float:
    """Relative change between iterates that is mere rounding, of the state or of a coarser network."""
    dtype = next((parameter.dtype for parameter in network.parameters()), state.dtype)
    if dtype != torch.float64:  # which autocast leaves alone
        dtype = active_autocast_dtype(state.device) or dtype
    # Of 16-bit networks a single epsilon: 32 of bfloat16's would be a quarter.
    coarse = torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else 32)
    return max(32 * torch.finfo(state.dtype).eps, coarse)
