"""Our numbers beside torch-fidelity's and clean-fid's formula on the same features, and what each must respond to."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits

from flowbench.core.seeds import generator
from flowbench.metrics import (
    FeatureStatistics,
    frechet_distance,
    frechet_distance_of_features,
    gaussian_frechet_distance,
    kernel_distance,
    precision_recall,
)


@pytest.fixture(scope="module")
def fidelity():
    from torch_fidelity import metric_fid, metric_kid, metric_prc

    return metric_fid, metric_kid, metric_prc


@pytest.fixture(scope="module")
def digits():
    """Real images, (1797, 8, 8), values 0 to 16."""
    return load_digits().images


class RandomConvolutions:
    """A fixed random network, 8 x 8 -> D features that are positive and skewed, as Inception's are."""

    def __init__(self, dimension=24):
        draws = generator(21, "network")
        self.first = torch.randn(16, 1, 3, 3, generator=draws) / 3
        self.second = torch.randn(dimension, 16, 3, 3, generator=draws) / 12

    def __call__(self, images):
        x = torch.as_tensor(np.asarray(images), dtype=torch.float32).unsqueeze(1) / 16
        x = torch.relu(torch.nn.functional.conv2d(x, self.first, padding=1))
        x = torch.relu(torch.nn.functional.conv2d(x, self.second, padding=1))
        return x.mean(dim=(2, 3))


@pytest.fixture(scope="module")
def halves(digits):
    features = RandomConvolutions()(digits)
    return {
        "random-network": (features[:900], features[900:]),
        "pixels": tuple(torch.from_numpy(part).flatten(1).float() for part in (digits[:900], digits[900:])),
        "shifted": (features[:900], 1.2 * features[900:] + 0.1),
        "fewer than features": tuple(torch.from_numpy(p).flatten(1).float() for p in (digits[:50], digits[50:110])),
    }


CASES = ["random-network", "pixels", "shifted", "fewer than features"]


def numpy_moments(features):
    array = features.double().numpy()
    return array.mean(axis=0), np.cov(array, rowvar=False)


def clean_fid(first, second, offset=1e-6):
    """Clean-fid's and pytorch-fid's formula, with their shift of the diagonal where the root does not exist."""
    (mean_a, cov_a), (mean_b, cov_b) = numpy_moments(first), numpy_moments(second)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    if not np.isfinite(root).all():
        shift = offset * np.eye(len(cov_a))
        root = scipy.linalg.sqrtm((cov_a + shift) @ (cov_b + shift))
    return float(np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(np.real(root)))


def sums(features):
    return FeatureStatistics.from_features(features)


# SciPy says of singular products that their root may not exist; the formula's own answer to that is compared here.
@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize("case", CASES)
def test_frechet_distance_agrees_with_torch_fidelity_and_clean_fid(halves, fidelity, case):
    first, second = halves[case]
    value = frechet_distance(sums(first), sums(second))
    assert frechet_distance_of_features(first, second) == pytest.approx(value, rel=1e-8)
    moments = [fidelity[0].fid_features_to_statistics(x.double()) for x in (first, second)]
    theirs = fidelity[0].fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]
    # Their roots of rounding errors (pixels that are always 0, few samples) cost them digits.
    exact = case in ("random-network", "shifted")
    assert value == pytest.approx(theirs, rel=1e-8 if exact else 1e-4)
    assert value == pytest.approx(clean_fid(first, second), rel=1e-6 if exact else 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_kernel_distance_agrees_with_torch_fidelity(halves, fidelity, case):
    first, second = (x[:50] if case == "fewer than features" else x[:800] for x in halves[case])
    theirs = fidelity[1].kid_features_to_metric(
        first.double(), second.double(), kid_subsets=1, kid_subset_size=len(first), verbose=False
    )["kernel_inception_distance_mean"]
    assert kernel_distance(first, second).mean == pytest.approx(theirs, rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("save_memory", [False, True])
def test_precision_and_recall_agree_with_torch_fidelity(halves, fidelity, case, save_memory):
    real, generated = halves[case]
    theirs = fidelity[2].prc_features_to_metric(
        generated.double(),
        real.double(),
        prc_neighborhood=3,
        prc_batch_size=200,
        save_cpu_ram=save_memory,
        verbose=False,
    )
    # Their distances come from a matrix product: one pair on a ball's border may fall on its other side.
    assert precision_recall(real, generated).precision == pytest.approx(theirs["precision"], abs=1.5 / len(generated))
    assert precision_recall(real, generated).recall == pytest.approx(theirs["recall"], abs=1.5 / len(real))


def test_features_of_known_gaussians_approach_the_closed_form():
    draws = generator(3, "gaussians")
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=draws, dtype=torch.float64)).Q
    deviation_a, deviation_b = torch.linspace(0.5, 2, 6).double(), torch.linspace(2, 1, 6).double()
    shift = torch.linspace(-1, 1, 6).double()
    closed = float(shift.square().sum() + (deviation_a - deviation_b).square().sum())
    covariances = [rotation.T @ s.square().diag() @ rotation for s in (deviation_a, deviation_b)]
    zero = torch.zeros(6, dtype=torch.float64)
    assert gaussian_frechet_distance(zero, covariances[0], shift @ rotation, covariances[1]) == pytest.approx(closed)
    errors = []
    for num in (100, 1000, 100_000):
        a, b = (torch.randn(num, 6, generator=draws, dtype=torch.float64) for _ in range(2))
        found = frechet_distance_of_features(a * deviation_a @ rotation, (b * deviation_b + shift) @ rotation)
        errors.append(abs(found - closed))
    assert errors[2] < 0.02 * closed
    assert errors[2] < errors[0]


