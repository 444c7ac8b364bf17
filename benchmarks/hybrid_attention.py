"""Cost of attention across images in a training step of HybridDiT, per image, as ratios to images alone.

Forward and backward of one batch of as many images, whatever the length of their sequences. Time of this process on its
processor, medians over rounds in which the rules take turns.

    OMP_NUM_THREADS=1 python benchmarks/hybrid_attention.py --side 8 16 --rounds 5    # the table of docs/arflow.md
    OMP_NUM_THREADS=1 python benchmarks/hybrid_attention.py                           # larger images too
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from flowbench.networks import HybridDiT

IMAGES = 60
LENGTHS = (1, 3, 5)
RULES = ("none", "linear", "full")


def seconds(network: HybridDiT, x: torch.Tensor, group_size: int) -> float:
    """Of one forward and backward pass."""
    t, label = torch.rand(len(x)), torch.zeros(len(x), dtype=torch.int64)
    start = time.process_time()
    network(x, t, label, group_size=group_size).square().mean().backward()
    return time.process_time() - start


def measured(side: int, rounds: int) -> dict[tuple[str, int], float]:
    """Median seconds by rule and length of the sequences."""
    torch.manual_seed(0)
    networks = {rule: HybridDiT((1, side, side), 10, width=64, depth=3, across=rule) for rule in RULES}
    x = torch.randn(IMAGES, 1, side, side)
    found: dict[tuple[str, int], list[float]] = {(rule, length): [] for rule in RULES for length in LENGTHS}
    for turn in range(rounds + 1):
        for (rule, length), times in found.items():
            passed = seconds(networks[rule], x, length)
            if turn:  # the first warms up
                times.append(passed)
    return {key: statistics.median(times) for key, times in found.items()}


def main() -> None:
    """Print a table for each size of images."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", type=int, nargs="+", default=[8, 16, 32], help="pixels; patches are 2 x 2")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print("| tokens of an image | across | " + " | ".join(f"S = {length}" for length in LENGTHS) + " |")
    print("|---:|---|" + "---:|" * len(LENGTHS))
    for side in arguments.side:
        found = measured(side, arguments.rounds)
        alone = found["none", 1]
        for rule in RULES:
            ratios = " | ".join(f"{found[rule, length] / alone:.2f}" for length in LENGTHS)
            print(f"| {(side // 2) ** 2} | {rule} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
