"""Point metrics and costs, and what all metrics have in common."""

from __future__ import annotations

import itertools
import math

import ot
import pytest
import torch

from flowbench import evaluation
from flowbench.evaluation import (
    ClassAccuracy,
    Cost,
    CostReport,
    DensityCoverage,
    FrechetDistance,
    FrechetInfinity,
    Generated,
    InceptionScore,
    KernelDistance,
    MaximumMeanDiscrepancy,
    MeanNorm,
    Memorization,
    PrecisionRecall,
    Samples,
    SlicedWasserstein2,
    Wasserstein2,
)
from flowbench.evaluation.cost import TrainingCost
from flowbench.evaluation.product_rate import measure_product_rate
from flowbench.evaluation.sampling import samples_of
from flowbench.metrics import IdentityFeatures
from flowbench.tasks.generation import NegativeLogLikelihood, PathStraightness, TrainingPairs

from .known import DIGITS, POINTS, cloud, compared, known, sample_set


def test_point_metrics_against_pot():
    given = known()
    x, y = samples_of(given).shown.numpy().astype(float), given.reference.shown[:60].numpy().astype(float)
    (w2,) = Wasserstein2().measure(given)
    assert w2.value == pytest.approx(math.sqrt(ot.emd2([], [], ot.dist(x, y))), rel=1e-6)
    assert (w2.n, w2.protocol, w2.unit) == (60, "points/val-60/60", "data units")
    (sliced,) = SlicedWasserstein2(num_projections=4000).measure(given)
    assert sliced.value == pytest.approx(ot.sliced_wasserstein_distance(x, y, n_projections=20_000, seed=0), rel=0.02)
    assert SlicedWasserstein2(num_projections=8).measure(given) == SlicedWasserstein2(num_projections=8).measure(given)
    (mmd,) = MaximumMeanDiscrepancy().measure(given)
    same = compared(given.reference, given.reference)
    assert mmd.value > MaximumMeanDiscrepancy().measure(same)[0].value


def test_the_mean_step_is_reported_where_steps_were_counted():
    cost = Cost(parameters=7, train_seconds=1.5, train_flops=2e9, samples_seen=64, peak_memory_mb=9.0, steps=300)
    found = {m.metric: m for m in CostReport().measure(known(given={TrainingCost(): cost}))}
    assert (found["step_milliseconds"].value, found["step_milliseconds"].unit) == (5.0, "ms")


@pytest.mark.parametrize(
    ("flops", "seconds", "rate", "expected"),
    [(6e9, 1.5, 8e9, 0.5), (6e9, 1.5, None, None), (6e9, 0.0, 8e9, None), (0.0, 1.5, 8e9, None)],
)
def test_utilisation_is_the_rate_of_training_over_that_of_products(flops, seconds, rate, expected):
    """6 GFLOP in 1.5 s are half of 8 GFLOP/s; an autoencoder that others share, say, has no operations of its own."""
    cost = Cost(
        parameters=7, train_seconds=seconds, train_flops=flops, samples_seen=64, peak_memory_mb=9.0, steps=300,
        product_rate=rate,
    )  # fmt: skip
    found = {m.metric: (m.value, m.unit) for m in CostReport().measure(known(given={TrainingCost(): cost}))}
    assert found.get("flop_utilisation") == (None if expected is None else (expected, "of product rate"))


def test_the_product_rate_counts_two_operations_for_each_term():
    """By a clock on which every product takes a quarter of a second."""
    ticks = itertools.count(0.0, 0.25)
    assert measure_product_rate(torch.device("cpu"), lambda: next(ticks)) == 8 * 512**3


def test_costs_are_reported_as_given():
    cost = Cost(parameters=7, train_seconds=1.5, train_flops=2e9, samples_seen=64, peak_memory_mb=9.0)
    drawn = Generated(samples_of(known()), network_evaluations=40.0, per_second=3.0)
    given = known(given={TrainingCost(): cost, Samples(): drawn})
    found = {m.metric: m.value for m in CostReport().measure(given)}
    assert found == {
        "parameters": 7,
        "train_flops": 2e9,
        "train_seconds": 1.5,
        "samples_seen": 64,
        "peak_memory": 9.0,
        "samples_per_second": 3.0,
        "network_evaluations": 40.0,
    }


@pytest.mark.parametrize(
    "metric",
    [NegativeLogLikelihood(), PathStraightness(), TrainingPairs(), CostReport()],
    ids=lambda m: type(m).__name__,
)
def test_what_is_not_known_is_not_measured(metric):
    assert metric.measure(known(given={probe: None for probe in metric.probes() if probe != Samples()})) == []


def everything() -> list[evaluation.Metric]:
    featured = [cls("identity") for cls in (FrechetDistance, KernelDistance, PrecisionRecall, DensityCoverage)]
    return [*featured, Wasserstein2(), SlicedWasserstein2(), MaximumMeanDiscrepancy()]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("metric", everything(), ids=lambda m: type(m).__name__)
def test_a_diverged_sample_gives_the_same_rows_without_a_number(metric, bad):
    healthy = known()
    x = samples_of(healthy).shown.clone()
    x[3, 0] = bad
    broken = compared(sample_set(x, POINTS, "generated"), healthy.reference)
    expected = [(m.metric, m.n, m.protocol, m.unit) for m in metric.measure(healthy)]
    found = metric.measure(broken)
    assert [(m.metric, m.n, m.protocol, m.unit) for m in found] == expected
    assert all(math.isnan(m.value) for m in found)


@pytest.mark.parametrize("metric", everything(), ids=lambda m: type(m).__name__)
def test_a_single_point_gives_rows_and_no_failure(metric):
    """A split of the user's own data may be as small as that; the other rows must not be lost."""
    found = metric.measure(known(num=1))
    assert found
    assert all(m.n == 1 and math.isnan(m.value) for m in found)


def test_every_exported_metric_is_tested_here():
    exported = {v for v in vars(evaluation).values() if isinstance(v, type) and issubclass(v, evaluation.Metric)}
    tested = {type(m) for m in everything()} | {CostReport, evaluation.Metric}
    # In files of their own.
    tested |= {FrechetInfinity, InceptionScore, Memorization, MeanNorm, ClassAccuracy}
    tested |= {evaluation.ModeRecovery, evaluation.NearestData}
    tested |= {evaluation.ClassifierTwoSample, evaluation.FrechetRatio, evaluation.MIND}
    assert exported == tested


def test_samples_are_seen_as_they_would_be_in_a_file():
    """On the grid of the grey levels, and without gradients."""
    samples = sample_set(cloud(9, DIGITS, 0).requires_grad_(), DIGITS, "generated")
    assert set(samples.features(IdentityFeatures(64)).unique().tolist()) <= {float(k * 255 // 16) for k in range(17)}
    assert not samples.shown.requires_grad


@pytest.mark.parametrize("metric", [FrechetDistance("identity", 40, 70), KernelDistance("identity", 40, 70)])
def test_a_metric_may_look_at_the_first_few_samples_only(metric):
    whole = known(DIGITS)
    samples = sample_set(samples_of(whole).shown[:40], DIGITS, "generated")
    part = compared(samples, sample_set(whole.reference.shown[:70], DIGITS, "val"))
    (limited,), (cut,) = metric.measure(whole), type(metric)("identity").measure(part)
    assert limited == cut
    assert limited.protocol == "identity/val-70/40"
    # A limit beyond what there is takes what there is.
    assert type(metric)("identity", 999, 999).measure(whole) == type(metric)("identity").measure(whole)
