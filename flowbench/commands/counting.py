"""Cost of a model before it is trained: parameters, operations, cache and memory, from shapes alone.

Everything runs on the meta device: no data are read, no weights are allocated, no autoencoder is trained. Operations
are multiplications and additions of matrix products and convolutions, two per multiply-add; causal attention counts
with its full square, as the budget counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowbench.core.contract import returned
from flowbench.core.terminal import wrapped
from flowbench.data import Batch, DataSpec
from flowbench.data.catalogue import declared_spec
from flowbench.families import Autoencoder, BatchPairing, FlowMatching, FlowModule, TARFlow
from flowbench.families.conditioning.base import NullConditioner
from flowbench.flows import FixedStepSolver, GaussianSource, IndependentCoupling, UniformWeight
from flowbench.training import TrainingModule, count_flops
from flowbench.training.module import Loss

if TYPE_CHECKING:
    from flowbench.config import Experiment

__all__ = ["BlockCount", "ModelCount", "count", "count_module", "loss_of_one", "meta_module", "training_flops"]

_META = torch.device("meta")
_FLOAT_BYTES = 4


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
class ModelCount:
    """Size and cost of a model; operations are per sample, bytes are those of float32.

    Attributes:
        family: class of the model.
        data: shape of one sample.
        space: shape of one point where the flow lives (latents of a latent family).
        num_classes: classes that it is conditioned on; None: unconditional.
        blocks: blocks from the data to the noise; empty unless the flow is autoregressive.
        parameters: trained parameters, all networks together.
        moments: numbers that the optimiser keeps between steps: two for each parameter that AdamW steps.
        training_flops: one training step, forward and backward; a frozen autoencoder left out.
        evaluation_flops: one network evaluation, or one parallel pass through all blocks; None for an autoencoder.
        evaluations: network evaluations of the configured fixed-step solver, or 1 for an autoregressive flow, whose
            cache makes all steps together cost one pass; None where they depend on the data.
        sampling_flops: drawing one sample: without guidance, decoder and denoising; None as `evaluations`.
        cache_bytes: keys and values while one sample is drawn; blocks are inverted one after the other, so it is the
            largest block's. None without a cache.
        averaged: whether averaged weights are kept too.
    """

    family: str
    data: tuple[int, ...]
    space: tuple[int, ...]
    num_classes: int | None
    blocks: tuple[BlockCount, ...]
    parameters: int
    moments: int
    training_flops: int
    evaluation_flops: int | None
    evaluations: int | None
    sampling_flops: int | None
    cache_bytes: int | None
    averaged: bool

    @property
    def state_bytes(self) -> int:
        """Weights, gradients, AdamW's moments and, where they are kept, averaged weights, all in float32.

        Exact. Activations, temporary buffers, the allocator's reserve and a frozen autoencoder come on top.
        """
        return _FLOAT_BYTES * ((3 if self.averaged else 2) * self.parameters + self.moments)

    def text(self) -> str:
        """A table of the blocks and a line for every number."""
        return "\n".join([*_block_table(self.blocks), *_lines(self)])


def count(experiment: Experiment) -> ModelCount:
    """Count an experiment's model.

    Args:
        experiment: validated configuration.

    Raises:
        ValueError: when the data are the user's own and declare no shape, or a class refuses its arguments.
    """
    return count_module(meta_module(experiment))


def meta_module(experiment: Experiment, spec: DataSpec | None = None) -> TrainingModule:
    """The experiment's model on the meta device, with untrained models on that device for what it requires.

    Args:
        experiment: validated configuration.
        spec: of the data, where they have been read; None takes what is known of them unread.

    Raises:
        ValueError: as :func:`count`.
    """
    with _META:
        spec = spec or _spec(experiment)
        # What is required works on the same data, whatever its own file declares.
        required = {name: meta_module(needed, spec) for name, needed in experiment.requirements.items()}
        module = experiment.build_model(spec, **required)
    if not isinstance(module, TrainingModule):
        raise ValueError(f"model.class_path must name a flowbench module, got {type(module).__name__}")
    return module


def _spec(experiment: Experiment) -> DataSpec:
    data: dict[str, Any] = experiment.resolved["data"]
    return declared_spec(data.get("dataset", "digits"), data.get("shape"), data.get("num_classes"), data.get("levels"))


def count_module(module: TrainingModule) -> ModelCount:
    """Count a model whose parameters lie on the meta device.

    Raises:
        ValueError: for a model that trains no network of its own.
    """
    if type(module) is not Autoencoder and not isinstance(module, FlowModule):
        raise ValueError(f"flows and autoencoders can be counted; {type(module).__name__} builds on a trained one")
    flow = module if isinstance(module, FlowModule) else None
    blocks = tuple(map(_count_block, module.flow.blocks)) if isinstance(module, TARFlow) else ()
    evaluation, evaluations = _evaluation(module, blocks)
    sampling = sum(block.sampling_flops for block in blocks) if blocks else None
    if not blocks and evaluation is not None and evaluations is not None:
        sampling = evaluation * evaluations
    return ModelCount(
        family=type(module).__name__,
        data=module.spec.shape,
        space=flow.flow_shape if flow else module.spec.shape,
        num_classes=flow.num_classes if flow else None,
        blocks=blocks,
        parameters=sum(p.numel() for p in module.parameters() if p.requires_grad),
        moments=module.optimizer_config.num_moments(module),
        training_flops=training_flops(module),
        evaluation_flops=evaluation,
        evaluations=evaluations,
        sampling_flops=sampling,
        cache_bytes=max(block.cache_bytes for block in blocks) if blocks else None,
        averaged=module.ema_decay > 0,
    )


def training_flops(module: TrainingModule) -> int:
    """Operations of one training step per sample of a model on the meta device; see :class:`ModelCount`."""
    return count_flops(lambda: loss_of_one(module))


def loss_of_one(module: TrainingModule) -> Tensor:
    """The training loss of one point of the flow's space, or of one sample of an autoencoder.

    What looks at values, pairing, conditions, and what is fitted to data, is taken out of the module: it is no matrix
    product and never was a part of the count.

    Args:
        module: on the meta device, or on the CPU.
    """
    rng = torch.Generator()  # a generator of the CPU serves the meta device, which draws nothing
    device = next((parameter.device for parameter in module.parameters()), _META)
    if not isinstance(module, FlowModule):
        batch = Batch(torch.zeros(1, *module.spec.shape, device=device))
        return returned(module.training_loss(batch, rng), Loss, module, "training_loss").total
    if isinstance(module, FlowMatching):
        module.pairing = BatchPairing(IndependentCoupling())
        module.source = GaussianSource() if module.source.needs_fit else module.source
        module.weight = UniformWeight() if module.weight.needs_fit else module.weight
        if module.conditioner is not None:
            module.conditioner = NullConditioner(module.conditioner.channels(module.space))
    point = torch.zeros(1, *module.flow_shape, device=device)
    loss = module.flow_loss(point, _label(module.num_classes, device), rng)
    return returned(loss, Loss, module, "flow_loss").total


def _label(num_classes: int | None, device: torch.device = _META) -> Tensor | None:
    return None if num_classes is None else torch.zeros(1, dtype=torch.int64, device=device)


def _evaluation(module: TrainingModule, blocks: Sequence[BlockCount]) -> tuple[int | None, int | None]:
    """Operations of one evaluation, and the evaluations of a sample."""
    if blocks:
        return sum(block.evaluation_flops for block in blocks), 1
    if not isinstance(module, FlowMatching):
        return None, None
    x, t = torch.empty(1, *module.flow_shape, device=_META), torch.zeros(1, device=_META)
    channels = 0 if module.conditioner is None else module.conditioner.channels(module.space)
    given = (x.new_zeros((1, channels, *x.shape[2:])),) if channels else ()
    flops = _forward_flops(lambda: module.network(x, t, _label(module.num_classes), *given))
    solver = module.solver
    return flops, solver.num_steps * solver.evaluations_per_step if isinstance(solver, FixedStepSolver) else None


def _count_block(block: nn.Module) -> BlockCount:
    network: Any = block.network
    label = _label(network.num_classes)
    tokens = torch.empty(1, network.num_tokens, network.token_dim, device=_META)
    cache = network.allocate_cache(1)

    def step(position: int) -> int:
        return _forward_flops(lambda: network.step(tokens[:, 0], position, cache, label))

    # Attention sees one token more at every step, so the steps' costs are an arithmetic series.
    first, last = step(network.num_tokens - network.num_slots), step(network.num_tokens - 1)
    return BlockCount(
        layers=len(network.blocks),
        labelled=network.num_classes is not None,
        parameters=sum(p.numel() for p in block.parameters()),
        evaluation_flops=_forward_flops(lambda: block(tokens, label)),
        sampling_flops=network.num_slots * (first + last) // 2,
        cache_bytes=cache.num_bytes,
    )


def _forward_flops(call: Callable[[], object]) -> int:
    """Operations of a call without gradients; attention through its plain products, as `count_flops` takes it."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


