from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from flowbench.core.seeds import generator
from flowbench.metrics import kernel, kernel_distance, median_bandwidths, mmd_rbf


def normal(num, dim, *name, shift=0.0):
    return torch.randn(num, dim, generator=generator(3, *name), dtype=torch.float64) + shift


def brute(x, y, k):
    within = [sum(k(a, b) for a, b in itertools.permutations(z, 2)) / (len(z) * (len(z) - 1)) for z in (x, y)]
    return sum(within) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


def test_full_set_equals_torch_fidelity_and_brute_force():
    from torch_fidelity import metric_kid

    x, y = normal(60, 9, "x"), normal(60, 9, "y", shift=0.2)
    expected = metric_kid.kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=60, verbose=False)
    value = kernel_distance(x, y)
    assert value.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-10)
    assert value.std is None
    small_x, small_y = x[:6], y[:9]  # unequal sizes
    expected = brute(small_x.tolist(), small_y.tolist(), lambda a, b: (np.dot(a, b) / 9 + 1) ** 3)
    assert kernel_distance(small_x, small_y).mean == pytest.approx(expected, rel=1e-10)


def test_options_change_the_kernel():
    x, y = normal(6, 3, "x"), normal(5, 3, "y")
    expected = brute(x.tolist(), y.tolist(), lambda a, b: (0.7 * np.dot(a, b) + 2) ** 2)
    assert kernel_distance(x, y, degree=2, gamma=0.7, coef=2.0).mean == pytest.approx(expected, rel=1e-10)


def test_subsets_scatter_around_the_full_value_and_repeat():
    x, y = normal(400, 4, "x"), normal(300, 4, "y", shift=0.3)
    draws = [kernel_distance(x, y, subset_size=50, num_subsets=200, generator=generator(0, "kid")) for _ in range(2)]
    assert draws[0] == draws[1]
    assert draws[0].std > 0
    assert abs(draws[0].mean - kernel_distance(x, y).mean) < 4 * draws[0].std / 200**0.5
    whole = kernel_distance(x[:300], y, subset_size=300, num_subsets=3, generator=generator(0, "kid"))
    assert whole.mean == pytest.approx(kernel_distance(x[:300], y).mean, rel=1e-9)
    assert whole.std == pytest.approx(0.0, abs=1e-12)


def test_unbiased_under_the_null():
    values = torch.tensor([kernel_distance(normal(20, 3, "x", i), normal(30, 3, "y", i)).mean for i in range(400)])
    assert abs(values.mean()) < 4 * values.std() / 20
    assert values.min() < 0
    values = torch.tensor([mmd_rbf(normal(20, 2, "x", i), normal(30, 2, "y", i), [1.0]) for i in range(400)])
    assert abs(values.mean()) < 4 * values.std() / 20


def test_rbf_equals_brute_force_and_gaussian_closed_form():
    x, y = normal(7, 2, "x"), normal(9, 2, "y")
    widths = (0.5, 2.0)

    def k(a, b):
        squared = np.sum((np.array(a) - np.array(b)) ** 2)
        return np.mean([np.exp(-squared / (2 * s**2)) for s in widths])

    assert mmd_rbf(x, y, widths) == pytest.approx(brute(x.tolist(), y.tolist(), k), rel=1e-10)
    # N(0, I) against N(m, I): 2 (s^2 / (s^2 + 2))^(d/2) (1 - exp(-|m|^2 / (2 (s^2 + 2)))).
    x, y = normal(3000, 2, "big x"), normal(3000, 2, "big y", shift=1.0)
    assert mmd_rbf(x, y, [1.0]) == pytest.approx(2 / 3 * (1 - np.exp(-2 / 6)), rel=0.05)


def test_chunks_and_order_do_not_matter(monkeypatch):
    x, y = normal(50, 3, "x"), normal(41, 3, "y", shift=0.1)
    full = kernel_distance(x, y).mean, mmd_rbf(x, y)
    monkeypatch.setattr(kernel, "_CHUNK", 7)
    assert (kernel_distance(x, y).mean, mmd_rbf(x, y)) == pytest.approx(full, rel=1e-9)
    assert mmd_rbf(x.flip(0), y.roll(5, 0)) == pytest.approx(full[1], rel=1e-9)


def test_bandwidths_come_from_the_reference_alone():
    y = normal(200, 2, "y")
    median = np.median(np.linalg.norm(y.numpy()[:, None] - y.numpy()[None], axis=-1)[np.triu_indices(200, 1)])
    widths = median_bandwidths(y)
    assert widths[2] == pytest.approx(median, rel=1e-3)
    for x in (normal(80, 2, "x"), 50 * normal(80, 2, "x")):
        assert mmd_rbf(x, y) == pytest.approx(mmd_rbf(x, y, widths), rel=1e-12)
    assert median_bandwidths(y, max_points=50) == median_bandwidths(y[::4])


def test_both_grow_with_distance():
    x, noise = normal(300, 3, "x"), normal(300, 3, "noise")
    for metric in (lambda a, b: kernel_distance(a, b).mean, mmd_rbf):
        values = [metric(x + level * noise, normal(300, 3, "y")) for level in (0.0, 0.7, 1.5, 3.0)]
        assert values == sorted(values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernel_distance(torch.ones(1, 2), torch.ones(5, 2)), "x has 1 samples"),
        (lambda: kernel_distance(torch.ones(5, 2), torch.ones(5, 3)), "2 dimensions and y has 3"),
        (lambda: kernel_distance(torch.ones(5, 2), torch.ones(5, 2), subset_size=3), "pass a generator"),
        (
            lambda: kernel_distance(torch.ones(5, 2), torch.ones(5, 2), subset_size=6, generator=torch.Generator()),
            r"subset_size must be a whole number in \[2, 5\], got 6",
        ),
        (lambda: kernel_distance(torch.ones(5, 2), torch.ones(5, 2), degree=0), "degree"),
        (lambda: mmd_rbf(torch.ones(5, 2), torch.ones(5, 2)), "median distance"),
        (
            lambda: mmd_rbf(torch.ones(5, 2), torch.ones(5, 2), [-1.0]),
            r"bandwidths\[0\] must be a number in \(0, .*, got -1",
        ),
        (lambda: mmd_rbf(torch.full((5, 2), torch.inf), torch.ones(5, 2), [1.0]), "NaN or infinity"),
    ],
)
def test_users_mistakes_cost_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
