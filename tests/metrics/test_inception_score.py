from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.core.seeds import generator
from flowbench.metrics import inception_score


@settings(max_examples=20, deadline=None)
@given(num=st.integers(10, 60), classes=st.integers(2, 12), splits=st.integers(1, 10), scale=st.floats(0, 8))
def test_equals_torch_fidelity(num, classes, splits, scale):
    from torch_fidelity import metric_isc

    logits = scale * torch.randn(num, classes, generator=generator(0, "logits", num, classes))
    expected = metric_isc.isc_features_to_metric(logits, splits=splits, shuffle=False)
    value = inception_score(logits, splits)
    assert value.mean == pytest.approx(expected["inception_score_mean"], rel=1e-10)
    assert value.std == pytest.approx(expected["inception_score_std"], rel=1e-8, abs=1e-8)


def test_known_values():
    sure = 1000.0 * torch.eye(10).repeat(20, 1)  # each class once in ten, without doubt
    assert inception_score(sure, splits=4) == pytest.approx((10.0, 0.0))
    assert inception_score(sure[:1].expand(50, 10)) == pytest.approx((1.0, 0.0))  # one class only
    assert inception_score(torch.zeros(50, 10)) == pytest.approx((1.0, 0.0))  # no class recognised


def test_shuffling_mends_sorted_samples_and_repeats():
    sorted_by_class = 1000.0 * torch.eye(10).repeat_interleave(50, dim=0)
    assert inception_score(sorted_by_class).mean == pytest.approx(1.0)
    shuffled = [inception_score(sorted_by_class, generator=generator(0, "split")) for _ in range(2)]
    assert shuffled[0] == shuffled[1]
    assert shuffled[0].mean > 8


def test_users_mistakes_cost_one_line():
    with pytest.raises(ValueError, match=r"splits must be a whole number in \[1, 3\], got 4"):
        inception_score(torch.zeros(3, 5), splits=4)
    with pytest.raises(ValueError, match=r"shape \(N, K\), got \(3,\)"):
        inception_score(torch.zeros(3))
