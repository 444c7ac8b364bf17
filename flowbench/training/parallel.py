"""Sharded training: every process holds a part of the weights, gradients and optimiser state (FSDP2).

Zhao et al. (2023), PyTorch FSDP, arXiv 2304.11277; ``torch.distributed.fsdp.fully_shard``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

__all__ = [
    "FullyShardedStrategy",
    "check_strategy",
    "full_tensor",
    "gathered",
    "local_tensor",
    "shard",
    "sharded_like",
    "shards_weights",
]

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class FullyShardedStrategy(ModelParallelStrategy):
    """Fully sharded data-parallel training.

    In YAML ``trainer.strategy: {class_path: flowbench.training.FullyShardedStrategy}``; it takes no arguments.
    Lightning's strategy with the choices that fit here: all processes are one data-parallel group, and a checkpoint is
    one file with whole tensors, which a plain run on one device can load and which is written by renaming.

    Weights are kept, gathered and averaged in float32; ``trainer.precision: bf16-mixed`` rounds them inside each
    product, and likelihoods, which are computed without autocast, see them whole. Each process builds the model in
    the host's memory before it is sharded: 4 bytes per parameter and process.

    Example:
        >>> check_strategy(FullyShardedStrategy())  # the one way to shard weights that is accepted
        >>> check_strategy("fsdp")
        Traceback (most recent call last):
            ...
        ValueError: trainer.strategy=fsdp is not supported: to shard weights, set ...
    """

    def __init__(self) -> None:
        super().__init__(data_parallel_size="auto", tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Start the processes' group; its size is known only now."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole state on the first process, empty elsewhere, numbered as an optimiser on one device numbers it.

        (Lightning numbers parameters in the model's order, which is another one where an optimiser has groups.)
        """
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state: dict[str, Any] = get_optimizer_state_dict(self._whole_model(), plain, options=_WHOLE)
        if not state:
            return {}
        number = {name: i for i, name in enumerate(_names(self._whole_model(), plain))}
        groups = [{**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]]
        return {"state": {number[name]: value for name, value in state["state"].items()}, "param_groups": groups}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file of one device or of any number, and give every process its part.

        Raises:
            ValueError: when the file does not fit the model.
        """
        model, path = self._whole_model(), self.broadcast(checkpoint_path)
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        set_model_state_dict(model, checkpoint["state_dict"], options=_WHOLE)
        states = checkpoint["optimizer_states"] if self.optimizers else []
        for optimizer, state in zip(self.optimizers, states, strict=True):
            name = dict(enumerate(_names(model, optimizer)))
            groups = [{**group, "params": [name[i] for i in group["params"]]} for group in state["param_groups"]]
            moments = {name[i]: value for i, value in state["state"].items()}
            named: dict[str, Any] = {"state": moments, "param_groups": groups}
            set_optimizer_state_dict(model, optimizer, named, options=_WHOLE)
        return checkpoint

    def _whole_model(self) -> nn.Module:
        assert self.model is not None, "Lightning connects the model first"
        return self.model


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of an optimiser's parameters in its order."""
    name = {id(parameter): name for name, parameter in model.named_parameters()}
    return [name[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def shards_weights(strategy: object) -> bool:
    """Whether a trainer's strategy gives each process a part of every weight."""
    return isinstance(strategy, ModelParallelStrategy)


def check_strategy(strategy: object) -> None:
    """Refuse the strategies that shard weights in ways that averages and checkpoints here do not follow.

    Args:
        strategy: ``trainer.strategy``, a name or an object.

    Raises:
        ValueError: for any of them but :class:`FullyShardedStrategy`.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    others = isinstance(strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy)
    if isinstance(strategy, FullyShardedStrategy) or not (others or name.startswith(("fsdp", "deepspeed"))):
        return
    raise ValueError(
        f"trainer.strategy={name} is not supported: to shard weights, "
        "set trainer.strategy={class_path: flowbench.training.FullyShardedStrategy}"
    )


def shard(roots: Iterable[nn.Module], mesh: DeviceMesh, outside: Iterable[Tensor] = ()) -> None:
    """Shard modules in place: transformer layers first, then what holds them (flow blocks), then each root.

    A unit's whole weights exist on a process only while the unit runs. The units are the entries of every
    ``nn.ModuleList`` inside a root, inner ones first. Nothing is cast: the flow's state stays as it is.

    Args:
        roots: modules that are called, so that hooks on ``forward`` see every use; sharded ones are passed over.
        mesh: one-dimensional mesh of all processes.
        outside: parameters that must lie inside the roots.

    Raises:
        ValueError: when a parameter lies in no root, where it would be trained on each process alone.
    """
    roots = list(roots)
    inside = {id(parameter) for root in roots for parameter in root.parameters()}
    if any(id(parameter) not in inside for parameter in outside):
        raise ValueError(
            "this model cannot be sharded, parts of it are used without being called: set trainer.strategy=ddp"
        )
    # The kernels of attention and norms want whole tensors at every use, so a unit goes back to its shard after each.
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False),
    }
    for root in roots:
        for unit in _units(root):
            if not isinstance(unit, FSDPModule):
                fully_shard(unit, **options)


def _units(root: nn.Module) -> Iterator[nn.Module]:
    """Entries of module lists, inner before outer, then the root itself."""
    for child in root.children():
        if isinstance(child, nn.ModuleList):
            for entry in child:
                yield from _units(entry)
        else:
            yield from _nested(child)
    yield root


def _nested(module: nn.Module) -> Iterator[nn.Module]:
    """Units below a module that is none itself."""
    *inner, _ = _units(module)
    yield from inner


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within the context every process holds the whole weights; a collective call on entering, none afterwards.

    Samplers call methods other than ``forward``, at which no hook gathers weights, and processes may draw different
    numbers of batches, which must not wait for each other. Modules that are not sharded are left alone.
    """
    units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.set_reshard_after_backward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.set_reshard_after_backward(True, recurse=False)
            unit.reshard()


# ---- tensors ------------------------------------------------------------------------------------------


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on the CPU; a collective call. Any other tensor itself."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor in the device, dtype and sharding of another; every process passes the whole of it.

    Returns:
        `tensor` itself where nothing is to be done.
    """
    if not isinstance(other, DTensor):
        return tensor.to(other)
    if isinstance(tensor, DTensor):
        return tensor.to(dtype=other.dtype)
    # Every process has the whole tensor, so none has to send it.
    whole = tensor.to(device=other.device, dtype=other.dtype)
    return distribute_tensor(whole, other.device_mesh, other.placements, src_data_rank=None)
