"""Every product of our linear layers in the shipped experiments: our layer against PyTorch's, in one run.

    OMP_NUM_THREADS=1 python benchmarks/products.py
    OMP_NUM_THREADS=1 FLOWBENCH_KERNELS=onednn python benchmarks/products.py

Shapes are those of a training step (forward and backward), of a pass without gradients, and of one token of a
sequential sampler, at the experiment's batch size; experiments for GPUs and in `large/` are left out. All layers
have the same weights. A round calls them in turns, so short that the processor's rate stays what it is, the first
alternating; the table shows medians over rounds, in microseconds of the process's own time (of the wall's with
several threads), and medians of the ratios within a round: below 1 ours is slower. The twin is PyTorch's layer once
more: its ratio is what the machine's other work makes of equals. The way is the one that this machine's measurement
found, see `flowbench/core/kernels.py`; measuring it is not timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from flowbench.commands.counting import meta_module
from flowbench.config import Experiment
from flowbench.config.compose import compose
from flowbench.core.kernels import kernel_summary, machine_identity
from flowbench.families import FlowModule, TARFlow
from flowbench.networks.linear import Linear

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
ROUNDS, ROUND_SECONDS = 41, 0.001
Shape = tuple[str, int, int, int]
"""Kind, rows, in, out."""


def experiments() -> Iterator[tuple[str, Experiment]]:
    """Those that train a model on this machine."""
    for path in sorted(EXPERIMENTS.rglob("*.yaml")):
        name = path.relative_to(EXPERIMENTS)
        if {"gpu", "large", "base"} & set(name.parts):
            continue
        resolved = compose([path]).resolved
        if "class_path" in resolved.get("model", {}) and "dataset" in resolved.get("data", {}):  # else it is a part
            yield str(name), Experiment.from_files([path])


def shapes_of(experiment: Experiment) -> set[Shape]:
    """Products of an experiment's linear layers, by hooks on the meta device."""
    module, batch = meta_module(experiment), int(experiment.resolved["data"].get("batch_size", 64))
    found: set[tuple[int, int, int]] = set()

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.add((inputs[0].numel() // layer.in_features, layer.in_features, layer.out_features))

    for layer in module.modules():
        if isinstance(layer, Linear):
            layer.register_forward_pre_hook(note)
    if isinstance(module, FlowModule):
        module.loss_of_one()
    passes = {(rows * batch, *sizes) for rows, *sizes in found}
    tokens = {(batch, *sizes) for _, *sizes in found} if isinstance(module, TARFlow) else set()
    kinds = (("training", passes), ("pass", passes), ("token", tokens))
    return {(kind, *product) for kind, products in kinds for product in products}


def calls(shape: Shape) -> dict[str, Callable[[], object]]:
    """The product through our layer and through PyTorch's, on the same numbers."""
    kind, rows, inner, outer = shape
    layer, x = Linear(inner, outer), torch.randn(rows, inner)
    ways: dict[str, nn.Module] = {"ours": layer}
    for name in ("plain", "twin"):
        ways[name] = other = nn.Linear(inner, outer)
        other.weight, other.bias = layer.weight, layer.bias
    if kind != "training":
        return {name: torch.no_grad()(lambda way=way: way(x)) for name, way in ways.items()}
    grad = torch.randn(rows, outer)
    inputs = [x.requires_grad_(), *layer.parameters()]
    return {name: lambda way=way: torch.autograd.grad(way(x), inputs, grad) for name, way in ways.items()}


def measure(ways: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of a call of each way, by round."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for way in ways.values():
        way()
    began = clock()
    ways["plain"]()
    repeats = max(1, round(ROUND_SECONDS / max(clock() - began, 1e-6)))
    seconds: dict[str, list[float]] = defaultdict(list)
    names = list(ways)
    for _ in range(ROUNDS):
        for name in names:
            began = clock()
            for _ in range(repeats):
                ways[name]()
            seconds[name].append((clock() - began) / repeats)
        names.reverse()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    where: dict[Shape, str] = {}
    for name, experiment in experiments():
        for shape in shapes_of(experiment):
            where.setdefault(shape, name)
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {machine_identity()}\n")
    columns = ("product", "rows x in x out", "ours us", "plain us", "plain / ours", "plain / twin", "first seen in")
    print(f"| {' | '.join(columns)} |\n|---|---|---:|---:|---:|---:|---|")
    ratios: dict[str, list[float]] = {"ours": [], "twin": []}
    for shape in sorted(where):
        seconds = measure(calls(shape))
        for name, found in ratios.items():
            found.append(statistics.median(p / o for o, p in zip(seconds[name], seconds["plain"], strict=True)))
        ours, plain = (f"{1e6 * statistics.median(seconds[name]):.1f}" for name in ("ours", "plain"))
        cells = (shape[0], " x ".join(map(str, shape[1:])), ours, plain, *(f"{r[-1]:.2f}" for r in ratios.values()))
        print(f"| {' | '.join((*cells, where[shape]))} |", flush=True)
    for name, found in ratios.items():
        low, middle, high = min(found), statistics.median(found), max(found)
        print(f"\n{len(found)} products, plain / {name}: worst {low:.3f}, median {middle:.3f}, best {high:.2f}")
    print(f"ways: {kernel_summary()}")


if __name__ == "__main__":
    main()
