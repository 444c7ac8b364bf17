"""Is the data loader ever the bottleneck? Images per second of ours, of a plain PyTorch loader, and of a training step.

    python benchmarks/data_loader.py --device cpu
    python benchmarks/data_loader.py --device cuda --batch-size 512

Ours mirrors, dequantises and orders by key, on one core and without workers. The peers are what most training scripts
do: a `DataLoader(TensorDataset, shuffle=True)` that takes samples one by one and mirrors the batch, and torchvision's
dataset with its usual transforms. All run in one process, alternately, after a warm-up; medians are printed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from flowbench.data import FlowDataModule, get
from flowbench.networks import DiT


def ours(data: FlowDataModule) -> Iterator[Tensor]:
    return (batch.x for batch in data.train_dataloader())


def tensor_dataset(data: FlowDataModule) -> Iterator[Tensor]:
    split = data.split("train")
    loader = DataLoader(TensorDataset(split.values, split.label), batch_size=data.batch_size, shuffle=True)
    while True:
        for k, _ in loader:
            mirrored = torch.where((torch.rand(len(k)) < 0.5)[:, None, None, None], k.flip(-1), k)
            yield (mirrored + torch.rand(mirrored.shape)) / 128 - 1


class Pictures(Dataset):
    """What `torchvision.datasets.CIFAR10` does with its arrays: a Pillow image per sample, then transforms."""

    def __init__(self, data: FlowDataModule) -> None:
        from torchvision import transforms

        self.pixels = data.split("train").values.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = data.split("train").label.tolist()
        steps = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index].squeeze())), self.labels[index]


def torchvision_dataset(data: FlowDataModule) -> Iterator[Tensor]:
    loader = DataLoader(Pictures(data), batch_size=data.batch_size, shuffle=True)
    while True:
        yield from (x for x, _ in loader)


def training_step(data: FlowDataModule, device: str, width: int, depth: int, patch_size: int) -> Callable[[], object]:
    """One flow-matching step of a DiT on a batch that lies on the device already."""
    spec = data.spec
    network = DiT(spec.shape, spec.num_classes, width=width, depth=depth, patch_size=patch_size).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    batch = data.train_batch_at(0)
    x, label = batch.x.to(device), batch.label.to(device)

    def step() -> None:
        noise, t = torch.randn_like(x), torch.rand(len(x), device=device)
        between = torch.lerp(noise, x, t[:, None, None, None])
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = (network(between, t, label) - (x - noise)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def seconds(call: Callable[[], object], repeat: int) -> float:
    """Median wall time of a call."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(calls: dict[str, Callable[[], object]], rounds: int, repeat: int) -> dict[str, float]:
    """Median over rounds of every call's median; the calls take turns, so a busy machine slows all alike."""
    for call in calls.values():
        seconds(call, repeat)
    turns = [{name: seconds(call, repeat) for name, call in calls.items()} for _ in range(rounds)]
    return {name: statistics.median(turn[name] for turn in turns) for name in calls}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="a data set of the catalogue")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where the training step runs")
    parser.add_argument("--width", type=int, default=128, help="of the DiT")
    parser.add_argument("--depth", type=int, default=4, help="of the DiT")
    parser.add_argument("--patch-size", type=int, default=4, help="of the DiT")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    start = time.perf_counter()
    flips = get(chosen.data).flips
    data = FlowDataModule(chosen.data, batch_size=chosen.batch_size, random_flip=flips)
    data.setup("fit")
    opened = 1e3 * (time.perf_counter() - start)
    print(f"{chosen.data}: opened in {opened:.1f} ms; batch {chosen.batch_size}, no workers, flips {flips}")
    print(f"torch {torch.__version__}, {platform.machine()}, {chosen.threads} thread(s), DiT on {chosen.device}\n")
    streams = {"flowbench": ours(data), "TensorDataset": tensor_dataset(data), "torchvision": torchvision_dataset(data)}
    calls: dict[str, Callable[[], object]] = {name: partial(next, stream) for name, stream in streams.items()}
    found = measure(calls, chosen.rounds, repeat=20)
    sizes = (chosen.width, chosen.depth, chosen.patch_size)
    step = training_step(data, chosen.device, *sizes)
    found |= measure({"DiT step (width {}, depth {}, patch {})".format(*sizes): step}, rounds=3, repeat=1)
    print(f"{'':<42}{'ms / batch':>12}{'images / s':>12}{'time / ours':>13}")
    for name, value in found.items():
        print(f"{name:<42}{1e3 * value:>12.2f}{chosen.batch_size / value:>12,.0f}{value / found['flowbench']:>13.1f}")


if __name__ == "__main__":
    main()
