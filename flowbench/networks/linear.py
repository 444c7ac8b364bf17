"""A linear layer that takes float32 products on a CPU through oneDNN."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowbench import onednn

__all__ = ["Linear"]

# Rows * in * out from which oneDNN's kernels make up for what a call costs, 13 us against 2 us. At 2^20 both take 22 to
# 25 us (64 rows of 64 -> 256, 16 of 128 -> 512 and of 256 -> 256) and 44 us (4 rows of 256 -> 1024); at a quarter of it
# MKL takes 0.3 to 0.6, at four times it 1.3 to 1.8, from 64 times on 2.1 to 2.3 times as long (AMD EPYC, one thread).
_MIN_WORK = 1 << 20


class Linear(nn.Linear):
    """``nn.Linear`` with the same parameters and results, to rounding."""

    def forward(self, x: Tensor) -> Tensor:
        """Map the last axis."""
        if not _suits(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled():
            y: Tensor = _OneDNNLinear.apply(x.flatten(0, -2), self.weight, self.bias)
        else:
            y = onednn.product(x.flatten(0, -2), self.weight, self.bias)
        return y.unflatten(0, x.shape[:-1])


class _OneDNNLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        return onednn.product(x_RI, weight_OI, bias_O)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad_RO,) = grads
        x_RI, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        # Higher derivatives take PyTorch's own products, which know theirs.
        product = F.linear if torch.is_grad_enabled() or onednn.in_forward_mode() else onednn.product
        return (
            product(grad_RO, weight_OI.T) if needs_x else None,
            product(grad_RO.T, x_RI.T) if needs_weight else None,
            grad_RO.sum(dim=0) if needs_bias else None,
        )


def _suits(x: Tensor, weight: Tensor) -> bool:
    # The cheapest questions first: a one-token step at batch 1 asks them for every layer.
    return bool(
        x.numel() * weight.shape[0] >= _MIN_WORK
        and x.ndim > 1
        and x.shape[-1] == weight.shape[1]  # the message for another width is PyTorch's
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and onednn.is_usable()
        and type(x) is Tensor
        and type(weight) in (nn.Parameter, Tensor)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # the compiler chooses its own products
        and not torch.jit.is_tracing()
        and not onednn.in_forward_mode()
    )
