from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.metrics import density_coverage, precision_recall
from flowbench.seeds import generator
from flowbench.torchvision_guard import ensure_importable


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
    ensure_importable()
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
    with pytest.raises(ValueError, match="k must be at least 1"):
        metric(torch.rand(9, 2), torch.rand(9, 2), 0)
    with pytest.raises(ValueError, match="real has 2 dimensions and generated has 3"):
        metric(torch.rand(9, 2), torch.rand(9, 3))
