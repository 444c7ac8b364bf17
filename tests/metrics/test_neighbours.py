from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.core.seeds import generator
from flowbench.metrics import density_coverage, nearest_neighbours, precision_recall
from flowbench.metrics.pairwise import distance_blocks, exact_distances


def normal(num, dim, *name):
    return torch.randn(num, dim, generator=generator(5, *name), dtype=torch.float64)


def radius(points, i, k):
    return sorted(np.linalg.norm(points[i] - p) for j, p in enumerate(points) if j != i)[k - 1]


def brute(real, generated, k):
    """All four numbers by loops over single pairs."""
    ball = [radius(real, i, k) for i in range(len(real))]
    fake_ball = [radius(generated, j, k) for j in range(len(generated))]
    gap = [[np.linalg.norm(r - g) for g in generated] for r in real]
    n, m = len(real), len(generated)
    return (
        sum(any(gap[i][j] <= ball[i] for i in range(n)) for j in range(m)) / m,
        sum(any(gap[i][j] <= fake_ball[j] for j in range(m)) for i in range(n)) / n,
        sum(gap[i][j] < ball[i] for i in range(n) for j in range(m)) / (k * m),
        sum(any(gap[i][j] < ball[i] for j in range(m)) for i in range(n)) / n,
    )


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(5, 14),
    m=st.integers(5, 14),
    dim=st.integers(1, 4),
    k=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_equals_brute_force(n, m, dim, k, seed):
    real, generated = normal(n, dim, "r", seed), 0.8 * normal(m, dim, "g", seed)
    value = (*precision_recall(real, generated, k), *density_coverage(real, generated, k))
    assert value == pytest.approx(brute(real.numpy(), generated.numpy(), k), rel=1e-12)


def test_equals_torch_fidelity():
    from torch_fidelity import metric_prc

    real, generated = normal(150, 6, "r"), 0.7 * normal(120, 6, "g") + 0.3
    expected = metric_prc.prc_features_to_metric(
        generated, real, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False
    )
    value = precision_recall(real, generated)
    assert value.precision == pytest.approx(expected["precision"])
    assert value.recall == pytest.approx(expected["recall"])
    assert 0.1 < value.recall < value.precision < 1


def test_convention_collapsed_model_is_precise_and_forgetful():
    real = normal(300, 2, "r")
    collapsed = real[:1] * 0.5 + 0.01 * normal(200, 2, "g")
    pr, dc = precision_recall(real, collapsed), density_coverage(real, collapsed)
    assert pr.precision > 0.95
    assert pr.recall < 0.05
    assert dc.density > 0.5
    assert dc.coverage < 0.1
    copies = real[:1].expand(50, 2)  # fully collapsed onto a real sample: balls of radius 0
    assert precision_recall(real, copies) == (1.0, 1 / 300)


def test_balls_of_density_are_open():
    # A copy of the real samples: each ball holds its centre and k - 1 neighbours, not the one on its border.
    real = normal(60, 3, "r")
    assert density_coverage(real, real) == pytest.approx((1.0, 1.0), rel=1e-12)


def test_spread_model_covers_but_is_not_precise():
    real, wide = normal(300, 2, "r"), 6 * normal(300, 2, "g")
    assert precision_recall(real, wide).recall > 0.8 > 0.4 > precision_recall(real, wide).precision
    assert density_coverage(real, wide).density < 0.3


def test_equal_distributions_and_far_apart():
    real, same = normal(1500, 3, "r"), normal(1500, 3, "g")
    value = density_coverage(real, same)
    assert value.density == pytest.approx(1.0, abs=0.06)
    # Expected coverage for equal sizes N: 1 - C(2N - 1 - k, N) / C(2N - 1, N), about 1 - 2^-5.
    assert value.coverage == pytest.approx(1 - 2**-5, abs=0.02)
    assert precision_recall(real, same + 100) == (0.0, 0.0)
    assert density_coverage(real, same + 100) == (0.0, 0.0)


def test_chunk_order_scale_and_rotation_do_not_matter():
    real, generated = normal(83, 3, "r"), normal(59, 3, "g")
    pr, dc = precision_recall(real, generated), density_coverage(real, generated)
    shuffled = torch.randperm(83, generator=generator(0, "p"))
    assert precision_recall(real[shuffled], generated, chunk_size=10) == pytest.approx(pr)
    assert density_coverage(real[shuffled], generated.flip(0), chunk_size=7) == pytest.approx(dc)
    rotation = 3 * torch.linalg.qr(normal(3, 3, "q")).Q
    assert density_coverage(real @ rotation + 1, generated @ rotation + 1) == pytest.approx(dc)


