"""Distances in feature maps: the formula in NumPy, what has a gradient, and what cannot be asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flowbench.core.places import cached
from flowbench.core.seeds import generator
from flowbench.metrics import DigitsCNN, PerceptualDistance, feature_map_distance, save_classifier
from flowbench.metrics.weights import EFFICIENTNET_MEMBER


def randn(*shape, name="x"):
    return torch.randn(shape, generator=generator(0, name))


@pytest.fixture
def classifier(tmp_path):
    torch.manual_seed(0)
    model = DigitsCNN((1, 8, 8), 10, width=4)
    save_classifier(tmp_path / "classifier.pt", model)
    return model, tmp_path / "classifier.pt"


def test_the_distance_follows_its_formula():
    """Twice one minus the cosine, averaged over cells and maps, written with NumPy."""
    shapes = [(3, 4, 5, 5), (3, 6, 2, 2)]
    maps = [randn(*shape, name=f"a{i}").double() for i, shape in enumerate(shapes)]
    others = [randn(*shape, name=f"b{i}").double() for i, shape in enumerate(shapes)]
    wanted = np.zeros(3)
    for a, b in zip(maps, others, strict=True):
        a, b = a.numpy(), b.numpy()
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        wanted += (2 - 2 * cosine).mean(axis=(1, 2)) / len(shapes)
    np.testing.assert_allclose(feature_map_distance(maps, others).numpy(), wanted, rtol=1e-8)


def test_maps_without_any_activation_have_a_finite_gradient():
    features = torch.zeros(1, 3, 2, 2, requires_grad=True)
    feature_map_distance([torch.ones(1, 3, 2, 2)], [features]).sum().backward()
    assert features.grad.isfinite().all()


def test_the_classifier_is_tapped_after_every_nonlinearity(classifier):
    model, path = classifier
    x, y = randn(2, 1, 8, 8).clamp(-1, 1), randn(2, 1, 8, 8, name="y").clamp(-1, 1)

    def maps(images):
        found = []
        for convolution in [layer for layer in model.trunk if isinstance(layer, torch.nn.Conv2d)]:
            images = F.silu(F.conv2d(images, convolution.weight, convolution.bias, convolution.stride, padding=1))
            found.append(images)
        return found

    found = PerceptualDistance("classifier", path)(x, y)
    torch.testing.assert_close(found, feature_map_distance(maps(x), maps(y)))
    assert ((found > 0) & (found < 4)).all()


def test_it_is_zero_for_equal_pictures_and_grows_with_the_noise(classifier):
    distance = PerceptualDistance("classifier", classifier[1])
    x, noise = randn(4, 1, 8, 8).clamp(-1, 1), randn(4, 1, 8, 8, name="noise")
    assert distance(x, x).max() < 1e-6
    means = [float(distance(x, x + std * noise).mean()) for std in (0.05, 0.2, 0.8)]
    assert means == sorted(means)


def test_gradients_reach_the_second_picture_alone(classifier):
    path = classifier[1]
    distance = PerceptualDistance("classifier", path)
    x = randn(2, 1, 8, 8).requires_grad_(True)
    y = randn(2, 1, 8, 8, name="y").requires_grad_(True)
    distance(x, y).sum().backward()
    assert x.grad is None
    assert y.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in distance._modules.parameters())


def test_autocast_does_not_reach_the_features(classifier):
    distance = PerceptualDistance("classifier", classifier[1])
    x, y = randn(2, 1, 8, 8), randn(2, 1, 8, 8, name="y")
    exact = distance(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distance(x, y), exact)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["inception", "efficientnet-lite0"])
def test_pretrained_networks_give_maps_and_gradients(network, monkeypatch):
    """Blur is farther than a small change of brightness, though its squared error is smaller."""
    monkeypatch.delenv("FLOWBENCH_CACHE", raising=False)  # the session's; the user's may hold the weights
    name = "inception-2015-12-05.pth" if network == "inception" else Path(EFFICIENTNET_MEMBER).name
    if not cached("weights", name).is_file():
        pytest.skip(f"the weights of {network} are not in {cached('weights')}")
    from sklearn.datasets import load_sample_images

    picture = torch.tensor(load_sample_images().images[0][100:228, 200:328].copy()).permute(2, 0, 1)[None]
    x = picture.float() / 127.5 - 1
    blurred = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0).requires_grad_(True)
    brighter = x + 1.2 * (blurred.detach() - x).square().mean().sqrt()
    distance = PerceptualDistance(network)
    far = distance(x, blurred)
    assert far > 2 * distance(x, brighter)
    far.sum().backward()
    assert blurred.grad.isfinite().all()
    assert blurred.grad.abs().sum() > 0
    grey = x[:, :1, :8, :8]
    assert distance(grey, -grey).shape == (1,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerceptualDistance("vgg"), "must be one of classifier, inception, efficientnet-lite0, got 'vgg'"),
        (lambda: PerceptualDistance("classifier"), "takes the path of its weights"),
        (lambda: PerceptualDistance("efficientnet-lite0", side=65), "a multiple of 32, got 65"),
        (lambda: PerceptualDistance("inception", side=64), "at least 107, got 64"),
        (lambda: PerceptualDistance("inception")(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)), "share a shape"),
        (lambda: PerceptualDistance("classifier", "none.pt")(*[torch.zeros(1, 1, 8, 8)] * 2), "no classifier weights"),
    ],
)
def test_user_errors_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_classifier_takes_its_own_shape_alone(classifier):
    with pytest.raises(ValueError, match=r"takes pictures of shape \(1, 8, 8\), got \(1, 9, 9\)"):
        PerceptualDistance("classifier", classifier[1])(torch.zeros(1, 1, 9, 9), torch.zeros(1, 1, 9, 9))
