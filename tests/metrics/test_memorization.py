from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.core.seeds import generator
from flowbench.metrics import authenticity, data_copying, memorization, nearest_neighbours


def normal(num, dim, *name):
    return torch.randn(num, dim, generator=generator(13, *name), dtype=torch.float64)


def uniform(num, dim, *name):
    return torch.rand(num, dim, generator=generator(13, *name), dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(m=st.integers(1, 12), n=st.integers(2, 12), dim=st.integers(1, 3), seed=st.integers(0, 999))
def test_authenticity_equals_its_definition_by_loops(m, n, dim, seed):
    generated, train = normal(m, dim, "g", seed).round(decimals=1), normal(n, dim, "t", seed).round(decimals=1)
    count = 0
    for g in generated:
        gaps = [float((g - t).norm()) for t in train]
        nearest = gaps.index(min(gaps))
        own = min(float((train[nearest] - t).norm()) for j, t in enumerate(train) if j != nearest)
        count += min(gaps) > own
    assert authenticity(generated, train) == pytest.approx(count / m, abs=1e-12)


# One minus the probability that nearest neighbours are mutual: the volume of a ball over that of the union of two
# balls at each other's borders (Schilling, 1986, table 1).
@pytest.mark.parametrize(
    ("dim", "expected"), [(1, 1 / 3), (2, 1 - 1 / (4 / 3 + math.sqrt(3) / (2 * math.pi))), (3, 1 - 16 / 27)]
)
def test_fresh_samples_have_the_authenticity_of_theory(dim, expected):
    values = [authenticity(uniform(2000, dim, "g", i), uniform(2000, dim, "t", i)) for i in range(3)]
    assert sum(values) / 3 == pytest.approx(expected, abs=0.025)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_data_copying_is_the_mann_whitney_z(generated, heldout):
    z = data_copying(torch.tensor(generated, dtype=torch.float64), torch.tensor(heldout, dtype=torch.float64))
    if len({*generated, *heldout}) == 1:
        assert z == 0
        return
    expected = scipy.stats.mannwhitneyu(generated, heldout, method="asymptotic", use_continuity=False)
    assert 2 * scipy.stats.norm.sf(abs(z)) == pytest.approx(expected.pvalue, abs=1e-12)
    assert (z > 0) == (expected.statistic > len(generated) * len(heldout) / 2)


def test_fresh_samples_give_a_standard_normal():
    train = normal(300, 3, "t")
    values = [
        data_copying(*(nearest_neighbours(normal(60, 3, side, i), train).distances[:, 0] for side in "gh"))
        for i in range(300)
    ]
    assert scipy.stats.kstest(values, "norm").pvalue > 0.001


def test_convention_copies_fresh_and_far():
    train, heldout, fresh = (normal(500, 4, name) for name in ("t", "h", "f"))
    copies = memorization(train[:200], train, heldout)
    assert copies.authenticity == 0
    assert copies.copying_z < -15
    assert copies.median_ratio == 0
    assert copies.ratios.tolist() == [0.0] * 16
    near = memorization(train[:200] + 0.01 * normal(200, 4, "n"), train, heldout)
    assert near.authenticity < 0.02
    assert near.copying_z < -15
    honest = memorization(fresh, train, heldout)
    assert abs(honest.copying_z) < 3
    assert honest.median_ratio == pytest.approx(1, abs=0.15)
    assert 0.35 < honest.authenticity < 0.55
    far = memorization(5 * fresh, train, heldout)
    assert far.copying_z > 10
    assert far.authenticity > 0.8
    assert far.median_ratio > 2


def test_worst_pairs_are_the_copies():
    train, heldout, generated = normal(300, 4, "t"), normal(100, 4, "h"), normal(80, 4, "g")
    generated[17], generated[3] = train[250], train[8] + 1e-3
    result = memorization(generated, train, heldout, num_worst=5)
    assert result.generated[:2].tolist() == [17, 3]
    assert result.train[:2].tolist() == [250, 8]
    assert result.ratios.tolist() == sorted(result.ratios.tolist())
    assert len(result.ratios) == 5
    assert len(memorization(generated, train, heldout, num_worst=0).train) == 0


def test_duplicates_in_the_training_set():
    train = torch.cat([normal(50, 3, "t"), normal(50, 3, "t")])
    copies = memorization(train[:20], train, normal(50, 3, "h"))
    assert copies.authenticity == 0
    assert copies.ratios.tolist() == [0.0] * 16
    assert memorization(train, train, train[:9]).median_ratio == 1.0
    assert memorization(train + 1, train, train[:9]).median_ratio == math.inf


def test_images_are_flattened_and_users_mistakes_cost_one_line():
    train, heldout, generated = normal(30, 12, "t"), normal(20, 12, "h"), normal(20, 12, "g")
    flat = memorization(generated, train, heldout)
    images = memorization(*(x.view(-1, 3, 2, 2) for x in (generated, train, heldout)))
    assert images[:3] == flat[:3]
    with pytest.raises(ValueError, match="train has 1 samples"):
        authenticity(generated, train[:1])
    with pytest.raises(ValueError, match="queries has 11 dimensions and references has 12"):
        memorization(generated[:, :11], train, heldout)
    with pytest.raises(ValueError, match=r"num_worst must be a whole number in .*, got -1"):
        memorization(generated, train, heldout, num_worst=-1)
    with pytest.raises(ValueError, match="heldout must be at least one distance"):
        data_copying(torch.ones(3), torch.ones(0))
