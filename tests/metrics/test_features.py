from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from flowbench.metrics import (
    ClassifierFeatures,
    DigitsCNN,
    FeatureExtractor,
    FeatureStatistics,
    IdentityFeatures,
    classification_accuracy,
    extract,
    frechet_distance,
    load_classifier,
    save_classifier,
    train_classifier,
    weights_checksum,
)
from flowbench.seeds import generator


@pytest.fixture(scope="module")
def digits():
    """Real digits as uint8 pictures, and which of them are for training."""
    raw = load_digits()
    images = (torch.from_numpy(raw.images)[:, None] * 255 / 16).to(torch.uint8)
    labels = torch.from_numpy(raw.target)
    train = torch.randperm(len(images), generator=generator(0, "split")) < 1200
    return images, labels, train


@pytest.fixture(scope="module")
def model(digits):
    images, labels, train = digits
    return train_classifier(images[train], labels[train], 10, seed=0)


def test_learns_digits_it_has_not_seen(model, digits):
    images, labels, train = digits
    assert classification_accuracy(model, images[~train], labels[~train]) > 0.95
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


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
        torch.testing.assert_close(extract(extractor, images, batch_size=size), whole, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(extractor(images), whole, rtol=1e-5, atol=1e-5)


def test_identity_keeps_coordinates():
    points = torch.randn(7, 2, generator=generator(0, "p"))
    extractor = IdentityFeatures(2)
    assert isinstance(extractor, FeatureExtractor)
    assert torch.equal(extract(extractor, points, batch_size=3), points)
    assert IdentityFeatures(12)(torch.zeros(5, 3, 2, 2, dtype=torch.uint8)).shape == (5, 12)
    assert IdentityFeatures(3).checksum != extractor.checksum
    with pytest.raises(ValueError, match="3 coordinates, expected 2"):
        extractor(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="got 0 and 512"):
        extract(extractor, torch.zeros(0, 2))


def test_weights_survive_a_file(model, digits, tmp_path):
    path = tmp_path / "cache" / "cnn.pt"
    checksum = save_classifier(path, model)
    loaded = load_classifier(path, checksum)
    assert weights_checksum(loaded) == checksum == ClassifierFeatures(loaded).checksum
    assert torch.equal(loaded(digits[0][:5]), model(digits[0][:5]))
    assert not loaded.training
    with pytest.raises(ValueError, match=r"expected abc; delete and retrain"):
        load_classifier(path, "abc")


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
        (torch.zeros(4, 1, 8, 8).byte(), torch.zeros(4).long(), 1, "at least 2"),
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
