"""Time of a semidiscrete assignment and of the potential's fit, beside exact minibatch transport of the same batch.

    python benchmarks/semidiscrete.py --points 1000 4000 16000 --batches 64 256 1024 --dims 64 784

Standard normal to points near a 32-dimensional subspace, at half its scale, as images are. Assignment and minibatch
transport take turns within a repeat, and medians are shown, distances and scalar products included; `ratio` is
minibatch transport over assignment. The fit has its own line: milliseconds of a step of 1,024 source points. Run with
OMP_NUM_THREADS=1 to compare single threads.

    python benchmarks/semidiscrete.py --chi2    # the table of docs/matching.md

How far from equal the shares of the training digits are after some steps of the fit: chi squared by 60,000 source
points, of the averaged potential and of the last iterate.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
from torch import Tensor

from flowbench.core.seeds import generator
from flowbench.data import FlowDataModule
from flowbench.flows import OptimalTransportCoupling, SemidiscreteDual
from flowbench.flows.coupling.semidiscrete import chi_squared

CHI2_BATCHES, CHI2_STEPS, CHI2_PARTS = (64, 256, 1024), (100, 250, 500), 60


def cloud(num: int, dim: int) -> Tensor:
    rng = generator(0, "semidiscrete", num, dim)
    latent = min(dim, 32)
    mixing = torch.randn(latent, dim, generator=rng) / latent**0.5
    return 0.5 * torch.randn(num, latent, generator=rng) @ mixing


def fitted(points: Tensor, steps: int) -> tuple[SemidiscreteDual, float]:
    """A potential after so many steps, and the milliseconds of one."""
    dual = SemidiscreteDual(points, lambda num, rng: torch.randn(num, points.shape[1], generator=rng))
    start = time.perf_counter()
    for _ in range(steps):
        dual.step()
    return dual, 1e3 * (time.perf_counter() - start) / steps


def measure(dual: SemidiscreteDual, points: Tensor, batch: int, budget: float) -> str:
    solved, coupling = dual.solved(), OptimalTransportCoupling()
    rng = generator(1, "noise", batch)
    noise, data = (
        torch.randn(batch, points.shape[1], generator=rng),
        points[torch.randperm(len(points), generator=rng)[:batch]],
    )
    seconds: dict[str, list[float]] = {"looked up": [], "coupled": []}
    start = time.perf_counter()
    while len(seconds["coupled"]) < 5 or time.perf_counter() - start < budget:
        for name, call in (
            ("looked up", lambda: solved.assign(noise)),
            ("coupled", lambda: coupling(noise, data, rng)),
        ):
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    looked_up, coupled = (1e3 * statistics.median(values) for values in seconds.values())
    return f"{points.shape[1]:5}{len(points):8}{batch:7}{looked_up:12.2f}{coupled:12.2f}{coupled / looked_up:9.2f}"


def chi2_table() -> None:
    """Print chi squared of the digits' shares by batch and steps."""
    data = FlowDataModule("digits").centred()
    points = data.model_values("train", data.train_places).flatten(1)
    print(f"{len(points)} points; chi squared of the average / the last iterate\n")
    print("| batch | " + " | ".join(f"{steps} steps" for steps in CHI2_STEPS) + " |")
    print("|---|" + "---|" * len(CHI2_STEPS))
    for batch in CHI2_BATCHES:
        # An average without memory is the last iterate.
        duals = [SemidiscreteDual(points, normal, batch=batch, ema=ema) for ema in (0.99, 0.0)]
        cells = []
        for steps in CHI2_STEPS:
            for dual in duals:
                while dual.steps < steps:
                    dual.step()
            cells.append(" / ".join(f"{shares(dual):.2g}" for dual in duals))
        print(f"| {batch:,} | " + " | ".join(cells) + " |", flush=True)


def normal(num: int, rng: torch.Generator) -> Tensor:
    return torch.randn(num, 64, generator=rng)


def shares(dual: SemidiscreteDual) -> float:
    """Chi squared by fresh source points, 1,000 at a time."""
    solved, counts = dual.solved(), torch.zeros(len(dual.points), dtype=torch.int64)
    for part in range(CHI2_PARTS):
        counts += solved.assign(normal(1000, generator(1, "chi2", part))).bincount(minlength=len(counts))
    return chi_squared(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, nargs="+", default=[1000, 4000, 16000])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 784])
    parser.add_argument("--steps", type=int, default=20, help="steps of the fit that are timed")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per row, but at least five repeats")
    parser.add_argument("--chi2", action="store_true", help="the table of chi squared, in place of times")
    args = parser.parse_args()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    if args.chi2:
        chi2_table()
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; milliseconds")
    print(f"{'d':>5}{'N':>8}{'B':>7}{'looked up':>12}{'coupled':>12}{'ratio':>9}")
    for dim in args.dims:
        for num in args.points:
            points = cloud(num, dim)
            dual, step = fitted(points, args.steps)
            for batch in args.batches:
                if batch <= num:
                    print(measure(dual, points, batch, args.budget), flush=True)
            print(f"{dim:5}{num:8}   a step of the fit with 1,024 source points: {step:.1f} ms", flush=True)


if __name__ == "__main__":
    main()
