"""What a model costs before it is trained: parameters, operations, cache and memory, from shapes alone.

Operations are multiplications and additions of matrix products and convolutions, two per multiply-add; causal attention
counts with its full square, whatever kernel a device would use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["FLOAT_BYTES", "BlockCount", "Count", "count_flops", "forward_flops"]

FLOAT_BYTES = 4


@dataclass(frozen=True)
class BlockCount:
    """One block of an autoregressive flow.

    Attributes:
        layers: transformer layers.
        labelled: whether it sees labels, and so costs twice under guidance.
        parameters: how many.
        evaluation_flops: operations of one parallel pass of one sample.
        sampling_flops: operations of inverting it for one sample, token by token with a key/value cache.
        cache_bytes: keys and values of one sample in float32.
    """

    layers: int
    labelled: bool
    parameters: int
    evaluation_flops: int
    sampling_flops: int
    cache_bytes: int


@dataclass(frozen=True)
class Count:
    """What a model is and costs; operations are per sample, bytes are those of float32.

    Attributes:
        family: class of the model.
        data: shape of one sample.
        space: shape of one point where a flow lives (latents of a latent family).
        parameters: trained parameters, all networks together.
        moments: numbers that the optimiser keeps between steps: two for each parameter that AdamW steps.
        training_flops: one training step, forward and backward; a frozen autoencoder left out.
        averaged: whether averaged weights are kept too.
        num_classes: classes that it is conditioned on; None: unconditional.
        blocks: blocks from the data to the noise; empty unless the flow is autoregressive.
        evaluation_flops: one network evaluation, or one parallel pass through all blocks; None where nothing is drawn.
        evaluations: network evaluations of the configured fixed-step solver, or 1 for an autoregressive flow, whose
            cache makes all steps together cost one pass; None where they depend on the data.
        sampling_flops: drawing one sample: without guidance, decoder and denoising; None as `evaluations`.
        cache_bytes: keys and values while one sample is drawn; blocks are inverted one after the other, so it is the
            largest block's. None without a cache.

    Example:
        >>> count = Count("Mine", (2,), (2,), parameters=100, moments=200, training_flops=600, averaged=True)
        >>> count.state_bytes  # weights, gradients, averaged weights and two moments of four bytes each
        2000
    """

    family: str
    data: tuple[int, ...]
    space: tuple[int, ...]
    parameters: int
    moments: int
    training_flops: int
    averaged: bool
    num_classes: int | None = None
    blocks: tuple[BlockCount, ...] = ()
    evaluation_flops: int | None = None
    evaluations: int | None = None
    sampling_flops: int | None = None
    cache_bytes: int | None = None

    @property
    def state_bytes(self) -> int:
        """Weights, gradients, AdamW's moments and, where they are kept, averaged weights, all in float32.

        Exact. Activations, temporary buffers, the allocator's reserve and a frozen autoencoder come on top.
        """
        return FLOAT_BYTES * ((3 if self.averaged else 2) * self.parameters + self.moments)


def count_flops(loss: Callable[[], Tensor]) -> int:
    """Floating-point operations of one forward and backward pass.

    Attention runs through its plain matrix products while it is counted, because the fused kernels of some devices
    are invisible to the counter; so the count depends on the model and the batch, not on the machine.

    Args:
        loss: computes a scalar with a gradient; called once.

    Returns:
        Multiplications and additions of matrix products and convolutions, two per multiply-add.
    """
    return _flops(lambda: loss().backward())


def forward_flops(call: Callable[[], object]) -> int:
    """Operations of a call without gradients, as :func:`count_flops` counts them."""
    with torch.no_grad():
        return _flops(call)


def _flops(call: Callable[[], object]) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())
