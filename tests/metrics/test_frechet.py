from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowbench.core.seeds import generator
from flowbench.metrics import (
    FeatureStatistics,
    GaussianStatistics,
    frechet_distance,
    frechet_distance_of_features,
    gaussian_frechet_distance,
)
from tests.ranks import run_ranks


def features(num: int, dim: int, *name: str | int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    draw = generator(7, *name)
    mixing = torch.randn(dim, dim, generator=draw, dtype=torch.float64) / dim**0.5
    return scale * torch.randn(num, dim, generator=draw, dtype=torch.float64) @ mixing + shift


def distance(x: Tensor, y: Tensor) -> float:
    return frechet_distance(FeatureStatistics.from_features(x), FeatureStatistics.from_features(y))


@settings(max_examples=20, deadline=None)
@given(dim=st.integers(1, 12), num=st.integers(20, 60), seed=st.integers(0, 10_000))
def test_equals_scipy_sqrtm(dim, num, seed):
    x, y = features(num, dim, "x", seed), features(num + 7, dim, "y", seed, shift=0.3)
    a, b = x.numpy(), y.numpy()
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    root = np.real(scipy.linalg.sqrtm(cov_a @ cov_b))
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root)
    assert distance(x, y) == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_equals_torch_fidelity():
    from torch_fidelity import metric_fid

    x, y = features(200, 24, "x"), features(150, 24, "y", shift=0.5)
    statistics = [metric_fid.fid_features_to_statistics(f) for f in (x, y)]
    expected = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert distance(x, y) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.floats(0, 4), st.floats(0, 4)), min_size=1))
def test_commuting_gaussians_have_a_closed_form(rows):
    mean_a, mean_b, std_a, std_b = torch.tensor(rows, dtype=torch.float64).T
    expected = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()
    value = gaussian_frechet_distance(mean_a, std_a.square().diag(), mean_b, std_b.square().diag())
    assert value == pytest.approx(float(expected), abs=1e-9)


def test_singular_covariances_are_exact():
    x = features(10, 40, "few")  # rank 9 of 40
    assert distance(x, x) == pytest.approx(0.0, abs=1e-12)
    assert distance(x, x + 2.0) == pytest.approx(40 * 4.0, rel=1e-12)
    assert distance(x, 3 * x) == pytest.approx(
        float(4 * x.mean(0).square().sum() + 4 * torch.cov(x.T).trace()), rel=1e-10
    )


