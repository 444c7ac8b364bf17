from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from flowbench.core.seeds import generator
from flowbench.data import FlowDataModule
from flowbench.evaluation import get_extractor
from flowbench.metrics import (
    FIDELITY_DIMENSIONS,
    ClassifierFeatures,
    DigitsCNN,
    FeatureExtractor,
    FeatureStatistics,
    FidelityFeatures,
    IdentityFeatures,
    classifier_settings,
    extract,
    fidelity_features,
    frechet_distance,
    load_classifier,
    save_classifier,
    train_classifier,
    weights_checksum,
)
from flowbench.metrics.features import NormFeatures, as_rgb, exact_inference, fold_normalisations
from tests.closeness import assert_near


@pytest.fixture(scope="module")
def digits():
    """Real digits as uint8 pictures, and which of them are for training."""
    raw = load_digits()
    images = (torch.from_numpy(raw.images)[:, None] * 255 / 16).to(torch.uint8)
    labels = torch.from_numpy(raw.target)
    train = torch.randperm(len(images), generator=generator(0, "split")) < 1200
    return images, labels, train


@pytest.fixture(scope="module")
def model():
    """The classifier of the digits that all tests share."""
    return get_extractor("digits-cnn", FlowDataModule("digits")).model


def test_training_is_deterministic_whatever_surrounds_it(digits):
    images, labels, _ = digits
    options = {"num_steps": 3, "width": 8, "dimension": 16}
    first = weights_checksum(train_classifier(images, labels, 10, seed=1, **options))
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            again = train_classifier(images.clone(), labels.clone(), 10, seed=1, **options)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
    assert weights_checksum(again) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert next(again.parameters()).dtype == torch.float32
    assert weights_checksum(train_classifier(images, labels, 10, seed=2, **options)) != first
    assert weights_checksum(train_classifier(images, labels, 10, seed=1, **(options | {"num_steps": 4}))) != first


def test_the_seed_reaches_initialisation(digits):
    images, labels, _ = digits
    options = {"num_steps": 1, "width": 8, "dimension": 16}
    initial = {weights_checksum(train_classifier(images, labels, 10, s, learning_rate=0.0, **options)) for s in (0, 1)}
    assert len(initial) == 2


def test_colour_images_of_any_size():
    images = torch.randint(0, 256, (20, 3, 9, 13), generator=generator(0, "rgb"), dtype=torch.uint8)
    labels = torch.arange(20) % 4
    model = train_classifier(images, labels, 4, seed=0, num_steps=2, dimension=12)
    assert model(images).shape == (20, 4)
    assert ClassifierFeatures(model)(images).shape == (20, 12)


def test_larger_pictures_get_a_deeper_network_with_normalisation():
    colour = torch.randint(0, 256, (40, 3, 32, 40), generator=generator(0, "rgb"), dtype=torch.uint8)
    labels = torch.arange(40) % 4
    options = {"num_steps": 3, "batch_size": 8, "width": 4, "stages": 3}
    model = train_classifier(colour, labels, 4, seed=0, **options)
    assert ClassifierFeatures(model)(colour).shape == (40, 64)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 7
    assert weights_checksum(train_classifier(colour, labels, 4, seed=0, **options)) == weights_checksum(model)
    with torch.inference_mode():
        again = train_classifier(colour.clone(), labels, 4, seed=0, **options)
    assert weights_checksum(again) == weights_checksum(model)
    half = model.trunk[:-1]  # 40 pixels are averaged down to 32, so the first map has 32
    assert half[0](nn.functional.adaptive_avg_pool2d(colour.float(), (32, 32))).shape[2:] == (32, 32)
    big = torch.randint(0, 256, (2, 3, 32, 80), generator=generator(0, "big"), dtype=torch.uint8)
    deep = DigitsCNN((3, 32, 80), 4, width=4, stages=2)
    reduced = nn.functional.adaptive_avg_pool2d(big / 127.5 - 1, (32, 32))
    torch.testing.assert_close(deep.eval().features(big), deep.trunk(reduced))
    with pytest.raises(ValueError, match=r"stages must be a whole number in \[1, 16\], got 0"):
        DigitsCNN((1, 8, 8), 10, stages=0)


