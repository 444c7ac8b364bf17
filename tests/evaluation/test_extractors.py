from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flowbench.data import FlowDataModule
from flowbench.evaluation import extractors, get_extractor
from flowbench.evaluation.samples import RealSet
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

    def train(*given, **options):
        calls.append(given)
        return inner(*given, **options | {"num_steps": 2})

    monkeypatch.setattr(extractors, "train_classifier", train)
    return calls


def processor() -> str:
    """The processor's description, where the system gives one."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


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
    assert not extractor.model.training
    assert not any(parameter.requires_grad for parameter in extractor.model.parameters())


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
    def interrupted(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(extractors, "train_classifier", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get_extractor("digits-cnn", FlowDataModule("digits"))
    assert not list(cache.glob("*.pt"))


@pytest.mark.parametrize(
    ("dataset", "name", "expected"),
    [
        (
            "digits",
            "vgg",
            "no feature extractor 'vgg' for the dataset digits: use auto, identity, norm, digits-cnn, inception, incep",
        ),
        (
            "digits",
            "mnist-cnn",
            "no feature extractor 'mnist-cnn' for the dataset digits: use auto, identity, norm, digits-cnn",
        ),
        ("moons", "inception", "no feature extractor 'inception' for the dataset moons: use auto, identity, norm$"),
        ("moons", "moons-cnn", "no feature extractor 'moons-cnn' for the dataset moons: use auto, identity, norm$"),
        ("moons", "digits-cnn", "no feature extractor 'digits-cnn' for the dataset moons: use auto, identity, norm$"),
    ],
)
def test_unknown_names(dataset, name, expected):
    with pytest.raises(ValueError, match=expected):
        get_extractor(name, FlowDataModule(dataset))


@pytest.mark.parametrize(
    "name",
    ["inception", "inception-bf16", "inception-logits", "efficientnet-lite0", "dinov2-vit-s-14", "clip-vit-b-32"],
)
def test_pretrained_networks_are_looked_up_and_never_replaced(name, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBENCH_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(ValueError, match=r"no weights for [\w-]+[:;]") as error:
        get_extractor(name, FlowDataModule("digits"))
    assert "\n" not in str(error.value)
    made = []
    monkeypatch.setitem(extractors.PRETRAINED, name, lambda device: made.append(device) or "made")
    for data in (FlowDataModule("digits"), images(tmp_path, labelled=False)):
        assert get_extractor(name, data, "cpu") == "made"
    assert made == ["cpu", "cpu"]


def test_pretrained_networks_take_grey_and_rgb_only(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (30, 4, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "four.npz", x=x)
    with pytest.raises(ValueError, match="inception takes images of 1 or 3 channels, npz has 4"):
        get_extractor("inception", FlowDataModule("npz", str(tmp_path / "four.npz")))


def test_what_the_flow_trains_on_does_not_change_the_features(cache, short_training, tmp_path, monkeypatch):
    first = get_extractor("digits-cnn", FlowDataModule("digits"))
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "another"))
    second = get_extractor("digits-cnn", FlowDataModule("digits", train_on_val=True))
    assert len(short_training) == 2
    assert first.checksum == second.checksum


def test_the_accuracy_is_shown_and_kept(cache, short_training, capsys):
    data = FlowDataModule("digits")
    first = get_extractor("digits-cnn", data)
    assert "digits-cnn recognises" in capsys.readouterr().err
    pictures = data.uint8_images("test")
    assert first.test_accuracy == classification_accuracy(first.model, pictures, data.split("test").label)
    assert get_extractor("digits-cnn", data).test_accuracy == first.test_accuracy
    assert capsys.readouterr().err == ""


def test_larger_pictures_have_a_file_of_their_own(cache, short_training, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (60, 3, 20, 16), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", x=x, label=np.arange(60) % 3)
    extractor = get_extractor("npz-cnn", FlowDataModule("npz", str(tmp_path / "own.npz")))
    assert extractor.model.stages == 3
    assert [path.name.endswith("-v2.pt") for path in cache.glob("*.pt")] == [True]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("mnist", 0.985), ("fashion_mnist", 0.88), ("cifar10", 0.72)])
def test_classifiers_of_real_images_recognise_them(name, least, cache):
    data = FlowDataModule(name)
    try:
        data.setup("test")
    except ValueError as error:
        pytest.skip(f"{name} cannot be had: {error}")
    assert get_extractor(f"{name}-cnn", data).test_accuracy > least


def test_the_published_digits_network_has_not_changed():
    """Rows of earlier benches depend on it; another processor or torch may round differently."""
    if not ("EPYC" in processor() and "avx512_bf16" in processor() and torch.__version__.startswith("2.13.")):
        pytest.skip("recorded with torch 2.13 on an EPYC with avx512_bf16")
    extractor = get_extractor("digits-cnn", FlowDataModule("digits"))
    assert extractor.checksum == "f3f340071e703a11b9520857b567df3f3e23c18dac4a643c2b1eb1183406579b"


def test_identity_takes_anything():
    assert isinstance(get_extractor("identity", FlowDataModule("moons")), IdentityFeatures)
    assert get_extractor("identity", FlowDataModule("digits")).dimension == 64


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_a_users_own_labelled_images(cache, short_training, tmp_path, kind):
    data = images(tmp_path, kind)
    extractor = get_extractor("npz-cnn", data)
    assert extractor(data.spec.to_uint8(data.model_values("test"))).shape == (len(data.split("test")), 64)


def test_a_classifier_needs_labels(cache, short_training, tmp_path):
    with pytest.raises(ValueError, match="npz-cnn is a classifier, but npz has no labels: use features: auto"):
        get_extractor("npz-cnn", images(tmp_path, labelled=False))
    assert not short_training


def test_other_data_in_the_same_file_get_a_classifier_of_their_own(cache, short_training, tmp_path):
    first = get_extractor("npz-cnn", images(tmp_path))
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "own.npz", x=rng.integers(0, 256, (60, 1, 8, 8), dtype=np.uint8), label=np.arange(60) % 3)
    second = get_extractor("npz-cnn", FlowDataModule("npz", str(tmp_path / "own.npz")))
    assert len(short_training) == 2
    assert first.checksum != second.checksum


def test_norms_need_no_network(cache):
    for dataset in ("digits", "moons"):
        found = get_extractor("norm", FlowDataModule(dataset))
        assert (found.name, found.dimension) == ("norm", 1)
    real = RealSet(FlowDataModule("digits"), "test", 30)
    assert real.features(found).shape == (30, 1)
    assert not (cache / "features").exists(), "cheaper to take than to keep"