# ---- text ---------------------------------------------------------------------------------------------


def _scaled(number: float, unit: str) -> str:
    """A number with three digits and a prefix, e.g. 1.41 GFLOP."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return (
                f"{number / size:.3g} {prefix}{unit}"
                if number / size < 999.5
                else f"{number / size:.0f} {prefix}{unit}"
            )
    return f"{number:g} {unit}"


def _block_table(blocks: Sequence[BlockCount]) -> list[str]:
    if not blocks:
        return []
    rows = [("block", "layers", "labels", "parameters", "pass", "sampling", "cache")]
    for index, block in enumerate(blocks):
        end = {0: " (data)", len(blocks) - 1: " (noise)"}.get(index, "")
        counts = (_scaled(block.evaluation_flops, "FLOP"), _scaled(block.sampling_flops, "FLOP"))
        labels = "yes" if block.labelled else "no"
        name, cache = f"{index}{end}", _scaled(block.cache_bytes, "B")
        rows.append((name, str(block.layers), labels, f"{block.parameters:,}", *counts, cache))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["  ".join([row[0].ljust(widths[0]), *right[1:]]) for row, right in zip(rows, cells, strict=True)]
    return [*lines, ""]


def _lines(found: ModelCount) -> list[str]:
    size = "x".join(map(str, found.data))
    latent = f", latents {'x'.join(map(str, found.space))}" if found.space != found.data else ""
    classes = "unconditional" if found.num_classes is None else f"{found.num_classes} classes"
    drawn = "depends on the data" if found.sampling_flops is None else _scaled(found.sampling_flops, "FLOP")
    rows = {
        "model": f"{found.family}, {size}{latent}, {classes}",
        "parameters": f"{found.parameters:,}",
        "training step": f"{_scaled(found.training_flops, 'FLOP')} per sample, forward and backward",
    }
    if found.evaluation_flops is not None:
        rows["network evaluation"] = f"{_scaled(found.evaluation_flops, 'FLOP')} per sample"
        rows["drawing a sample"] = drawn + _how_drawn(found)
    if found.cache_bytes is not None:
        rows["key/value cache"] = f"{_scaled(found.cache_bytes, 'B')} per sample in float32; twice under guidance"
    moments = f"AdamW's moments ({_scaled(_FLOAT_BYTES * found.moments, 'B')})"
    kept = f"weights, gradients, {moments}" + (", averaged weights" if found.averaged else "")
    rows["training memory"] = f"{_scaled(found.state_bytes, 'B')}: {kept} in float32; activations come on top"
    width = max(map(len, rows))
    return [wrapped(value, f"{name:<{width}}  ", " " * (width + 2)) for name, value in rows.items()]


def _how_drawn(found: ModelCount) -> str:
    if found.blocks:
        return ": token by token with a cache; labelled blocks cost twice under guidance"
    return "" if found.evaluations is None else f": {found.evaluations} evaluations without guidance"
