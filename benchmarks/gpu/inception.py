"""Inception features: images a second, beside torch-fidelity's own network on the same device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.setting import Line, Setting, interleaved, median_ratio
from flowbench.metrics import InceptionFeatures
from flowbench.metrics.weights import inception_network, inception_weights

__all__ = ["measure"]


def measure(setting: Setting) -> Iterator[Line]:
    """Images a second of the float32 protocol and of bfloat16."""
    count, batch = setting.choose((1024, 256), (4, 2))
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    peer = inception_network(inception_weights().state).to(setting.device)

    @torch.no_grad()
    def fidelity() -> list[Tensor]:
        return [peer(part.to(setting.device))[0].cpu() for part in images.split(batch)]

    extractors = {
        "float32": InceptionFeatures(device=setting.device, precision="float32"),
        "bfloat16": InceptionFeatures(device=setting.device, precision="bfloat16"),
    }
    runs = {name: partial(_features, extractor, images, batch) for name, extractor in extractors.items()}
    seconds = interleaved(setting, {**runs, "torch-fidelity": fidelity}, setting.choose(2, 1))
    exact, theirs = torch.cat(_features(extractors["float32"], images, batch)), torch.cat(fidelity())
    error = ((exact - theirs).norm() / theirs.norm()).item()
    own = f"torch-fidelity's network {count / min(seconds['torch-fidelity']):.0f} images/s"
    for name in extractors:
        yield Line(
            f"Inception features, {name}",
            f"{count / min(seconds[name]):.0f} images/s",
            own,
            f"{median_ratio(seconds['torch-fidelity'], seconds[name])} times as fast",
            f"features differ by {error:.1e} (relative)" if name == "float32" else "another network, no FID",
        )


def _features(extractor: InceptionFeatures, images: Tensor, batch: int) -> list[Tensor]:
    return [extractor(part).cpu() for part in images.split(batch)]
