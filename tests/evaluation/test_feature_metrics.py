"""Rows of the other metrics of features: kernels, neighbours, norms and the inception score."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from flowbench.data import DataSpec
from flowbench.evaluation import (
    Answers,
    DensityCoverage,
    InceptionScore,
    KernelDistance,
    MeanNorm,
    PrecisionRecall,
    SampleSet,
)
from flowbench.evaluation.samples import Collector
from flowbench.evaluation.sampling import samples_of
from flowbench.metrics import IdentityFeatures
from flowbench.metrics.features import NormFeatures

from .known import DIGITS, POINTS, cloud, compared, flat, known


def test_kid_is_the_mean_over_all_pairs():
    given = known()
    (found,) = KernelDistance("identity").measure(given)
    x, y = samples_of(given).shown.double(), given.reference.shown.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / 2 + 1) ** 3

    n, m = len(x), len(y)
    within = (kernel(x, x).sum() - kernel(x, x).trace()) / (n * (n - 1))
    within += (kernel(y, y).sum() - kernel(y, y).trace()) / (m * (m - 1))
    assert found.value == pytest.approx(float(within - 2 * kernel(x, y).mean()), rel=1e-4)


@pytest.mark.parametrize("sizes", [(60, 90), (90, 60)])
def test_neighbour_metrics_take_equal_numbers_and_say_so(sizes):
    given = known(num=sizes[0], num_real=sizes[1])
    generated, real = samples_of(given).shown[:60].double(), given.reference.shown[:60].double()

    def covered(points: Tensor, centres: Tensor, k: int) -> Tensor:
        radius = torch.cdist(centres, centres).sort(1).values[:, k]
        return torch.cdist(points, centres) <= radius

    results = {
        m.metric: m
        for metric in (PrecisionRecall("identity"), DensityCoverage("identity"))
        for m in metric.measure(given)
    }
    expected = {
        "precision": covered(generated, real, 3).any(1).double().mean(),
        "recall": covered(real, generated, 3).any(1).double().mean(),
        "density": covered(generated, real, 5).double().sum() / (5 * 60),
        "coverage": covered(generated, real, 5).any(0).double().mean(),
    }
    for name, value in expected.items():
        found = results[f"{name}[identity]"]
        assert found.value == pytest.approx(float(value), abs=1e-12), name
        assert found.n == 60
        assert found.protocol == f"identity/val-60/60/k{3 if name in ('precision', 'recall') else 5}"


@pytest.mark.parametrize(("metric", "k"), [(PrecisionRecall("identity"), 3), (DensityCoverage("identity"), 5)])
def test_balls_need_more_points_than_neighbours(metric, k):
    assert all(math.isnan(m.value) for m in metric.measure(known(num=k)))
    assert all(math.isfinite(m.value) for m in metric.measure(known(num=k + 1)))


def with_norms(spec: DataSpec, scale: float, bad: float | None = None) -> Answers:
    real = cloud(70, spec, 1)
    drawn = scale * cloud(50, spec, 2)
    if bad is not None:
        drawn[7].fill_(bad)
    norm = {"norm": NormFeatures()}
    sides = []
    for name, x in (("generated", drawn), ("val", real)):
        collector = Collector(spec, norm, {"norm": len(x)}, len(x))
        collector.add(torch.arange(len(x)), x)
        sides.append(collector.gathered(name))
    return compared(*sides, norm)


@pytest.mark.parametrize("spec", [POINTS, DIGITS], ids=["points", "images"])
def test_mean_norms_by_numpy(spec):
    given = with_norms(spec, 0.5)
    (found,) = MeanNorm().measure(given)

    def mean(part: SampleSet) -> float:
        x = flat(part.shown, spec)
        x = x / 127.5 - 1 if spec is DIGITS else x
        return float((np.linalg.norm(x, axis=1) / math.sqrt(x.shape[1])).mean())

    assert found.value == pytest.approx(mean(samples_of(given)) / mean(given.reference), rel=1e-6)
    assert 0.4 < found.value < 0.6
    assert (found.metric, found.n, found.protocol, found.unit) == ("mean_norm_ratio", 50, "norm/val-70/50", "")
    (same,) = MeanNorm().measure(compared(given.reference, given.reference, given.extractors))
    assert same.value == 1.0


def test_a_diverged_sample_has_no_norm():
    (found,) = MeanNorm().measure(with_norms(POINTS, 1.0, math.nan))
    assert math.isnan(found.value)


class Logits(IdentityFeatures):
    """Two pixels as the logits of two classes."""

    def __init__(self) -> None:
        super().__init__(64, "inception-logits")
        self.dimension = 2

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().flatten(1)[:, :2]


def test_inception_score_of_two_sure_classes_is_two():
    spec, network = DIGITS, Logits()
    x = torch.full((40, 1, 8, 8), -1.0)
    x[::2, 0, 0, 0] = 0.999
    x[1::2, 0, 0, 1] = 0.999
    collector = Collector(spec, {network.name: network}, {network.name: 40}, 1)
    collector.add(torch.arange(40), x)
    given = compared(collector.gathered("generated"), collector.gathered("train"), {network.name: network})
    (found,) = InceptionScore(splits=4).measure(given)
    assert found.value == pytest.approx(2.0, rel=1e-6)
    assert (found.metric, found.protocol) == ("inception_score", "inception-logits/40/4-splits")