def test_settings_follow_the_size_of_the_pictures():
    digits = classifier_settings((1, 8, 8), 1400)
    assert (digits.version, digits.options) == (1, {"num_steps": 400, "width": 32, "stages": 1})
    grey, colour = classifier_settings((1, 28, 28), 55_000), classifier_settings((3, 32, 32), 45_000)
    assert grey.version == colour.version == 2
    assert grey.stages < colour.stages
    assert classifier_settings((3, 64, 64), 500).num_steps == 400
    assert classifier_settings((3, 64, 64), 3200).num_steps == 750


def test_training_reads_a_memory_map_batch_by_batch(tmp_path, digits, monkeypatch):
    """Only batches become floats; the picture of the whole split stays bytes."""
    images, labels, _ = digits
    import numpy as np

    np.save(tmp_path / "images.npy", images.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "images.npy", mmap_mode="c"))
    largest = []
    inner = DigitsCNN.features
    monkeypatch.setattr(DigitsCNN, "features", lambda self, x: largest.append(len(x)) or inner(self, x))
    options = {"num_steps": 2, "width": 8, "dimension": 16}
    model = train_classifier(mapped, labels, 10, seed=1, **options)
    assert largest == [128, 128]
    assert weights_checksum(model) == weights_checksum(train_classifier(images, labels, 10, seed=1, **options))


def test_features_rank_distributions_as_they_should(model, digits):
    images, _, train = digits
    extractor = ClassifierFeatures(model)

    def fd(samples: Tensor) -> float:
        return frechet_distance(
            FeatureStatistics.from_features(extract(extractor, images[train])),
            FeatureStatistics.from_features(extract(extractor, samples)),
        )

    held_out = images[~train]
    noise = torch.randint(0, 256, held_out.shape, generator=generator(0, "noise"), dtype=torch.uint8)
    levels = [
        (held_out.float() + std * torch.randn(held_out.shape, generator=generator(0, "n"))).clamp(0, 255).byte()
        for std in (0.0, 40.0, 90.0)
    ]
    values = [fd(x) for x in levels] + [fd(noise)]
    assert values == sorted(values)
    assert 10 * values[0] < values[-1]


