"""Training steps of every objective of flow maps over flow matching's step of the same network of two times, as ratios.

A step is forward, objective, backward and AdamW through the family's own loss; process time, medians over rounds in
which the objectives take turns. Half of each batch jumps, as in the shipped experiments; ``--diagonal 0.001``
measures batches that jump whole, which is what papers count.

    OMP_NUM_THREADS=1 python benchmarks/flow_map_steps.py --nets dit mlp --rounds 5    # the table of docs/flow_maps.md
    OMP_NUM_THREADS=1 python benchmarks/flow_map_steps.py --nets dit --steps 10 --rounds 5 --only cfm soflow
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from flowbench.data import Batch, DataSpec
from flowbench.families import FlowMap, FlowMatching
from flowbench.flows import (
    ConsistencyTraining,
    FlowMapObjective,
    Lagrangian,
    MeanFlow,
    Progressive,
    Shortcut,
    SolutionConsistency,
)
from flowbench.networks import MLP, DiT, UNet

NETS = {
    "mlp": (DataSpec("points", "1", (2,)), partial(MLP, width=64, depth=3), 256),
    "dit": (DataSpec("digits", "1", (1, 8, 8)), partial(DiT, width=64, depth=4, num_heads=2), 64),
    "unet": (DataSpec("digits", "1", (1, 8, 8)), partial(UNet, channels=32, num_res_blocks=1), 64),
}
OBJECTIVES: dict[str, FlowMapObjective] = {
    "soflow": SolutionConsistency(),
    "consistency": ConsistencyTraining(),
    "progressive": Progressive(),
    "shortcut": Shortcut(),
    "lagrangian, difference": Lagrangian(),
    "lagrangian, jvp": Lagrangian(derivative="jvp"),
    "meanflow, difference": MeanFlow(derivative="difference"),
    "meanflow": MeanFlow(),
    "improved meanflow": MeanFlow(tangent="self"),
}


def steps(
    net: str, objective: FlowMapObjective | None, diagonal: float, second_time: bool = True
) -> tuple[Callable[[int], float], int]:
    """What takes some training steps and returns the process time of each, in seconds; and operations per sample."""
    spec, network, size = NETS[net]
    network = partial(network, second_time=second_time)
    torch.manual_seed(0)
    module: FlowMatching = FlowMatching(spec, network)
    if objective is not None:
        module = FlowMap(spec, network, map_objective=objective, diagonal=diagonal)
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3, fused=True)
    rng = torch.Generator().manual_seed(0)
    batch = Batch(torch.randn(size, *spec.shape, generator=rng))

    def run(num: int) -> float:
        start = time.process_time()
        for _ in range(num):
            optimizer.zero_grad()
            module.training_loss(batch, rng).total.backward()
            optimizer.step()
        return (time.process_time() - start) / num

    return run, module.flops_of_one()


def measure(net: str, num: int, rounds: int, diagonal: float, only: list[str] | None) -> None:
    """Print the table of one network."""
    peers = {"cfm": steps(net, None, diagonal), "cfm, network of one time": steps(net, None, diagonal, False)}
    peers |= {name: steps(net, made, diagonal) for name, made in OBJECTIVES.items() if not only or name in only}
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(rounds + 1):
        for name, (run, _) in peers.items():
            found = run(num)
            if turn:  # the first round warms up
                seconds[name].append(found)
    size = NETS[net][2]
    print(f"\n{net}, batch {size}, {1 - diagonal:.0%} of it jumps, {num} steps x {rounds} rounds")
    print(f"  {'':<24} {'ms a step':>9} {'time / cfm':>22} {'operations / cfm':>17}")
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["cfm"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        operations = peers[name][1] / peers["cfm"][1]
        print(f"  {name:<24} {1e3 * statistics.median(values):9.2f} {spread:>22} {operations:17.2f}")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--diagonal", type=float, default=0.5)
    parser.add_argument("--only", nargs="+", help="names of rows, in place of all")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for net in arguments.nets:
        measure(net, arguments.steps, arguments.rounds, arguments.diagonal, arguments.only)


if __name__ == "__main__":
    main()