@pytest.mark.parametrize("batch_size", [1, 7, 64, 900])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_batch_size_order_and_ranks_do_not_matter(halves, batch_size, ranks):
    first, second = halves["random-network"]
    expected = frechet_distance(sums(first), sums(second))
    shuffled = first[torch.randperm(len(first), generator=generator(0, "order"))]
    merged = FeatureStatistics(first.shape[1])
    ragged = {1: [900], 2: [613, 287], 3: [500, 399, 1]}[ranks]
    for mine in shuffled.split(ragged):
        local = FeatureStatistics(first.shape[1])
        for batch in mine.split(batch_size):
            local.update(batch)
        merged = merged.merge(local)
    assert merged.count == 900
    assert frechet_distance(merged, sums(second)) == pytest.approx(expected, rel=1e-9)
    order = torch.randperm(len(first), generator=generator(1, "order"))
    assert kernel_distance(first[order], second).mean == pytest.approx(kernel_distance(first, second).mean, rel=1e-9)
    assert precision_recall(first[order], second, chunk_size=batch_size + 40) == precision_recall(first, second)


@pytest.mark.parametrize("space", ["pixels", pytest.param("random-network", marks=pytest.mark.slow)])
@pytest.mark.parametrize("damage", ["blur", "noise"])
def test_distances_grow_with_blur_and_noise(digits, space, damage):
    features = RandomConvolutions() if space == "random-network" else (lambda x: torch.from_numpy(x).flatten(1))
    noise = torch.randn(len(digits), 8, 8, generator=generator(4, "noise"), dtype=torch.float64).numpy()
    worse = {
        "blur": lambda level: gaussian_filter(digits, sigma=(0, level, level)),
        "noise": lambda level: digits + 4 * level * noise,
    }[damage]
    reference = features(digits)
    frechet, kernel = [], []
    for level in (0.0, 0.3, 0.5, 0.8, 1.2, 2.0):
        damaged = features(worse(level) if level else digits)
        frechet.append(frechet_distance_of_features(damaged, reference))
        kernel.append(kernel_distance(damaged, reference).mean)
    assert frechet == sorted(frechet)
    assert kernel == sorted(kernel)
    assert frechet[0] < 1e-6 * frechet[-1]
    assert precision_recall(reference, features(worse(2.0))).precision < 0.7


def test_convention_collapsed_model_is_precise_and_forgetful(digits):
    # Shuffled, because the two halves of the file were written by different people.
    order = torch.randperm(len(digits), generator=generator(5, "split"))
    features, labels = torch.from_numpy(digits).flatten(1)[order], torch.from_numpy(load_digits().target)[order]
    real, others = features[:900], features[900:]
    one_class = others[labels[900:] == 0]
    honest, collapsed = precision_recall(real, others), precision_recall(real, one_class)
    assert min(honest) > 0.75
    assert collapsed.precision > 0.75 > 0.2 > collapsed.recall
    assert frechet_distance_of_features(one_class, real) > 10 * frechet_distance_of_features(others, real)
