"""Speed of the exact coupling: ours, POT as torchcfm calls it, and SciPy's assignment, in one run.

    python benchmarks/coupling.py --sizes 128 256 512 1024 2048 --dims 2 64 784 3072

Two dimensions: standard normal to eight Gaussians; more: standard normal to points near a 32-dimensional subspace, at
half its scale, as images are. Times include the cost matrix. The three take turns within a repeat, and medians are
shown. `--scipy-limit` leaves SciPy out of larger batches (minutes in two dimensions). torchcfm keeps POT's default of
1e5 iterations: where POT stops before its optimum the row says so. Run with OMP_NUM_THREADS=1 to compare single
threads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable

import ot
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from flowbench.core.seeds import generator
from flowbench.data import get_density
from flowbench.flows import OptimalTransportCoupling
from flowbench.flows.coupling.base import squared_distances


def batch(num: int, dim: int) -> tuple[Tensor, Tensor]:
    rng = generator(0, "coupling", num, dim)
    x0 = torch.randn(num, dim, generator=rng)
    if dim == 2:
        return x0, get_density("eight_gaussians").sample_labelled(num, rng)[0]
    latent = min(dim, 32)
    mixing = torch.randn(latent, dim, generator=rng) / latent**0.5
    return x0, 0.5 * torch.randn(num, latent, generator=rng) @ mixing


def ours(x0: Tensor, x1: Tensor) -> Tensor:
    return OptimalTransportCoupling()(x0, x1, generator(0))


def pot(x0: Tensor, x1: Tensor) -> Tensor:
    cost = torch.cdist(x0, x1) ** 2
    plan = ot.emd(ot.unif(len(x0)), ot.unif(len(x1)), cost.detach().cpu().numpy())
    return torch.from_numpy(plan).argmax(0)


def scipy(x0: Tensor, x1: Tensor) -> Tensor:
    return torch.from_numpy(linear_sum_assignment(squared_distances(x0, x1).T.numpy())[1])


def measure(solvers: dict[str, Callable[[Tensor, Tensor], Tensor]], num: int, dim: int, budget: float) -> str:
    x0, x1 = batch(num, dim)
    seconds: dict[str, list[float]] = {name: [] for name in solvers}
    cost = {name: (x0[solve(x0, x1)] - x1).double().square().sum().item() for name, solve in solvers.items()}
    start = time.perf_counter()
    while len(seconds["ours"]) < 3 or (len(seconds["ours"]) < 51 and time.perf_counter() - start < budget):
        for name, solve in solvers.items():
            began = time.perf_counter()
            solve(x0, x1)
            seconds[name].append(time.perf_counter() - began)
    median = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    row = f"{dim:5}{num:7}{median['ours']:11.2f}{median['pot']:11.2f}"
    row += f"{median['scipy']:11.2f}" if "scipy" in median else f"{'-':>11}"
    row += f"{median['pot'] / median['ours']:11.2f}"
    excess = cost["pot"] / cost["ours"] - 1
    return row + (f"   POT stopped {excess:.1e} above" if excess > 1e-9 else f"   {abs(excess):.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 64, 784, 3072])
    parser.add_argument("--scipy-limit", type=int, default=1024)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds per row, but at least three repeats")
    args = parser.parse_args()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    warnings.filterwarnings("ignore", message="numItermax reached")
    print(f"POT {ot.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads; milliseconds")
    print(f"{'d':>5}{'B':>7}{'ours':>11}{'POT':>11}{'SciPy':>11}{'POT/ours':>11}   relative difference of the costs")
    for dim in args.dims:
        for num in args.sizes:
            solvers = {"ours": ours, "pot": pot} | ({"scipy": scipy} if num <= args.scipy_limit else {})
            print(measure(solvers, num, dim, args.budget), flush=True)


if __name__ == "__main__":
    main()
