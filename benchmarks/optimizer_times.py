"""Milliseconds of a training step under each optimiser, as ratios to AdamW's in the same run.

The optimisers take turns on copies of one TARFlow, a step of each per round, so that a machine whose speed drifts slows
all of them alike. A step is loss, backward pass and optimiser; the optimiser's share is measured beside it.
``torch.optim.AdamW`` with its defaults (on a CPU a loop over the parameters) is the peer of ours.

    OMP_NUM_THREADS=1 python benchmarks/optimizer_times.py                 # the table of docs/results/optimizers.md
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch

from flowbench.data import Batch, DataSpec
from flowbench.families import TARFlow
from flowbench.training import SGD, SWAN, AdamW, SinkGD

SPEC = DataSpec("images", "1", (1, 8, 8), levels=17)
ARMS: dict[str, Callable[[torch.nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda module: AdamW(lr=1e-3).build(module),
    "torch.optim.AdamW": lambda module: torch.optim.AdamW(module.parameters(), lr=1e-3),
    "sinkgd, L = 1": lambda module: SinkGD(lr=1e-3, iterations=1).build(module),
    "sinkgd, L = 5": lambda module: SinkGD(lr=1e-3).build(module),
    "swan": lambda module: SWAN(lr=1e-3).build(module),
    "sgd": lambda module: SGD(lr=1e-3).build(module),
}


def step(module: TARFlow, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[float, float]:
    """Seconds of a whole step, and of the optimiser in it."""
    start = time.perf_counter()
    optimizer.zero_grad()
    module.training_loss(batch, torch.Generator().manual_seed(0)).total.backward()
    middle = time.perf_counter()
    optimizer.step()
    end = time.perf_counter()
    return end - start, end - middle


def measure(width: int, batch_size: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of a step and of the optimiser, by arm."""
    torch.manual_seed(0)
    module = TARFlow(SPEC, layers=[2, 2], width=width, head_dim=32, patch_size=2)
    modules = {arm: copy.deepcopy(module) for arm in ARMS}
    optimizers = {arm: build(modules[arm]) for arm, build in ARMS.items()}
    batch = Batch(torch.rand(batch_size, *SPEC.shape) * 1.8 - 0.9)
    seconds: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for number in range(rounds + 1):
        for arm in ARMS:
            found = step(modules[arm], optimizers[arm], batch)
            if number:  # the first round warms up
                seconds[arm].append(found)
    return {arm: tuple(map(statistics.median, zip(*found, strict=True))) for arm, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), batch {arguments.batch}, medians of")
    print(f"{arguments.rounds} rounds in turns; ratios to adamw\n")
    print("| width | optimiser | ms a step | ratio | ms of the optimiser |\n|---:|---|---:|---:|---:|")
    for width in arguments.widths:
        found = measure(width, arguments.batch, arguments.rounds)
        for arm, (whole, own) in found.items():
            ratio = whole / found["adamw"][0]
            print(f"| {width} | {arm} | {1000 * whole:.1f} | {ratio:.2f} | {1000 * own:.1f} |", flush=True)


if __name__ == "__main__":
    main()
