from __future__ import annotations

import numpy as np
import pytest
import torch

from flowbench.data import FlowDataModule
from flowbench.evaluation import cache_dir, extractors, get_extractor
from flowbench.metrics import ClassifierFeatures, IdentityFeatures, classification_accuracy


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def short_training(monkeypatch):
    """Two steps; counts the trainings."""
    calls = []
    inner = extractors.train_classifier

    def train(*given):
        calls.append(given)
        return inner(*given, num_steps=2)

    monkeypatch.setattr(extractors, "train_classifier", train)
    return calls


def images(tmp_path, kind: str = "uint8", labelled: bool = True) -> FlowDataModule:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (60, 1, 8, 8), dtype=np.uint8)
    arrays = {"x": x if kind == "uint8" else (x / 127.5 - 1).astype(np.float32)}
    if labelled:
        arrays["label"] = np.arange(60) % 3
    np.savez(tmp_path / "own.npz", **arrays)
    return FlowDataModule("npz", str(tmp_path / "own.npz"))


def test_the_digits_classifier_recognises_unseen_digits():
    """The session's cache: the one that other tests use."""
    data = FlowDataModule("digits")
    extractor = get_extractor("digits-cnn", data)
    assert isinstance(extractor, ClassifierFeatures)
    test = data.split("test")
    pictures = data.spec.to_uint8(data.model_values("test"))
    assert classification_accuracy(extractor.model, pictures, test.label) > 0.95


def test_the_second_call_reads_the_cache(cache, short_training):
    data = FlowDataModule("digits")
    first, second = (get_extractor("digits-cnn", data) for _ in range(2))
    assert len(short_training) == 1
    assert first.checksum == second.checksum
    assert [p.suffix for p in sorted(cache.iterdir())] == [".pt", ".lock"]
    x = data.spec.to_uint8(data.model_values("val")[:7])
    assert torch.equal(first(x), second(x))


def test_training_is_the_same_on_every_machine_and_for_every_run(cache, short_training, monkeypatch, tmp_path):
    """Neither the run's seed, the global generator nor the evaluation's dequantisation enters."""
    first = get_extractor("digits-cnn", FlowDataModule("digits", seed=1))
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "another"))
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    second = get_extractor("digits-cnn", FlowDataModule("digits", seed=2, dequantize="none"))
    assert len(short_training) == 2
    assert first.checksum == second.checksum
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("content", [b"", b"rubbish"])
def test_a_corrupt_cache_is_one_clear_line(cache, short_training, content):
    data = FlowDataModule("digits")
    get_extractor("digits-cnn", data)
    (path,) = cache.glob("*.pt")
    path.write_bytes(content or path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cannot read classifier weights .*; delete") as caught:
        get_extractor("digits-cnn", data)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    path.unlink()
    get_extractor("digits-cnn", data)


def test_an_interrupted_training_leaves_no_half_a_file(cache, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(extractors, "train_classifier", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get_extractor("digits-cnn", FlowDataModule("digits"))
    assert not list(cache.glob("*.pt"))


@pytest.mark.parametrize(
    ("dataset", "name", "expected"),
    [
        ("digits", "inception", "no feature extractor 'inception' for the dataset digits: use identity or digits-cnn"),
        ("moons", "moons-cnn", "no feature extractor 'moons-cnn' for the dataset moons: use identity$"),
        ("moons", "digits-cnn", "no feature extractor 'digits-cnn' for the dataset moons: use identity$"),
    ],
)
def test_unknown_names(dataset, name, expected):
    with pytest.raises(ValueError, match=expected):
        get_extractor(name, FlowDataModule(dataset))


def test_identity_takes_anything():
    assert isinstance(get_extractor("identity", FlowDataModule("moons")), IdentityFeatures)
    assert get_extractor("identity", FlowDataModule("digits")).dimension == 64


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_a_users_own_labelled_images(cache, short_training, tmp_path, kind):
    data = images(tmp_path, kind)
    extractor = get_extractor("npz-cnn", data)
    assert extractor(data.spec.to_uint8(data.model_values("test"))).shape == (len(data.split("test")), 64)


def test_a_classifier_needs_labels(cache, short_training, tmp_path):
    with pytest.raises(ValueError, match="npz-cnn is a classifier, but npz has no labels: use features: identity"):
        get_extractor("npz-cnn", images(tmp_path, labelled=False))
    assert not short_training


def test_other_data_in_the_same_file_get_a_classifier_of_their_own(cache, short_training, tmp_path):
    first = get_extractor("npz-cnn", images(tmp_path))
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "own.npz", x=rng.integers(0, 256, (60, 1, 8, 8), dtype=np.uint8), label=np.arange(60) % 3)
    second = get_extractor("npz-cnn", FlowDataModule("npz", str(tmp_path / "own.npz")))
    assert len(short_training) == 2
    assert first.checksum != second.checksum


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("FLOWBENCH_CACHE")
    assert str(cache_dir()) == "data/cache"
