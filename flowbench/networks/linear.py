"""A linear layer whose float32 products on a CPU go the way that is faster there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import compress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowbench.core import onednn
from flowbench.core.kernels import ONEDNN, PLAIN, Way, fastest, is_clearly_faster, rounded_up, seconds_of

__all__ = ["Linear"]

# Rows * in * out below which PyTorch's own way is taken unmeasured: at half of it both took 22 to 25 us, twice, on the
# processor on which oneDNN gains most (AMD EPYC with AVX-512), and PyTorch a third to half of the time at an eighth.
_MIN_WORK = 1 << 21

_Shape = tuple[int, int, int]
"""Rows, in and out."""


class Linear(nn.Linear):
    """``nn.Linear`` with the same parameters and results, to rounding.

    The product, and in training the gradients of input and weight, are each taken by PyTorch's own way or through
    oneDNN, whichever is faster for their shape on this machine; see :mod:`flowbench.core.kernels`.

    Args:
        in_features: width of the input.
        out_features: width of the result.
        bias: whether a number is added to each channel.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        # Every microsecond before a one-token step's product counts: small inputs are not looked up, and those for
        # which PyTorch's way was found are kept, by their numbers, negative for those without gradients.
        self._few = -(-_MIN_WORK // out_features)
        self._plain: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        """Map the last axis."""
        numel = x.numel()
        if numel < self._few or torch.compiler.is_compiling():  # the compiler chooses its own products
            return F.linear(x, self.weight, self.bias)
        asked = numel if torch.is_grad_enabled() else -numel
        if asked in self._plain or not _suits(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        way = self._way(numel)
        if way == PLAIN:
            self._plain.add(asked)
            return F.linear(x, self.weight, self.bias)
        return _through_onednn(way, x, self.weight, self.bias)

    def _way(self, numel: int) -> str:
        rows, sizes = numel // self.in_features, (self.in_features, self.out_features)
        if torch.is_grad_enabled():  # all steps of a training have as many rows
            return fastest("linear-training", (rows, *sizes), partial(_training_ways, (rows, *sizes)))
        shape = (rounded_up(rows), *sizes)
        return fastest("linear", shape, partial(_pass_ways, shape))


def _through_onednn(way: str, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    x_RI = x.flatten(0, -2)
    if torch.is_grad_enabled():
        y_RO: Tensor = _ChosenLinear.apply(x_RI, weight_OI, bias_O, way)
    else:
        y_RO = onednn.linear(x_RI, weight_OI, bias_O)
    return y_RO.unflatten(0, x.shape[:-1])


class _ChosenLinear(torch.autograd.Function):
    """A linear map of which those products go through oneDNN that its way names."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, way: str) -> Tensor:
        return _product(way, "forward")(x_RI, weight_OI, bias_O)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.way = inputs[3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad_RO,) = grads
        x_RI, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        # Higher derivatives take PyTorch's own products, which have derivatives of their own.
        way = PLAIN if torch.is_grad_enabled() or onednn.in_forward_mode() else ctx.way
        return (
            _product(way, "input")(grad_RO, weight_OI.T) if needs_x else None,
            _product(way, "weight")(grad_RO.T, x_RI.T) if needs_weight else None,
            grad_RO.sum(dim=0) if needs_bias else None,
            None,
        )


def _product(way: str, kind: str) -> Callable[..., Tensor]:
    """The product of a kind in a way: ``plain``, ``onednn`` for all kinds or, say, ``onednn-forward-input`` for two."""
    return onednn.linear if way == ONEDNN or kind in way.split("-") else F.linear


# ---- what is measured ---------------------------------------------------------------------------------------


def _pass_ways(shape: _Shape) -> Mapping[str, Way]:
    x, weight, bias, _ = _operands(shape)
    return {PLAIN: lambda: F.linear(x, weight, bias), ONEDNN: lambda: _whole(ONEDNN, x, weight, bias)}


def _training_ways(shape: _Shape) -> Mapping[str, Way]:
    """Forward and backward, by PyTorch and with those products through oneDNN that are faster by themselves."""
    x, weight, bias, grad = _operands(shape)

    def step(linear: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Way:
        # A frozen layer, or one whose input needs no gradient, leaves out one of three products of about equal size.
        inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
        return lambda: torch.autograd.grad(torch.enable_grad()(linear)(*inputs), inputs, grad)

    plain = {PLAIN: step(F.linear)}
    factors = {"forward": (x, weight), "input": (grad, weight.detach().T), "weight": (grad.T, x.detach().T)}
    gains = [_gains(*pair) for pair in factors.values()]
    if not any(gains):
        return plain
    way = ONEDNN if all(gains) else "-".join((ONEDNN, *compress(factors, gains)))
    return plain | {way: step(partial(_whole, way))}


def _whole(way: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A product through oneDNN with all that is asked before it, which is more than a small one gains."""
    return _through_onednn(way, x, weight, bias) if _suits(x, weight) else F.linear(x, weight, bias)


def _gains(x: Tensor, weight: Tensor) -> bool:
    """Whether a product by itself is clearly faster through oneDNN."""
    ways: dict[str, Way] = {PLAIN: lambda: F.linear(x, weight), ONEDNN: lambda: onednn.linear(x, weight)}
    seconds = seconds_of(ways, torch.get_num_threads())
    return is_clearly_faster(seconds[ONEDNN], seconds[PLAIN])


def _operands(shape: _Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random input, weight, bias and gradient; layouts matter as much as sizes."""
    rows, inner, outer = shape
    rng = torch.Generator().manual_seed(0)
    sizes = ((rows, inner), (outer, inner), (outer,), (rows, outer))
    x, weight, bias, grad = (torch.randn(size, generator=rng) for size in sizes)
    return x, nn.Parameter(weight), nn.Parameter(bias), grad


# ---- where there is a choice --------------------------------------------------------------------------------


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's product can take the place of PyTorch's."""
    return bool(
        x.ndim > 1
        and x.shape[-1] == weight.shape[1]  # the message for another width is PyTorch's
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and onednn.is_usable()
        and type(x) is Tensor
        and type(weight) in (nn.Parameter, Tensor)
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and not onednn.in_forward_mode()
    )
