"""What a perfect model would score: real images against real images of the same data set.

    python benchmarks/fid_floor.py --data cifar10 --num-samples 2000

Prints FID and KID of the test split against the training split, and of two disjoint parts of the training split, at
the same N on both sides. Features go through the cache of the evaluator, so a second run takes seconds.
"""

from __future__ import annotations

import argparse

import torch

from flowbench.core.seeds import generator
from flowbench.data import FlowDataModule
from flowbench.evaluation import get_extractor
from flowbench.evaluation.samples import RealSet
from flowbench.metrics import frechet_distance_of_features, frechet_interval, kernel_distance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--num-samples", type=int, default=2000, help="N on each side")
    parser.add_argument("--features", default="inception")
    given = parser.parse_args()
    data, n = FlowDataModule(given.data), given.num_samples
    extractor = get_extractor(given.features, data, "cuda" if torch.cuda.is_available() else "cpu")
    train = RealSet(data, "train").features(extractor, 2 * n)
    test = RealSet(data, "test").features(extractor, n)
    for name, a, b in (("test / train", test, train[:n]), ("train / train", train[n:], train[:n])):
        interval = frechet_interval(a, b, generator(0, "floor"))
        print(
            f"{given.data} {name}, N = {len(a)} / {len(b)}, {extractor.protocol}: "
            f"fd {frechet_distance_of_features(a, b):.4f} (95 % jackknife {interval.low:.2f} to {interval.high:.2f}), "
            f"kid {kernel_distance(a, b).mean:.6f}"
        )


if __name__ == "__main__":
    main()
