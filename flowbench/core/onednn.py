"""Float32 products on a CPU through oneDNN.

PyTorch sends them to MKL, whose float32 kernels use half of the vector width of AMD's AVX-512 processors (96 against
192 GFLOP/s on one core at 64 rows, width 256); on Intel's MKL is the faster one. :mod:`flowbench.core.kernels` finds
out which. bfloat16 goes through oneDNN anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["in_forward_mode", "is_usable", "linear", "needs_derivatives"]

# PyTorch's compiler emits this operator; it is not part of the public interface, hence the test for its presence.
_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def is_usable() -> bool:
    """Whether this build of PyTorch has the operator and the user has not turned oneDNN off."""
    return _AVAILABLE and bool(torch.backends.mkldnn.enabled)


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are being taken, which oneDNN's operator would drop silently.

    PyTorch has no public function for it; where the private name is missing the result is True, which is always safe.
    """
    return bool(getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0)


def needs_derivatives(*tensors: Tensor) -> bool:
    """Whether results computed from these tensors may be differentiated."""
    return in_forward_mode() or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def linear(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` of float32 matrices on the CPU, where :func:`is_usable`; without derivatives.

    Args:
        x_RI: rows, shape (R, I).
        weight_OI: shape (O, I).
        bias_O: added to every row, shape (O,).

    Returns:
        Shape (R, O).
    """
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x_RI, weight_OI, bias_O, "none", [], "")
    return y


if _AVAILABLE:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape: torch.Size, weight_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
        """Operations of the product, for PyTorch's counter: two for each term."""
        return 2 * x_shape[0] * x_shape[1] * weight_shape[0]