def test_extraction_does_not_depend_on_batches(model, digits):
    images = digits[0][:100]
    extractor = ClassifierFeatures(model)
    whole = extract(extractor, images, batch_size=100)
    assert isinstance(extractor, FeatureExtractor)
    assert whole.dtype == torch.float32
    assert not whole.requires_grad
    for size in (1, 7, 99):
        assert_near(extract(extractor, images, batch_size=size), whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_near(extractor(images), whole)


def test_identity_keeps_coordinates():
    points = torch.randn(7, 2, generator=generator(0, "p"))
    extractor = IdentityFeatures(2)
    assert isinstance(extractor, FeatureExtractor)
    assert torch.equal(extract(extractor, points, batch_size=3), points)
    assert IdentityFeatures(12)(torch.zeros(5, 3, 2, 2, dtype=torch.uint8)).shape == (5, 12)
    assert IdentityFeatures(3).checksum != extractor.checksum
    with pytest.raises(ValueError, match="3 coordinates, expected 2"):
        extractor(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="needs samples, got none"):
        extract(extractor, torch.zeros(0, 2))


def test_weights_survive_a_file(model, digits, tmp_path, monkeypatch):
    path = tmp_path / "cache" / "cnn.pt"
    monkeypatch.setattr(model, "test_accuracy", 0.97)
    checksum = save_classifier(path, model)
    loaded = load_classifier(path, checksum)
    assert loaded.test_accuracy == ClassifierFeatures(loaded).test_accuracy == 0.97
    assert weights_checksum(loaded) == checksum == ClassifierFeatures(loaded).checksum
    assert torch.equal(loaded(digits[0][:5]), model(digits[0][:5]))
    assert not loaded.training
    with pytest.raises(ValueError, match=r"expected abc; delete and retrain"):
        load_classifier(path, "abc")


def test_deeper_networks_and_old_files_are_read(tmp_path, model):
    path = tmp_path / "cnn.pt"
    deep = DigitsCNN((1, 28, 28), 10, width=4, stages=2)
    assert weights_checksum(load_classifier(path, save_classifier(path, deep))) == weights_checksum(deep)
    save_classifier(path, model)
    content = torch.load(path, weights_only=True)
    del content["stages"], content["test_accuracy"]
    torch.save(content, path)
    old = load_classifier(path)
    assert (old.stages, old.test_accuracy) == (1, None)


def test_damaged_weights_are_refused(model, tmp_path):
    path = tmp_path / "cnn.pt"
    with pytest.raises(ValueError, match="no classifier weights"):
        load_classifier(path)
    save_classifier(path, model)
    whole = path.read_bytes()
    content = torch.load(path, weights_only=True)
    for damaged in (whole[:1000], b"", b"garbage"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot read classifier weights") as error:
            load_classifier(path)
        assert "\n" not in str(error.value)
    for wrong in ({"weights": {}}, content | {"width": 3}, content | {"shape": [8]}, [1, 2]):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match="cannot read classifier weights"):
            load_classifier(path)
    content["weights"]["head.bias"][0] += 1e-3
    torch.save(content, path)
    with pytest.raises(ValueError, match="sha256"):
        load_classifier(path)
    torch.save(model, path)  # a pickled module would run code
    with pytest.raises(ValueError, match="cannot read classifier weights"):
        load_classifier(path)


@pytest.mark.parametrize(
    ("images", "labels", "classes", "message"),
    [
        (torch.zeros(4, 1, 8, 8), torch.zeros(4).long(), 2, "must be uint8"),
        (torch.zeros(4, 1, 8, 8).byte(), torch.zeros(3).long(), 2, r"shape \(4,\)"),
        (torch.zeros(4, 1, 8, 8).byte(), torch.tensor([0, 1, 2, 3]), 3, r"0\.\.2, got 0\.\.3"),
        (
            torch.zeros(4, 1, 8, 8).byte(),
            torch.zeros(4).long(),
            1,
            r"num_classes must be a whole number in \[2, .*, got 1",
        ),
        (torch.zeros(4, 1, 2, 8).byte(), torch.zeros(4).long(), 2, "resize"),
    ],
)
def test_users_mistakes_cost_one_line(images, labels, classes, message):
    with pytest.raises(ValueError, match=message) as error:
        train_classifier(images, labels, classes, seed=0, num_steps=1)
    assert "\n" not in str(error.value)


def test_wrong_images_are_named():
    with pytest.raises(ValueError, match=r"uint8 of shape \(B, 1, 8, 8\), got torch.float32 \(2, 1, 8, 8\)"):
        DigitsCNN((1, 8, 8), 10)(torch.zeros(2, 1, 8, 8))


def test_grey_pictures_become_rgb():
    grey = torch.arange(8, dtype=torch.uint8).reshape(2, 1, 2, 2)
    assert torch.equal(as_rgb(grey), torch.cat([grey] * 3, dim=1))
    assert as_rgb(grey).data_ptr() == grey.data_ptr()
    with pytest.raises(ValueError, match=r"uint8 of shape \(N, 1 or 3, H, W\), got torch.uint8 \(2, 4, 2, 2\)"):
        as_rgb(torch.zeros(2, 4, 2, 2, dtype=torch.uint8))


def test_folding_normalisations_keeps_what_a_network_computes():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x))

    torch.manual_seed(0)
    network, x = nn.Sequential(Block(), nn.ReLU()), torch.randn(4, 3, 8, 8)
    network(3 * x + 1)  # running statistics that are not the identity
    expected = network.eval()(x).detach()
    folded = fold_normalisations(network.train())
    assert not folded.training
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert_near(folded(x), expected)


