"""Feature extractors by name, with their weights in a cache."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial

import torch

from flowbench.core.places import cached, locked
from flowbench.core.preparation_progress import note_progress
from flowbench.core.seeds import derive_seed
from flowbench.data import DataSpec, FlowDataModule
from flowbench.evaluation.auto_features import AUTO, resolve_features
from flowbench.metrics import (
    FIDELITY_DIMENSIONS,
    ClassifierFeatures,
    ClassifierSettings,
    EfficientNetFeatures,
    FeatureExtractor,
    FidelityFeatures,
    IdentityFeatures,
    InceptionFeatures,
    InceptionLogits,
    classification_accuracy,
    classifier_settings,
    load_classifier,
    save_classifier,
    train_classifier,
)
from flowbench.metrics.classifier import DigitsCNN
from flowbench.metrics.features import NormFeatures

__all__ = ["check_extractor", "get_extractor", "is_pretrained"]

Device = torch.device | str

# Networks for any picture, whatever the dataset.
PRETRAINED: dict[str, Callable[..., FeatureExtractor]] = {
    "inception": InceptionFeatures,
    "inception-bf16": partial(InceptionFeatures, precision="bfloat16"),
    "inception-logits": InceptionLogits,
    "efficientnet-lite0": EfficientNetFeatures,
    **{name: partial(FidelityFeatures, name) for name in FIDELITY_DIMENSIONS},
}


def check_extractor(name: str, dataset: str, spec: DataSpec) -> None:
    """Refuse an extractor that :func:`get_extractor` does not have for such data; no data are read, nothing is trained.

    Args:
        name: as in `fd[name]`.
        dataset: name in the catalogue or of a user's format.
        spec: shape and classes of the data.

    Raises:
        ValueError: see :func:`get_extractor`.
    """
    is_image, classifier = spec.modality == "image", f"{dataset}-cnn"
    if is_image and name == classifier:
        if spec.num_classes is None:
            raise ValueError(f"{name} is a classifier, but {dataset} has no labels: use features: auto")
        with torch.device("meta"):
            DigitsCNN((spec.shape[0], spec.shape[1], spec.shape[2]), spec.num_classes)  # has its own refusals
    elif is_image and name in PRETRAINED:
        if spec.shape[0] not in (1, 3):
            raise ValueError(f"{name} takes images of 1 or 3 channels, {dataset} has {spec.shape[0]}")
    elif name not in (AUTO, "identity", "norm"):
        known = ", ".join([AUTO, "identity", "norm", *([classifier, *PRETRAINED] if is_image else [])])
        raise ValueError(f"no feature extractor {name!r} for the dataset {dataset}: use {known}")


def is_pretrained(name: str, data: FlowDataModule) -> bool:
    """Whether an extractor is a network that others trained, whose weights may have to be fetched."""
    return resolve_features(name, data.dataset, data.spec) in PRETRAINED


def get_extractor(name: str, data: FlowDataModule, device: Device = "cpu") -> FeatureExtractor:
    """Find or make the extractor that an experiment file names.

    `identity` is the raw pixels or coordinates, `norm` their root mean square. Images also have `<dataset>-cnn`, a
    small classifier trained deterministically on the training split, once per machine, and pretrained networks:
    `inception` (the FID's), `inception-bf16`, `inception-logits` (the Inception score's), `efficientnet-lite0`,
    `dinov2-vit-s-14`, `clip-vit-b-32`. `auto` is the one of them that
    :func:`~flowbench.evaluation.auto_features.resolve_features` chooses.

    Args:
        name: as in `fd[name]`.
        data: the data that is measured.
        device: where its network runs.

    Raises:
        ValueError: for an unknown name, pictures that are neither grey nor RGB, a classifier of data without labels,
            or weights that cannot be had.
    """
    name = resolve_features(name, data.dataset, data.spec)
    if name == "identity":
        return IdentityFeatures(data.spec.num_dims)
    if name == "norm":
        return NormFeatures()
    check_extractor(name, data.dataset, data.spec)
    return _classifier(name, data, device) if name == f"{data.dataset}-cnn" else PRETRAINED[name](device=device)


def _classifier_file(name: str, spec: DataSpec, count: int, settings: ClassifierSettings) -> str:
    """A name for all that a classifier depends on: data, training images, architecture and training."""
    identity = {**spec.identity, "classifier": name, "count": count, "version": settings.version, **settings.options}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return f"{name}-{spec.version}-{key}-v{settings.version}.pt"


def _classifier(name: str, data: FlowDataModule, device: Device) -> ClassifierFeatures:
    labels, test_labels, classes = data.split("train").label, data.split("test").label, data.spec.num_classes
    if labels is None or test_labels is None or classes is None:
        raise ValueError(f"{name} is a classifier, but {data.dataset} has no labels: use features: auto")
    # What the flow is trained on must not change the features that it is measured with.
    count = len(labels) - (len(data.split("val")) if data.train_on_val else 0)
    settings = classifier_settings(data.spec.shape, count)
    path = cached(_classifier_file(name, data.spec, count, settings))
    if path.is_file():  # files appear whole; a cache that is there may be read-only
        return ClassifierFeatures(load_classifier(path).to(device), name)
    with locked(path):
        if not path.is_file():
            print(f"training the classifier {name} once", file=sys.stderr, flush=True)
            seed = derive_seed(settings.version, name) % 2**31
            images = data.uint8_images("train", slice(count))
            report = partial(note_progress, f"training the classifier {name}")
            model = train_classifier(images, labels[:count], classes, seed, report=report, **settings.options)
            model.test_accuracy = classification_accuracy(model, data.uint8_images("test"), test_labels)
            print(f"{name} recognises {model.test_accuracy:.1%} of the test images", file=sys.stderr, flush=True)
            save_classifier(path, model)
    return ClassifierFeatures(load_classifier(path).to(device), name)
