"""Which parameters an optimiser decays, and which it takes as matrices: by the type of their layer, never by ndim."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

__all__ = ["inner_matrices", "parameter_groups"]


def _is_decayed(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Decay matrices and kernels only: shrinking a norm's gain or an embedding has no regularising meaning."""
    return name.endswith("weight") and parameter.ndim >= 2 and not isinstance(module, nn.Embedding)


def _named_leaves(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    seen: set[int] = set()
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield owner, name, parameter


def parameter_groups(
    module: nn.Module, weight_decay: float, without: Collection[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Split the trainable parameters into a decayed and an undecayed group; each parameter appears once.

    Args:
        module: the module whose parameters are trained.
        weight_decay: the decay of the first group.
        without: parameters that are left out.

    Returns:
        Groups for a ``torch.optim`` optimiser; empty groups are left out.
    """
    left_out = {id(parameter) for parameter in without}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for owner, name, parameter in _named_leaves(module):
        if id(parameter) not in left_out:
            (decayed if _is_decayed(owner, name, parameter) else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def inner_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Trainable weights of the ``nn.Linear`` layers inside of networks, in the module's order.

    What joins a network to data, labels and times is no inner layer: a network names those of its submodules in its
    class attribute ``end_layers``. A weight that another layer shares, such as a tied embedding, is left out too.
    """
    inner, other = {}, set()
    ends = _end_layers(module)
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if isinstance(owner, nn.Linear) and name == "weight" and owner not in ends and parameter.requires_grad:
                inner[id(parameter)] = parameter
            else:
                other.add(id(parameter))
    return [parameter for key, parameter in inner.items() if key not in other]


def _end_layers(module: nn.Module) -> set[nn.Module]:
    named = [owner.get_submodule(name) for owner in module.modules() for name in getattr(type(owner), "end_layers", ())]
    return {inner for layer in named for inner in layer.modules()}