def test_the_callers_precision_comes_back_even_after_an_error():
    before = torch.backends.cudnn.conv.fp32_precision
    with pytest.raises(RuntimeError, match="mine"), exact_inference(torch.device("cpu")):
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert not torch.is_grad_enabled()
        raise RuntimeError("mine")
    assert torch.backends.cudnn.conv.fp32_precision == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", sorted(FIDELITY_DIMENSIONS))
def test_without_their_weights_dinov2_and_clip_say_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"no weights for {name}: .*once where there is a network") as error:
        FidelityFeatures(name)
    assert "\n" not in str(error.value)
    (tmp_path / "mine.pt").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"mine.pt has sha256|takes no file of weights"):
        FidelityFeatures(name, tmp_path / "mine.pt")
    with pytest.raises(ValueError, match="name must be one of dinov2-vit-s-14, clip-vit-b-32, got 'vgg'"):
        FidelityFeatures("vgg")


def test_clip_with_random_weights(tmp_path, monkeypatch):
    """One layer of width 64 in the place of twelve of 768."""
    draw, width = generator(0, "clip"), 64
    shapes = {"conv1.weight": (width, 3, 32, 32), "class_embedding": (width,), "positional_embedding": (50, width)}
    shapes |= {f"ln_{end}.{part}": (width,) for end in ("pre", "post") for part in ("weight", "bias")}
    block = "transformer.resblocks.0."
    shapes |= {f"{block}ln_{i}.{part}": (width,) for i in (1, 2) for part in ("weight", "bias")}
    for layer, (rows, columns) in {"mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4), "attn.out_proj": (1, 1)}.items():
        shapes |= {f"{block}{layer}.weight": (rows * width, columns * width), f"{block}{layer}.bias": (rows * width,)}
    shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
    shapes["proj"] = (width, 512)
    state = {f"visual.{name}": 0.1 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    state["text_projection"] = torch.zeros(8, 512)
    program = tmp_path / "clip.pt"
    program.write_bytes(b"a program")
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA

    monkeypatch.setattr(fidelity_features, "sha256_of", lambda path: MODEL_METADATA["clip-vit-b-32"]["hash"])
    monkeypatch.setattr(torch.jit, "load", lambda *given, **options: SimpleNamespace(state_dict=lambda: dict(state)))
    before = torch.get_rng_state()
    extractor = FidelityFeatures("clip-vit-b-32", program)
    assert torch.equal(torch.get_rng_state(), before)
    pictures = torch.randint(0, 256, (3, 3, 16, 16), generator=draw, dtype=torch.uint8)
    whole = extractor(pictures)
    assert whole.shape == (3, extractor.dimension) == (3, 512)
    assert whole.dtype == torch.float32
    assert extractor.protocol == "clip-vit-b-32/bilinear-224"
    assert isinstance(extractor, FeatureExtractor)
    assert_near(extract(extractor, pictures, batch_size=2), whole, ulps=1024)
    assert torch.equal(extractor(pictures[:, :1]), extractor(pictures[:, :1].repeat(1, 3, 1, 1)))
    assert extractor(pictures[:0]).shape == (0, 512)


def test_norms_are_root_mean_squares_in_model_space():
    points = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(NormFeatures()(points), torch.tensor([[math.sqrt(12.5)], [0.0]]))
    images = torch.tensor([0, 255, 255, 0], dtype=torch.uint8).reshape(1, 1, 2, 2)
    torch.testing.assert_close(NormFeatures()(images), torch.ones(1, 1))
    assert isinstance(NormFeatures(), FeatureExtractor)


def test_classes_from_features_are_those_of_the_network():
    images = torch.randint(256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    model = train_classifier(images, torch.arange(20) % 3, 3, 0, num_steps=1)
    network = ClassifierFeatures(model)
    assert torch.equal(network.classify(network(images)), model(images).argmax(dim=1))
