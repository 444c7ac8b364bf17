"""Sampling of a flow: our solvers against torchdiffeq called as torchcfm's examples call it, same network and noise.

    OMP_NUM_THREADS=1 python benchmarks/matching_sampling.py
    OMP_NUM_THREADS=1 python benchmarks/matching_sampling.py --nets mlp --rounds 21 --clock cpu

A round lets every contender draw the batch once, in random order; times are medians over rounds, ratios medians of the
ratios within a round. Evaluations are calls of the network, for our step size per sample the mean over the samples.
`--clock cpu` counts the seconds of this process alone, for a machine that others use.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
import torchdiffeq
from torch import Tensor, nn

from flowbench.core.seeds import generator
from flowbench.flows.solver.adaptive import DormandPrince
from flowbench.flows.solver.base import ConditionedField, Solver
from flowbench.flows.solver.fixed_step import Euler
from flowbench.networks import MLP, UNet

TOLERANCE = 1e-5
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Draw = Callable[[Tensor], Tensor]


class Counted(nn.Module):
    """A network that counts the samples it sees."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.samples = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.samples += len(x)
        return self.network(x, t)


def fitted(network: nn.Module, steps: int, data: Callable[[int, torch.Generator], Tensor], batch: int) -> nn.Module:
    """A network that was trained a little, so that its field is neither zero nor wild."""
    rng = generator(0, "training")
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(steps):
        x1 = data(batch, rng)
        x0, t = torch.randn(x1.shape, generator=rng), torch.rand(batch, generator=rng)
        shares = t.view(-1, *[1] * (x1.ndim - 1))
        loss = (network((1 - shares) * x0 + shares * x1, t) - (x1 - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def eight_modes(num: int, rng: torch.Generator) -> Tensor:
    angle = torch.randint(8, (num,), generator=rng) * (torch.pi / 4)
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.2 * torch.randn(num, 2, generator=rng)


def blobs(num: int, rng: torch.Generator) -> Tensor:
    """Images of one bright spot each, in [-1, 1]."""
    centre = 6 + 16 * torch.rand(num, 2, 1, generator=rng)
    axis = torch.arange(28.0)
    row, column = (torch.exp(-((axis - centre[:, i]) ** 2) / 18) for i in (0, 1))
    return (2 * row[:, :, None] * column[:, None, :] - 1)[:, None]


def ours(network: nn.Module, solver: Solver) -> Draw:
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def field(t: Tensor, x: Tensor) -> Tensor:
        return network(x, t.to(x).expand(len(x)))

    # What the families give to their solvers, without a label.
    conditioned = ConditionedField(field)
    return lambda x: solver.solve(conditioned, x, times).states[-1]


def torchdiffeqs(network: nn.Module, times: Tensor, method: str) -> Draw:
    def field(t: Tensor, x: Tensor) -> Tensor:
        return network(x, t.expand(len(x)))

    tolerances = {"rtol": TOLERANCE, "atol": TOLERANCE} if method == "dopri5" else {}
    return lambda x: torchdiffeq.odeint(field, x, times, method=method, **tolerances)[-1]


def hand_written(network: nn.Module, steps: int) -> Draw:
    def draw(x: Tensor) -> Tensor:
        for start, stop in pairwise(torch.linspace(0, 1, steps + 1).tolist()):
            x = x + (stop - start) * network(x, torch.full((len(x),), start))
        return x

    return draw


def contests(network: nn.Module, steps: list[int]) -> dict[str, dict[str, Draw]]:
    """Peers of one contest; the first is what the others are divided by."""
    found: dict[str, dict[str, Draw]] = {}
    for n in steps:
        found[f"Euler-{n}"] = {
            "torchdiffeq euler": torchdiffeqs(network, torch.linspace(0, 1, n + 1), "euler"),
            "hand-written loop": hand_written(network, n),
            "ours": ours(network, Euler(n)),
        }
    found[f"dopri5 {TOLERANCE:g}"] = {
        "torchdiffeq dopri5": torchdiffeqs(network, torch.linspace(0, 1, 2), "dopri5"),
        "ours": ours(network, DormandPrince(TOLERANCE, TOLERANCE)),
        "ours, per sample": ours(network, DormandPrince(TOLERANCE, TOLERANCE, per_sample=True)),
    }
    return found


def measure(title: str, network: Counted, peers: dict[str, Draw], x: Tensor, rounds: int, clock: str) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    evaluations, final = {}, {}
    order = random.Random(0)
    for turn in range(rounds + 1):
        for name in order.sample(list(peers), len(peers)):
            network.samples = 0
            start = CLOCKS[clock]()
            final[name] = peers[name](x)
            spent = CLOCKS[clock]() - start
            evaluations[name] = network.samples / len(x)
            if turn:  # the first round warms up
                seconds[name].append(spent)
    first = next(iter(peers))
    for name in peers:
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[first], strict=True))
        difference = (final[name] - final[first]).abs().max().item()
        print(
            f"{title:24}{name:22}{1e3 * statistics.median(seconds[name]):10.2f}{ratio:8.3f}{evaluations[name]:13.1f}"
            f"{difference:12.1e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=("mlp", "unet"), default=["mlp", "unet"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--channels", type=int, default=32, help="of the UNet")
    parser.add_argument("--rounds", type=int, default=0, help="0: 51 for the MLP, 5 for the UNet")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments = parser.parse_args()
    print(
        f"torch {torch.__version__}, threads {torch.get_num_threads()}, CPUs {os.cpu_count()}, {arguments.clock} time"
    )
    print(f"{'':24}{'':22}{'ms':>10}{'ratio':>8}{'evaluations':>13}{'difference':>12}")
    for net in arguments.nets:
        if net == "mlp":
            network, steps, rounds = fitted(MLP((2,), None), 500, eight_modes, 256), [10, 100], 51
        else:
            unet = UNet((1, 28, 28), None, channels=arguments.channels)
            network, steps, rounds = fitted(unet, 20, blobs, 32), [10], 5
        counted = Counted(network)
        x = torch.randn(arguments.batch, *network.shape, generator=generator(0, "noise"))
        with torch.inference_mode():
            for title, peers in contests(counted, steps).items():
                measure(f"{net} {title}", counted, peers, x, arguments.rounds or rounds, arguments.clock)


if __name__ == "__main__":
    main()
