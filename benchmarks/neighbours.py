"""Speed of precision and recall: ours, all differences in float64, torch-fidelity, and scikit-learn, in one run.

    python benchmarks/neighbours.py --num 10000 --dim 2048 --differences 2000

`--differences` computes the slow peer on that many samples and scales its time by the square of the ratio (0 leaves it
out). Run with OMP_NUM_THREADS=1 to compare single threads.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from flowbench.core.seeds import generator
from flowbench.metrics import precision_recall


def features(num: int, dim: int, name: str) -> Tensor:
    """Positive, skewed and of low effective dimension, as pooled features of a network are; float32."""
    draws = generator(0, name)
    mixing = torch.randn(32, dim, generator=generator(0, "mixing"))
    latent = torch.randn(num, 32, generator=draws) * (1.0 if name == "real" else 0.95)
    return torch.relu(latent @ mixing / 8 + 0.2 * torch.randn(num, dim, generator=draws))


def by_differences(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    def distances(x: Tensor, y: Tensor) -> list[Tensor]:
        return [torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist") for rows in x.split(1024)]

    def radii(x: Tensor) -> Tensor:
        return torch.cat([rows.kthvalue(k + 1, dim=1).values for rows in distances(x, x)])

    def share(points: Tensor, centres: Tensor) -> float:
        ball = radii(centres)
        return float(torch.cat([(rows <= ball).any(dim=1) for rows in distances(points, centres)]).double().mean())

    real, generated = real.double(), generated.double()
    return share(generated, real), share(real, generated)


def by_torch_fidelity(real: Tensor, generated: Tensor) -> tuple[float, float]:
    from torch_fidelity.metric_prc import prc_features_to_metric

    found = prc_features_to_metric(
        generated, real, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=True, verbose=False
    )
    return found["precision"], found["recall"]


def by_scikit_learn(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Radii from NearestNeighbors; membership needs all pairs, for which it offers balls of one radius only."""

    def radii(x: Tensor) -> Tensor:
        search = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(x.numpy())
        return torch.from_numpy(search.kneighbors(x.numpy())[0][:, k])

    def share(points: Tensor, centres: Tensor) -> float:
        ball = radii(centres)
        return float(torch.cat([(torch.cdist(p, centres) <= ball).any(1) for p in points.split(1024)]).double().mean())

    real, generated = real.double(), generated.double()
    return share(generated, real), share(real, generated)


def timed(compute: Callable[[], tuple[float, float]]) -> tuple[float, tuple[float, float]]:
    start = time.perf_counter()
    result = compute()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--differences", type=int, default=2000)
    args = parser.parse_args()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    real, generated = features(args.num, args.dim, "real"), features(args.num, args.dim, "generated")
    print(f"N = {args.num} + {args.num}, D = {args.dim}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':34}{'seconds':>9}  precision  recall")

    def report(name: str, seconds: float, result: tuple[float, float]) -> None:
        print(f"{name:34}{seconds:9.2f}  {result[0]:9.4f}  {result[1]:6.4f}", flush=True)

    ours, result = timed(lambda: tuple(precision_recall(real, generated)))  # type: ignore[arg-type,return-value]
    report("flowbench (float64, exact)", ours, result)
    report("torch-fidelity (float32)", *timed(lambda: by_torch_fidelity(real, generated)))
    report("torch-fidelity (float64)", *timed(lambda: by_torch_fidelity(real.double(), generated.double())))
    report("scikit-learn radii (float64)", *timed(lambda: by_scikit_learn(real, generated)))
    if args.differences:
        size = min(args.differences, args.num)
        seconds, result = timed(lambda: by_differences(real[:size], generated[:size]))
        if result != tuple(precision_recall(real[:size], generated[:size])):
            raise SystemExit(f"differences give {result}, flowbench something else")
        report(f"differences, N = {size} (equal)", seconds, result)
        scaled = seconds * (args.num / size) ** 2
        print(f"{f'differences, scaled to N = {args.num}':34}{scaled:9.2f}  {scaled / ours:.1f} x ours")


if __name__ == "__main__":
    main()
