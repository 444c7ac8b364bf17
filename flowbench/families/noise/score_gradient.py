"""The gradient of a loss by its input, read from the backward pass that gives the parameters theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.autograd.function import once_differentiable

__all__ = [
    "LevelDensity",
    "LogDensity",
    "check_shared_backward",
    "frozen",
    "kept_for_two_passes",
    "not_a_leaf",
    "score",
    "with_input_gradient",
]

LogDensity = Callable[[Tensor, Tensor | None], Tensor]
"""Log-density (B,) of points (B, ...) given their labels (B,), or None."""

LevelDensity = Callable[[Tensor, Tensor | None, float], Tensor]
"""The same at a noise level, which a flow that is not told levels leaves out of account."""


class _HandOn(torch.autograd.Function):
    """A number whose backward gives each parameter a gradient that is known already, times the incoming one."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        gradients = ctx.gradients
        if gradients is None:
            raise RuntimeError("the gradients of this loss were handed on already: go backward once")
        # In place and let go of, so that the parameters own the only copy; a second pass would scale them again.
        ctx.gradients = None
        torch._foreach_mul_(gradients, factor)
        return (None, None, *gradients)


def with_input_gradient(
    loss: Tensor, inputs: Tensor, parameters: Sequence[nn.Parameter], *, retain_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Differentiate a loss now, by its input and its parameters in one pass, and give a loss to go backward from later.

    The returned loss has the value of `loss`, and its ``backward`` deals out the parameter gradients that were computed
    here, times whatever comes in: scaling, accumulation and the hooks of data-parallel training see what they always
    see.

    Args:
        loss: scalar with a graph.
        inputs: a leaf of the graph with ``requires_grad``.
        parameters: the parameters that `loss` may depend on; one that it does not depend on gets no gradient.
        retain_graph: keep the graph, when something else goes backward through it.

    Returns:
        The loss, and its gradient by `inputs`.
    """
    gradients = torch.autograd.grad(loss, [inputs, *parameters], retain_graph=retain_graph, allow_unused=True)
    used = [(p, g) for p, g in zip(parameters, gradients[1:], strict=True) if g is not None]
    handed: Tensor = _HandOn.apply(loss.detach(), [g for _, g in used], *(p for p, _ in used))
    if gradients[0] is None:
        raise ValueError("this density does not depend on its points, so it has no score to denoise with")
    return handed, gradients[0]


def score(log_density: LogDensity, x: Tensor, label: Tensor | None) -> Tensor:
    """Gradient of the log-density by each point; under ``no_grad`` and inference mode too.

    The sum over the batch is differentiated, so that a point's gradient does not depend on its neighbours or their
    number.

    Args:
        log_density: of points and labels.
        x: points, shape (B, ...).
        label: labels, shape (B,), or None.

    Returns:
        The score in the shape of `x`, without a graph; parameters receive no gradient.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Copies, because tensors made in inference mode cannot be saved for a backward pass.
        points = x.detach().clone().requires_grad_(True)
        given = None if label is None else label.clone()
        (gradient,) = torch.autograd.grad(log_density(not_a_leaf(points), given).sum(), points)
    return gradient


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the context no parameter wants a gradient, which a score does without: it saves products and memory."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def kept_for_two_passes(wanted: bool) -> Iterator[None]:
    """Within the context compiled modules keep what their backward pass reads, so that it can go twice."""
    with functorch_config.patch(donated_buffer=False) if wanted else nullcontext():
        yield


def not_a_leaf(x: Tensor) -> Tensor:
    """The same tensor one step away from the leaf: counters of operations cannot follow a leaf that enters a module."""
    return x.view_as(x)


def check_shared_backward(trainer: L.Trainer) -> None:
    """Refuse trainings in which :func:`with_input_gradient` would give wrong gradients.

    Raises:
        ValueError: for a strategy that shards parameters, whose gradients exist only inside its own backward pass, and
            for float16, where overflowing steps are found after the fact.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ValueError(
            f"FlowScoreDenoiser needs whole gradients, which {type(strategy).__name__} shards: "
            "use one device or trainer.strategy=ddp, or choose denoiser Tweedie"
        )
    if trainer.precision in ("16-mixed", "16-true"):
        raise ValueError(
            f"FlowScoreDenoiser cannot be trained with trainer.precision={trainer.precision}, whose overflows show "
            "only after the backward pass: use bf16-mixed or 32-true"
        )