def test_symmetric_rotation_invariant_and_growing_with_noise():
    x, y = features(300, 8, "x"), features(300, 8, "y", shift=0.2)
    rotation = torch.linalg.qr(features(8, 8, "q")).Q
    assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-10)
    assert distance(x @ rotation, y @ rotation) == pytest.approx(distance(x, y), rel=1e-9)
    noise = features(300, 8, "noise")
    values = [distance(x, x + level * noise) for level in (0.0, 0.2, 0.5, 1.0, 2.0)]
    assert values == sorted(values)
    assert values[0] < 1e-12 < values[1]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_batches_merges_and_order_do_not_matter(sizes, random):
    x = features(sum(sizes) + 2, 5, "x")
    order = list(range(len(x)))
    random.shuffle(order)
    parts = x[order].split([*sizes, 2])
    updated = FeatureStatistics(5)
    merged = FeatureStatistics(5)
    for part in parts:
        updated.update(part)
        merged = merged.merge(FeatureStatistics(5).update(part))
    for statistics in (updated, merged, updated.all_reduce()):
        assert statistics.count == len(x)
        torch.testing.assert_close(statistics.mean, x.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(statistics.covariance, torch.cov(x.T), rtol=1e-10, atol=1e-12)


def test_float32_features_are_summed_in_float64():
    x = (features(20_000, 2, "x") + 300).float()
    torch.testing.assert_close(
        FeatureStatistics.from_features(x).covariance, torch.cov(x.double().T), rtol=1e-6, atol=1e-8
    )


@settings(max_examples=30, deadline=None)
@given(dim=st.integers(2, 12), n=st.integers(3, 30), m=st.integers(3, 30), seed=st.integers(0, 999))
def test_routes_agree_on_both_sides_of_full_rank(dim, n, m, seed):
    x, y = features(n, dim, "x", seed), features(m, dim, "y", seed, shift=0.3)
    expected = distance(x, y)
    # Where one side has full rank and the other has not, sums lose half the digits of the smallest eigenvalues.
    assert frechet_distance_of_features(x, y) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance_of_features(x, FeatureStatistics.from_features(y)) == pytest.approx(expected, rel=1e-8)


def test_low_rank_route_knows_the_exact_value():
    x = features(12, 300, "few")
    assert frechet_distance_of_features(x, x) == pytest.approx(0.0, abs=1e-10)
    assert frechet_distance_of_features(x, x + 2.0) == pytest.approx(300 * 4.0, rel=1e-12)
    # Coordinates that never vary, as dead units of a network: singular with N > D.
    y = torch.cat([features(80, 5, "y"), torch.ones(80, 3)], dim=1)
    z = torch.cat([features(90, 5, "z"), torch.ones(90, 3)], dim=1)
    assert frechet_distance_of_features(y, z) == pytest.approx(distance(y[:, :5], z[:, :5]), rel=1e-9)
    assert distance(y, z) == pytest.approx(distance(y[:, :5], z[:, :5]), rel=1e-7)


def test_known_number_of_samples_removes_the_noise_of_singular_covariances():
    few = FeatureStatistics.from_features(features(20, 60, "few") + 5)
    many = FeatureStatistics.from_features(features(500, 60, "many") + 5)
    exact = frechet_distance_of_features(features(20, 60, "few") + 5, many)
    assert frechet_distance(few, many) == pytest.approx(exact, rel=1e-11)
    blind = GaussianStatistics(few.mean, few.covariance)
    # Rounding makes eigenvalues of 1e-16 of those that are zero, and their roots are added.
    assert frechet_distance(blind, many) == pytest.approx(exact, rel=1e-5)


def test_a_root_that_cannot_be_taken_is_one_line():
    """Features whose squares overflow, and a matrix that is no covariance."""
    huge = 1e200 * torch.randn(8, 3, generator=generator(0), dtype=torch.float64)
    with pytest.raises(ValueError, match="covariance of the features overflows"):
        frechet_distance_of_features(huge, torch.rand(8, 3))
    with pytest.raises(ValueError, match=r"overflows|no covariance"):
        frechet_distance(FeatureStatistics.from_features(huge), FeatureStatistics.from_features(torch.rand(8, 3)))
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(ValueError, match="this is no covariance, its eigenvalues go from -1 to 3"):
        gaussian_frechet_distance(torch.zeros(2), indefinite, torch.zeros(2), torch.eye(2))


def test_users_mistakes_cost_one_line():
    one = FeatureStatistics.from_features(torch.ones(1, 3))
    with pytest.raises(ValueError, match="covariance needs at least 2 samples, got 1"):
        frechet_distance(one, one)
    with pytest.raises(ValueError, match="mean needs at least 1"):
        _ = FeatureStatistics(3).mean
    with pytest.raises(ValueError, match="1 of 2 rows with NaN"):
        FeatureStatistics(2).update(torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]))
    with pytest.raises(ValueError, match="2 dimensions, these statistics have 3"):
        FeatureStatistics(3).update(torch.ones(4, 2))
    with pytest.raises(ValueError, match="dimensions differ: 2 and 3"):
        frechet_distance(FeatureStatistics(2), FeatureStatistics(3))
    with pytest.raises(ValueError, match="dimensions differ: 2 and 3"):
        frechet_distance_of_features(torch.rand(4, 2), torch.rand(4, 3))
    with pytest.raises(ValueError, match="a has 1 samples, this metric needs at least 2"):
        frechet_distance_of_features(torch.rand(1, 2), torch.rand(4, 2))
    with pytest.raises(ValueError, match="moments must be"):
        GaussianStatistics(torch.zeros(2), torch.eye(3))


def _worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    local = FeatureStatistics.from_features(ragged()[slice(0, 20) if rank == 0 else slice(20, None)])
    # The local sums stay as they are: a second call counts nobody twice.
    found = [local.all_reduce(), local.all_reduce()][1]
    torch.save({"count": found.count, "sum": found.sum, "outer": found.outer}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def ragged() -> torch.Tensor:
    return torch.randn(37, 3, generator=torch.Generator().manual_seed(9))


def test_two_processes_with_ragged_shares_equal_one(tmp_path):
    run_ranks(_worker, str(tmp_path))
    x = ragged().double()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["count"] == len(x)
        torch.testing.assert_close(found["sum"], x.sum(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["outer"], x.T @ x, rtol=1e-12, atol=1e-12)
