"""What few samples do to the Frechet distance and to MIND, on the same features: real against real, and a simulation.

    python benchmarks/small_n.py --data cifar10 --features efficientnet-lite0 --num-samples 250 500 1000 2000
    python benchmarks/small_n.py --simulate --num-features 512 --num-samples 500 2000

With data: the test split against the training split at equal N, which a perfect model would score, and the same
features of nine tenths of their spread, as of a model that has lost some. Features go through the cache of the
evaluator, so a second run takes a minute. With --simulate: the same with Gaussian features of spectrum 1 / k and a
total variance of D / 2.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor

from flowbench.core.seeds import generator
from flowbench.data import FlowDataModule
from flowbench.evaluation import get_extractor
from flowbench.evaluation.samples import RealSet
from flowbench.metrics import frechet_distance_of_features, mind

SHRINKAGE = 0.9


def both(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Frechet distance and MIND."""
    return frechet_distance_of_features(x, y), mind(x, y, generator(0, "mind"))


def shown(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:9.4g}"
    return f"{statistics.mean(values):9.4g} +- {statistics.stdev(values):7.2g}"


def show(n: int, name: str, pairs: list[tuple[float, float]]) -> None:
    fd, transport = ([pair[k] for pair in pairs] for k in (0, 1))
    print(f"N = {n:5d} {name:9s} fd {shown(fd)}  mind {shown(transport)}  ({len(pairs)} parts or repeats)", flush=True)


def simulate(dimension: int, counts: list[int], repeats: int) -> None:
    variance = 1 / torch.arange(1, dimension + 1, dtype=torch.float64)
    root = (variance * dimension / 2 / variance.sum()).sqrt()
    true = (1 - SHRINKAGE) ** 2 * dimension / 2  # of the shrunken Gaussian: (1 - s)^2 tr C; three times that in MIND
    print(f"D = {dimension}; true distance of the shrunken model: FD {true:.4g}, MIND {3 * true:.4g}")
    for n in counts:
        found: dict[str, list[tuple[float, float]]] = {"truth": [], "shrunken": []}
        for repeat in range(repeats):
            rng = generator(repeat, "small-n", dimension, n)
            real, same, other = (torch.randn(n, dimension, generator=rng, dtype=torch.float64) * root for _ in range(3))
            found["truth"].append(both(same, real))
            found["shrunken"].append(both(SHRINKAGE * other, real))
        for name, pairs in found.items():
            show(n, name, pairs)


def measure(dataset: str, features: str, counts: list[int]) -> None:
    data = FlowDataModule(dataset)
    extractor = get_extractor(features, data, "cuda" if torch.cuda.is_available() else "cpu")
    test, train = (RealSet(data, split).features(extractor, max(counts)) for split in ("test", "train"))
    print(f"{dataset}, test / train, {extractor.protocol}, D = {extractor.dimension}")
    for n in counts:
        # Disjoint parts as far as the features go: their scatter is that of the numbers at this N.
        parts = min(len(test), len(train)) // n
        pairs = [(test[k * n : (k + 1) * n].double(), train[k * n : (k + 1) * n]) for k in range(parts)]
        show(n, "truth", [both(x, y) for x, y in pairs])
        show(n, "shrunken", [both(x.mean(0) + SHRINKAGE * (x - x.mean(0)), y) for x, y in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--features", default="efficientnet-lite0")
    parser.add_argument("--num-samples", type=int, nargs="+", default=[500, 2000], help="N on each side")
    parser.add_argument("--simulate", action="store_true", help="Gaussian features instead of data")
    parser.add_argument("--num-features", type=int, default=512, help="D of the simulation")
    parser.add_argument("--repeats", type=int, default=6, help="of the simulation")
    given = parser.parse_args()
    if given.simulate:
        simulate(given.num_features, given.num_samples, given.repeats)
    else:
        measure(given.data, given.features, given.num_samples)


if __name__ == "__main__":
    main()
