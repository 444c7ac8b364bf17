"""Everything that is kept of data is kept under all that it depends on: change one thing, and it is another thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flowbench.data import DataSpec, FlowDataModule, Units, user_data
from flowbench.evaluation.extractors import _classifier_file
from flowbench.evaluation.samples import RealSet
from flowbench.families import Autoencoder
from flowbench.families.latents.latent_cache import _identity, _path
from flowbench.families.pairing.pair_store import PairStore, weights_checksum
from flowbench.metrics import ClassifierSettings, IdentityFeatures, classifier_settings
from flowbench.networks import KLAutoencoder

N = 40
IMAGES = np.random.default_rng(0).integers(0, 17, (N, 1, 8, 4), dtype=np.uint8)
LABEL = np.arange(N) % 2


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "cache"))


def own(folder: Path, x: np.ndarray = IMAGES, label: np.ndarray | None = LABEL, **change: Any) -> FlowDataModule:
    """A user's labelled grey images, with one thing changed."""
    arrays = {"x": x} if label is None else {"x": x, "label": label}
    if "num_classes" in change:
        arrays["num_classes"] = np.array(change.pop("num_classes"))
    np.savez(folder / "own.npz", **arrays)
    options = {"levels": None if x.dtype.kind == "f" else 17, **change}
    return FlowDataModule("npz", path=str(folder / "own.npz"), **options)


def brighter() -> np.ndarray:
    changed = IMAGES.copy()
    changed[3, 0, 2, 1] ^= 1
    return changed


FLOATS = (IMAGES / 16.0).astype(np.float32)
CHANGES: dict[str, Callable[[Path], FlowDataModule]] = {
    "one pixel": lambda folder: own(folder, brighter()),
    "height and width": lambda folder: own(folder, IMAGES.reshape(N, 1, 4, 8)),
    "channels": lambda folder: own(folder, IMAGES.reshape(N, 2, 4, 4)),
    "order": lambda folder: own(folder, IMAGES[::-1]),
    "labels": lambda folder: own(folder, label=1 - LABEL),
    "number of classes": lambda folder: own(folder, num_classes=3),
    "levels": lambda folder: own(folder, levels=18),
    "floats": lambda folder: own(folder, FLOATS, value_range=(0, 1)),
    "another range": lambda folder: own(folder, FLOATS, value_range=(-1, 1)),
}


class Network(IdentityFeatures):
    """A feature network by name, checksum and protocol."""

    def __init__(self, name: str = "net", checksum: str = "a", protocol: str = "p") -> None:
        super().__init__(32, name)
        self.checksum, self.protocol = checksum, protocol


def features(data: FlowDataModule, split: str = "train", network: Network | None = None) -> str:
    return str(RealSet(data, split)._file("features", network or Network(), 20))


def statistics(data: FlowDataModule) -> str:
    return str(RealSet(data, "train")._file("statistics", Network(), 20))


def classifier(data: FlowDataModule) -> str:
    return _classifier_file("npz-cnn", data.spec, 32, classifier_settings(data.spec.shape, 32))


def latents(data: FlowDataModule) -> str:
    torch.manual_seed(0)
    network = partial(KLAutoencoder, latent_channels=2, width=8)
    return str(_path(_identity(Autoencoder(data.spec, network), data)))


def encodings(data: FlowDataModule) -> str:
    return str(PairStore("encodings", {"data": data.spec.identity}, 20).folder)


KEPT = {f.__name__: f for f in (features, statistics, classifier, latents, encodings)}


@pytest.mark.parametrize("kept", KEPT)
def test_the_same_data_are_found_again_under_another_file_date(tmp_path, kept):
    assert KEPT[kept](own(tmp_path)) == KEPT[kept](own(tmp_path))


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_in_the_data_nothing_kept_of_the_old_ones_is_taken(tmp_path, change):
    before, after = own(tmp_path), None
    expected = {name: find(before) for name, find in KEPT.items() if name != "latents" or change != "channels"}
    after = CHANGES[change](tmp_path)
    assert after.spec.version != before.spec.version
    for name, was in expected.items():
        assert KEPT[name](after) != was, name


