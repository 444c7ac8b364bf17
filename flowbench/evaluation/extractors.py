"""Feature extractors by name, with their weights in a cache."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from filelock import FileLock

from flowbench.data import FlowDataModule
from flowbench.metrics import (
    ClassifierFeatures,
    FeatureExtractor,
    IdentityFeatures,
    InceptionFeatures,
    load_classifier,
    save_classifier,
    train_classifier,
)
from flowbench.seeds import derive_seed

__all__ = ["cache_dir", "get_extractor"]

# Part of the file's name: raise it when the classifier or its training changes.
CLASSIFIER_VERSION = 1


def cache_dir() -> Path:
    """Where trained feature networks and autoencoders are kept: $FLOWBENCH_CACHE, or `data/cache`."""
    return Path(os.environ.get("FLOWBENCH_CACHE", "data/cache"))


def get_extractor(name: str, data: FlowDataModule, device: torch.device | str = "cpu") -> FeatureExtractor:
    """Find or make the extractor that an experiment file names.

    `<dataset>-cnn` is a small classifier trained deterministically on the training split, once per machine;
    `identity` is the raw pixels or coordinates.

    Args:
        name: as in `fd[name]`.
        data: the data that is measured.
        device: where its network runs.

    Raises:
        ValueError: for an unknown name, or a classifier of data without labels.
    """
    if name == "identity":
        return IdentityFeatures(data.spec.num_dims)
    if name in ("inception", "inception-bf16") and data.spec.modality == "image":
        return InceptionFeatures(device=device, precision="bfloat16" if name.endswith("bf16") else "float32")
    if name == f"{data.dataset}-cnn" and data.spec.modality == "image":
        return _classifier(name, data, device)
    raise ValueError(
        f"no feature extractor {name!r} for the dataset {data.dataset}: use identity"
        + (f" or {data.dataset}-cnn" if data.spec.modality == "image" else "")
    )


def _classifier(name: str, data: FlowDataModule, device: torch.device | str) -> ClassifierFeatures:
    train = data.split("train")
    if train.label is None or data.spec.num_classes is None:
        raise ValueError(f"{name} is a classifier, but {data.dataset} has no labels: use features: identity")
    path = cache_dir() / f"{name}-{data.spec.version}-v{CLASSIFIER_VERSION}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            values = train.values if data.spec.levels is None else data.spec.to_model(train.values)
            images = data.spec.to_uint8(values)
            seed = derive_seed(CLASSIFIER_VERSION, name) % 2**31
            save_classifier(path, train_classifier(images, train.label, data.spec.num_classes, seed))
    return ClassifierFeatures(load_classifier(path).to(device), name)
