"""Time of a semidiscrete assignment and of the potential's fit, beside exact minibatch transport of the same batch.

    python benchmarks/semidiscrete.py --points 1000 4000 16000 --batches 64 256 1024 --dims 64 784

Standard normal to points near a 32-dimensional subspace, at half its scale, as images are. Assignment and minibatch
transport take turns within a repeat, and medians are shown, distances and scalar products included; `ratio` is
minibatch transport over assignment. The fit has its own line: milliseconds of a step of 1,024 source points. Run with
OMP_NUM_THREADS=1 to compare single threads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
from torch import Tensor

from flowbench.core.seeds import generator
from flowbench.flows import OptimalTransportCoupling, SemidiscreteDual


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, nargs="+", default=[1000, 4000, 16000])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 784])
    parser.add_argument("--steps", type=int, default=20, help="steps of the fit that are timed")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per row, but at least five repeats")
    args = parser.parse_args()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
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