def test_the_rule_that_cuts_and_orders_is_a_part_of_the_version(tmp_path, monkeypatch):
    before = own(tmp_path).spec.version
    monkeypatch.setattr(user_data, "RULE", "flowbench/user/2")
    assert own(tmp_path).spec.version != before


def test_standardized_points_are_other_data(tmp_path):
    x = np.random.default_rng(0).normal(size=(N, 3))
    versions = {own(tmp_path, x, label=None, standardize=flag).spec.version for flag in (True, False)}
    assert len(versions) == 2


SPEC = DataSpec("any", "1", (1, 8, 4), 2, 17)
SPECS = {
    "name": DataSpec("other", "1", (1, 8, 4), 2, 17),
    "version": DataSpec("any", "2", (1, 8, 4), 2, 17),
    "shape": DataSpec("any", "1", (1, 4, 8), 2, 17),
    "num_classes": DataSpec("any", "1", (1, 8, 4), 3, 17),
    "levels": DataSpec("any", "1", (1, 8, 4), 2, 18),
    "units": DataSpec("any", "1", (1, 8, 4), 2, 17, Units((0.0,), (2.0,))),
}


def test_every_field_of_a_spec_is_a_part_of_its_identity():
    assert set(SPECS) == {field.name for field in fields(DataSpec)}
    identities = [spec.identity for spec in (SPEC, *SPECS.values())]
    assert all(a != b for i, a in enumerate(identities) for b in identities[:i])


@pytest.mark.parametrize("change", ClassifierSettings.__dataclass_fields__)
def test_every_setting_of_a_classifier_is_a_part_of_its_file(change):
    settings = classifier_settings(SPEC.shape, 100)
    other = ClassifierSettings(**{**vars(settings), change: getattr(settings, change) + 1})
    assert _classifier_file("a-cnn", SPEC, 100, settings) != _classifier_file("a-cnn", SPEC, 100, other)


def test_name_and_number_of_images_are_a_part_of_a_classifiers_file():
    settings = classifier_settings(SPEC.shape, 100)
    files = {_classifier_file(name, SPEC, count, settings) for name in ("a-cnn", "b-cnn") for count in (100, 101)}
    assert len(files) == 4


@pytest.mark.parametrize("change", [{"name": "other"}, {"checksum": "b"}, {"protocol": "q"}])
def test_a_feature_networks_name_weights_and_protocol_are_a_part_of_its_features(tmp_path, change):
    data = own(tmp_path)
    assert features(data, network=Network(**change)) != features(data)
    assert features(data, split="val") != features(data)


def test_a_larger_training_split_is_another_reference(tmp_path):
    data = own(tmp_path)
    assert features(FlowDataModule("npz", path=data.path, levels=17, train_on_val=True)) != features(data)


def test_weights_of_another_shape_or_type_are_other_weights():
    found = set()
    for weight in (torch.zeros(2, 6), torch.zeros(6, 2), torch.zeros(3, 4), torch.zeros(2, 6, dtype=torch.int32)):
        module = nn.Module()
        module.register_buffer("weight", weight)
        found.add(weights_checksum(module))
    assert len(found) == 4


def test_an_autoencoder_of_another_kind_or_other_weights_has_other_latents(tmp_path):
    data = own(tmp_path)
    torch.manual_seed(0)
    module = Autoencoder(data.spec, partial(KLAutoencoder, latent_channels=2, width=8))
    before = _path(_identity(module, data))
    module.network.__class__ = type("Other", (KLAutoencoder,), {})
    renamed = _path(_identity(module, data))
    with torch.no_grad():
        next(module.network.parameters()).add_(1)
    assert len({before, renamed, _path(_identity(module, data))}) == 3


def test_the_same_bytes_with_height_and_width_swapped_are_measured_without_a_hand(tmp_path):
    """What was refused until a file was deleted: features and statistics of both shapes in one cache."""
    for shape in ((8, 4), (4, 8)):
        data = own(tmp_path, IMAGES.reshape(N, 1, *shape))
        reference = RealSet(data, "train")
        assert reference.features(Network(), 20).shape == (20, 32)
        assert reference.statistics(Network(), 20).count == 20
