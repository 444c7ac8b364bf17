"""Conditional transport: noise stays independent of labels; the weight is the order statistic it says it is."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from flowbench.core.seeds import generator
from flowbench.flows import OptimalTransportCoupling, squared_distances
from flowbench.flows.coupling.conditional import ConditionalCoupling, condition_weight


def batch(seed: int, num: int, num_classes: int = 3):
    """Standard normal noise, data whose class decides where it lies, and the class."""
    rng = generator(seed, "batch")
    label = torch.randint(num_classes, (num,), generator=rng)
    x0 = torch.randn(num, 2, generator=rng, dtype=torch.float64)
    x1 = torch.randn(num, 2, generator=rng, dtype=torch.float64) + 4 * (label[:, None] - 1.0)
    return x0, x1, label


@given(seed=st.integers(0, 999), num=st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_labels_are_matched_best_within_their_class(seed: int, num: int):
    x0, x1, label = batch(seed, num)
    index = ConditionalCoupling()(x0, x1, generator(0), label)
    assert torch.equal(label[index], label)
    assert sorted(index.tolist()) == list(range(num))
    cost = squared_distances(x0, x1)
    best = min(
        cost[list(p), range(num)].sum().item() for p in permutations(range(num)) if (label[list(p)] == label).all()
    )
    assert cost[index, torch.arange(num)].sum().item() == pytest.approx(best, rel=1e-12)


def test_given_its_label_the_source_stays_standard_normal():
    drawn: dict[str, list[torch.Tensor]] = {"conditional": [], "plain": []}
    for seed in range(40):
        x0, x1, label = batch(seed, 64)
        for name, rule in (("conditional", ConditionalCoupling()), ("plain", OptimalTransportCoupling())):
            drawn[name].append(x0[rule(x0, x1, generator(0), label)][label == 0, 0])
    assert kstest(torch.cat(drawn["conditional"]).numpy(), "norm").pvalue > 0.01
    assert kstest(torch.cat(drawn["plain"]).numpy(), "norm").pvalue < 1e-20


def test_real_conditions_run_from_plain_to_matched():
    x0, x1, label = batch(0, 40)
    condition = torch.nn.functional.one_hot(label, 3).double()
    plain = OptimalTransportCoupling()(x0, x1, generator(0))
    assert torch.equal(ConditionalCoupling(weight=0.0)(x0, x1, generator(0), condition), plain)
    for distance in ("cosine", "squared"):
        held = ConditionalCoupling(weight=1e6, distance=distance)(x0, x1, generator(0), condition)
        assert torch.equal(held, ConditionalCoupling()(x0, x1, generator(0), label))
    changed = [
        (label[ConditionalCoupling(weight=w)(x0, x1, generator(0), condition)] != label).sum().item()
        for w in (0.0, 5.0, 50.0)
    ]
    assert changed[0] > changed[1] > changed[2]


@given(seed=st.integers(0, 999), ratio=st.sampled_from([0.0, 0.01, 0.1, 0.3]))
@settings(max_examples=25, deadline=None)
def test_the_weight_is_the_smallest_that_meets_the_ratio(seed: int, ratio: float):
    x0, x1, _ = batch(seed, 12)
    condition = torch.randn(12, 3, generator=generator(seed, "condition"), dtype=torch.float64)
    cost, price = squared_distances(x0, x1), torch.cdist(condition, condition)

    def share(weight: float) -> float:
        total = cost + weight * price
        return (total < total.diagonal() - 1e-9).double().sum().item() / (12 * 11)

    weight = condition_weight(cost, price, ratio)
    assert share(weight) <= ratio
    assert weight == 0 or share(weight * (1 - 1e-6) - 1e-7) > ratio


def test_target_ratio_sets_the_weight_of_the_batch():
    x0, x1, _ = batch(1, 30)
    condition = torch.randn(30, 4, generator=generator(2), dtype=torch.float64)
    price = torch.cdist(condition, condition).square()
    weight = condition_weight(squared_distances(x0, x1), price, 0.05)
    tuned = ConditionalCoupling(target_ratio=0.05, distance="squared")(x0, x1, generator(0), condition)
    given_weight = ConditionalCoupling(weight=weight, distance="squared")(x0, x1, generator(0), condition)
    assert weight > 0
    assert torch.equal(tuned, given_weight)


def test_equal_conditions_leave_plain_transport():
    x0, x1, _ = batch(3, 10)
    plain = OptimalTransportCoupling()(x0, x1, generator(0))
    for condition in (torch.ones(10, 4), torch.zeros(10, 4), torch.ones(10)):
        assert torch.equal(ConditionalCoupling()(x0, x1, generator(0), condition), plain)
    assert torch.equal(ConditionalCoupling()(x0, x1, generator(0), torch.ones(10, dtype=torch.int64)), plain)


@pytest.mark.parametrize(
    ("condition", "match"),
    [
        (None, "needs the conditions"),
        (torch.zeros(3, dtype=torch.int64), "one condition and one source point per data point"),
        (torch.zeros(4, 2, dtype=torch.int64), "labels of shape"),
        (torch.full((4, 2), float("nan")), "non-finite condition"),
    ],
)
def test_bad_conditions_are_refused(condition, match: str):
    x0, x1, _ = batch(0, 4)
    with pytest.raises(ValueError, match=match) as error:
        ConditionalCoupling()(x0, x1, generator(0), condition)
    assert "\n" not in str(error.value)


def test_unequal_batches_are_refused():
    x0, x1, label = batch(0, 4)
    with pytest.raises(ValueError, match="one source point per data point"):
        ConditionalCoupling()(x0[:3], x1, generator(0), label)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weight": -1.0}, "weight must be a number in"),
        ({"target_ratio": 1.0}, "target_ratio must be a number in"),
        ({"weight": 1.0, "target_ratio": 0.1}, "not both"),
        ({"distance": "norm"}, "distance must be"),
    ],
)
def test_bad_options_are_refused(options, match: str):
    with pytest.raises(ValueError, match=match):
        ConditionalCoupling(**options)
