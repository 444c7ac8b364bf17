"""Weights that other code trained and released, read into our modules by their names.

Every layout is that of a public repository. The mapping was written from the published equations and the names in the
files; no code is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowbench.core.nearest import suggestion
from flowbench.core.places import expand
from flowbench.families.base import FlowModule
from flowbench.families.tarflow import TARFlow
from flowbench.flows import AffineBlock
from flowbench.networks import CausalTransformer

__all__ = ["LAYOUTS", "load_released"]

State = Mapping[str, Tensor]

HEAD_DIM = 64
"""Channels of a head in apple/ml-tarflow, which its files do not hold."""

# Of one transformer layer: their names, ours.
_LAYER = {
    "attention.norm": "attention_norm",
    "attention.qkv": "attention.qkv",
    "attention.proj": "attention.out",
    "mlp.norm": "mlp_norm",
    "mlp.main.0": "mlp.0",
    "mlp.main.2": "mlp.2",
}
_KINDS = ("weight", "bias")


def load_released(module: FlowModule, path: str | Path, layout: str) -> None:
    """Read released weights into a module that was built with the sizes they have.

    Args:
        module: the flow; its weights are replaced, whole or not at all.
        path: the released file, tensors by name.
        layout: one of ``LAYOUTS``: `tarflow` is that of apple/ml-tarflow.

    Raises:
        ValueError: one line, for an unknown layout, a file that holds no such weights, or a module of other sizes.

    Example:
        >>> sorted(LAYOUTS)
        ['tarflow']
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown{suggestion(layout, LAYOUTS)}")
    LAYOUTS[layout](module, _read(expand(path)), str(path))


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"there are no weights at {path}: give the file that was released")
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on arbitrary bytes the unpickler raises anything
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise ValueError(f"the weights {path} cannot be read, the file is cut short or corrupt: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no tensors by name; a released file of weights does, a training state does not")
    return state


def _load_tarflow(module: FlowModule, state: State, where: str) -> None:
    """The layout of apple/ml-tarflow (Zhai et al., 2024, arXiv 2412.06329)."""
    if not isinstance(module, TARFlow):
        raise ValueError(f"the layout tarflow is that of a TARFlow, but the experiment builds {type(module).__name__}")
    blocks = [block for block in module.flow.blocks if isinstance(block, AffineBlock)]
    theirs, ours = _their_sizes(state, where), _our_sizes(module, blocks)
    if wrong := [f"{name} {theirs[name]}, here {ours[name]}" for name in theirs if theirs[name] != ours[name]]:
        raise ValueError(
            f"{where} and the experiment's model differ ({'; '.join(wrong)}): set the model's arguments so"
        )
    mapped: dict[str, Tensor] = {}
    for number in range(len(blocks)):
        prefix = f"blocks.{number}."
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        try:
            weights = _block(own, is_flipped=number % 2 == 1)
        except KeyError as missing:
            raise ValueError(f"{where} is no file of the layout tarflow: without {prefix}{missing.args[0]}") from None
        mapped |= {f"{prefix}network.{name}": value for name, value in weights.items()}
    expected = module.flow.state_dict()
    if unlike := sorted(mapped.keys() ^ expected.keys()):
        side = "the file has no" if unlike[0] in expected else "the model has no"
        raise ValueError(f"{where}: {side} {unlike[0]}; build a TARFlow with position: learned and start: zero")
    for name, value in mapped.items():
        if value.shape != expected[name].shape:
            raise ValueError(f"{where}: {name} has the shape {tuple(value.shape)}, not {tuple(expected[name].shape)}")
    module.flow.load_state_dict(mapped)


def _their_sizes(state: State, where: str) -> dict[str, Any]:
    """What a file's shapes say of its model."""
    first = {name.removeprefix("blocks.0."): value for name, value in state.items() if name.startswith("blocks.0.")}
    for name in ("proj_in.weight", "proj_out.weight", "pos_embed"):
        if name not in first or first[name].ndim != 2:
            raise ValueError(f"{where} is no file of the layout tarflow: it has no matrix blocks.0.{name}")
    width, dim = first["proj_in.weight"].shape
    if len(first["proj_out.weight"]) != 2 * dim:
        raise ValueError(f"{where} holds a flow that preserves volume (its option nvp was off), which TARFlow is not")
    if "var" in state and not torch.allclose(state["var"].float(), torch.ones(())):
        raise ValueError(f"{where} has a prior of its own (var is not 1), which an affine TARFlow has not")
    count = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return {
        "blocks": count,
        "layers": len({name.split(".")[1] for name in first if name.startswith("attn_blocks.")}),
        "width": width,
        "tokens": len(first["pos_embed"]),
        "numbers in a token": dim,
        "classes": len(first["class_embed"]) if "class_embed" in first else 0,
        "channels of a head": HEAD_DIM,
        "scale": "exp",
        "soft_clip": None,
        "conditioned": "all",
        "token orders": ["flip" if number % 2 else "identity" for number in range(count)],
    }


def _our_sizes(module: TARFlow, blocks: list[AffineBlock]) -> dict[str, Any]:
    """The same of a module, as its arguments were given."""
    networks = [block.network for block in blocks]
    first = networks[0]
    assert isinstance(first, CausalTransformer)
    return {
        "blocks": len(blocks),
        "layers": len(first.blocks),
        "width": first.embed.out_features,
        "tokens": first.num_tokens,
        "numbers in a token": first.token_dim,
        "classes": first.num_classes or 0,
        "channels of a head": first.head_dim,
        "scale": blocks[0].scale,
        "soft_clip": blocks[0].soft_clip,
        "conditioned": module.conditioned,
        "token orders": [block.permutation for block in blocks],
    }


def _block(own: State, is_flipped: bool) -> dict[str, Tensor]:
    """The weights of one block's network under our names."""
    dim = own["proj_in.weight"].shape[1]
    mapped = {f"embed.{kind}": own[f"proj_in.{kind}"] for kind in _KINDS}
    # Theirs has the log-scale before the mean.
    mapped |= {f"out.{kind}": own[f"proj_out.{kind}"].roll(dim, 0) for kind in _KINDS}
    table = own["pos_embed"].flip(0) if is_flipped else own["pos_embed"]  # in raster order there, in the block's here
    mapped["position_embedding"] = table[:-1]  # the last token predicts nothing
    if "class_embed" in own:
        classes = own["class_embed"].flatten(1)
        # Without a label theirs takes the mean of all classes.
        mapped["label_embedding.weight"] = torch.cat([classes, classes.mean(0, keepdim=True)])
    layers = sorted({name.split(".")[1] for name in own if name.startswith("attn_blocks.")}, key=int)
    for layer in layers:
        for theirs, ours in _LAYER.items():
            for kind in _KINDS:
                mapped[f"blocks.{layer}.{ours}.{kind}"] = own[f"attn_blocks.{layer}.{theirs}.{kind}"]
    return mapped


LAYOUTS: dict[str, Callable[[FlowModule, State, str], None]] = {"tarflow": _load_tarflow}
"""Layouts of released weights, by name."""