def test_images_are_flattened():
    real, generated = normal(20, 12, "r"), normal(20, 12, "g")
    assert precision_recall(real.view(20, 3, 2, 2), generated) == precision_recall(real, generated)


@pytest.mark.parametrize("metric", [precision_recall, density_coverage])
def test_users_mistakes_cost_one_line(metric):
    with pytest.raises(ValueError, match="generated has 4 samples, this metric needs at least 5"):
        metric(torch.rand(9, 2), torch.rand(4, 2), 4)
    with pytest.raises(ValueError, match=r"k must be a whole number in .*, got 0"):
        metric(torch.rand(9, 2), torch.rand(9, 2), 0)
    with pytest.raises(ValueError, match="real has 2 dimensions and generated has 3"):
        metric(torch.rand(9, 2), torch.rand(9, 3))


def differences(x, y):
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


@pytest.mark.parametrize("dim", [1, 7, 64, 500])
def test_exact_pairs_are_bit_for_bit_those_of_the_full_matrix(dim):
    x, y = normal(40, dim, "x"), normal(30, dim, "y")
    full = differences(x, y)
    row, column = torch.ones(40, 30).nonzero(as_tuple=True)
    assert torch.equal(exact_distances(x, y, row, column), full.flatten())
    assert torch.equal(exact_distances(y, x, column, row), full.flatten())
    assert torch.equal(full[:1, :1], differences(x[:1], y[:1]))


def coarse(draw, num, dim):
    """Few distinct values: points that coincide, distances that tie; far from the origin."""
    offset = draw(st.sampled_from([0.0, 1.0, 1e6]))
    step = draw(st.sampled_from([1.0, 0.1, 1e-7]))
    values = draw(st.lists(st.integers(0, 3), min_size=num * dim, max_size=num * dim))
    return torch.tensor(values, dtype=torch.float64).view(num, dim) * step + offset


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 25), st.integers(6, 25), st.integers(1, 5), st.integers(1, 6))
def test_decisions_equal_those_of_differences(data, n, m, dim, k):
    x, y = coarse(data.draw, n, dim), coarse(data.draw, m, dim)
    full = differences(x, y)
    radii = full[0][torch.arange(m) % m]  # radii that some distances hit exactly
    per_row = full.kthvalue(k, dim=1).values
    (block,) = distance_blocks(x, y)
    for closed, compare in ((True, torch.le), (False, torch.lt)):
        assert torch.equal(block.within_points(radii, closed), compare(full, radii))
        assert torch.equal(block.within_rows(per_row, closed), compare(full, per_row[:, None]))
    distances, order = full.sort(dim=1, stable=True)
    found = nearest_neighbours(x, y, k, chunk_size=7)
    assert torch.equal(found.distances, distances[:, :k])
    assert torch.equal(found.indices, order[:, :k])


@pytest.mark.parametrize("scale", [1e-160, 1e-3, 1e3, 1e160, 1e200])
def test_decisions_hold_where_squares_underflow_or_overflow(scale):
    x, y = normal(20, 5, "x") * scale, normal(30, 5, "y") * scale
    y[:5] = x[:5]
    full = differences(x, y)
    (block,) = distance_blocks(x, y)
    radii = full[3]
    assert torch.equal(block.within_points(radii, closed=True), full <= radii)
    assert torch.equal(block.nearest(3).distances, full.sort(dim=1).values[:, :3])


def test_one_far_outlier_and_wide_float32_features():
    x = torch.relu(normal(300, 512, "x") + 0.3).float().double()
    y = torch.relu(normal(200, 512, "y") + 0.3).float().double()
    x[0] *= 1e9
    y[5:10] = x[5:10]
    full = differences(y, x)
    found = nearest_neighbours(y, x, 2)
    assert torch.equal(found.distances, full.sort(dim=1).values[:, :2])
    (block,) = distance_blocks(y, x)
    assert torch.equal(block.within_points(full[7], closed=True), full <= full[7])


def test_neighbours_of_slices_of_a_memory_map(tmp_path, monkeypatch):
    monkeypatch.setitem(nearest_neighbours.__globals__, "_REFERENCE_CHUNK", 13)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 4, (50, 1, 2, 2), dtype=np.uint8))
    references = torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="c"))
    queries = references[20:40].clone()
    found = nearest_neighbours(queries, references, k=20)
    distances, order = differences(queries.flatten(1).double(), references.flatten(1).double()).sort(dim=1, stable=True)
    assert torch.equal(found.distances, distances[:, :20])
    assert torch.equal(found.indices, order[:, :20])
    with pytest.raises(ValueError, match=r"k must be a whole number in \[1, 50\], got 51"):
        nearest_neighbours(queries, references, k=51)
