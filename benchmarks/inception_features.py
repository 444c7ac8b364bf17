"""Inception features of CIFAR-10: torch-fidelity's loop against flowbench's, in one run on one machine.

    python benchmarks/inception_features.py --num-images 500 --threads 1 2 --repeats 3

Variants take turns, so that a machine whose load changes treats them alike; the table shows medians. `change of FID` is
what a variant makes of the distance between the same numbers of test and training images, against torch-fidelity's
features; `change of features` is the norm of the difference over the norm.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowbench.data import FlowDataModule
from flowbench.metrics import FeatureStatistics, InceptionFeatures, frechet_distance
from flowbench.metrics.weights import inception_network, inception_weights

Variant = Callable[[Tensor], Tensor]


class Pictures(Dataset[Tensor]):
    """What torch-fidelity wants: items that are bare uint8 tensors."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def torch_fidelity_loop() -> Variant:
    """Its loop as its metrics call it, batches of 64, without worker processes (they only cost here)."""
    from torch_fidelity.utils import get_featuresdict_from_dataset

    network = inception_network(inception_weights().state)

    def run(images: Tensor) -> Tensor:
        return get_featuresdict_from_dataset(Pictures(images), network, 64, False, True, False)["2048"]

    return run


def unfolded(batch_size: int) -> Variant:
    """torch-fidelity's network as it is, in small batches."""
    network = inception_network(inception_weights().state)

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([network(part)[0] for part in images.split(batch_size)])

    return run


def compiled() -> Variant:
    """Ours through torch.compile with frozen weights."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    extractor = InceptionFeatures()
    extractor._trunk = torch.compile(extractor._trunk, dynamic=False)  # type: ignore[assignment]
    return extractor


def variants(names: list[str]) -> dict[str, Variant]:
    known: dict[str, Callable[[], Variant]] = {
        "torch-fidelity": torch_fidelity_loop,
        "torch-fidelity, batches of 16": lambda: unfolded(16),
        "inception": InceptionFeatures,
        "inception-bf16": lambda: InceptionFeatures(precision="bfloat16"),
        "inception, torch.compile": compiled,
    }
    return {name: known[name]() for name in known if not names or name in names}


def measure(chosen: dict[str, Variant], images: Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of every repetition, after one warm-up of two batches."""
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for run in chosen.values():
        run(images[:32])
    for _ in range(repeats):
        for name, run in chosen.items():
            start = time.perf_counter()
            run(images)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def differences(chosen: dict[str, Variant], test: Tensor, train: Tensor) -> dict[str, tuple[float, float, float]]:
    """Per variant: FID of test against train, its change, and the relative change of the features."""
    result, reference = {}, None
    for name, run in chosen.items():
        first, second = run(test), run(train)
        value = frechet_distance(FeatureStatistics.from_features(first), FeatureStatistics.from_features(second))
        reference = reference or (value, first)
        result[name] = (value, value - reference[0], float((first - reference[1]).norm() / reference[1].norm()))
    return result


def processor() -> str:
    """The processor's name, and the instructions that matter here."""
    with open("/proc/cpuinfo") as file:
        lines = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in fields["flags"].split()]
    return f"{fields['model name']}, {os.cpu_count()} cores, {' '.join(flags)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", nargs="*", default=[], help="names as in the table; the default is all")
    parser.add_argument("--num-fid", type=int, default=500, help="images on each side of the FID; 0 leaves it out")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    data = FlowDataModule("cifar10")
    chosen = variants(arguments.variants)
    print(f"{processor()}; torch {torch.__version__}; {arguments.num_images} images of CIFAR-10's test split")
    images = data.uint8_images("test", slice(arguments.num_images))
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        seconds = measure(chosen, images, arguments.repeats)
        base = statistics.median(next(iter(seconds.values())))
        print(f"\n| {threads} thread(s) | images/s | ratio | seconds of each repetition |\n|---|---|---|---|")
        for name, values in seconds.items():
            middle = statistics.median(values)
            each = " ".join(f"{value:.1f}" for value in values)
            print(f"| {name} | {len(images) / middle:.1f} | {base / middle:.2f} | {each} |", flush=True)
    if arguments.num_fid:
        test, train = (data.uint8_images(split, slice(arguments.num_fid)) for split in ("test", "train"))
        print(
            f"\n| {arguments.num_fid} test against {arguments.num_fid} training images | FID | change of FID "
            "| change of features |\n|---|---|---|---|"
        )
        for name, (value, change, features) in differences(chosen, test, train).items():
            print(f"| {name} | {value:.4f} | {change:+.6f} | {features:.1e} |", flush=True)


if __name__ == "__main__":
    main()
