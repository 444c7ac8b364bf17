"""Rows of FDr: each feature space, and their mean."""

from __future__ import annotations

import math

import pytest
import torch

from flowbench.data import FlowDataModule
from flowbench.evaluation import Answers, Evaluator, FrechetDistance, FrechetRatio, Samples
from flowbench.evaluation.declared import declare
from flowbench.evaluation.override import SamplerOverride
from flowbench.evaluation.samples import Collector
from flowbench.metrics import FeatureExtractor, IdentityFeatures
from flowbench.metrics.features import NormFeatures
from flowbench.tasks.generation.references import Floor

from .known import POINTS, cloud, compared

SPACES = {"identity": IdentityFeatures(2), "norm": NormFeatures()}


def collected(x: torch.Tensor, name: str):
    spaces: dict[str, FeatureExtractor] = SPACES
    collector = Collector(POINTS, spaces, dict.fromkeys(spaces, len(x)), len(x))
    collector.add(torch.arange(len(x)), x)
    return collector.gathered(name)


def known(shift: float = 0.3, num: int = 60, num_held_out: int = 50) -> Answers:
    """Samples, 90 reference points and held-out points, with features in both spaces."""
    sides = [collected(cloud(n, POINTS, seed), name) for n, seed, name in ((90, 1, "train"), (num_held_out, 2, "test"))]
    return compared(collected(cloud(num, POINTS, 0, shift), "generated"), sides[0], SPACES, held_out=sides[1])


def by_name(metric, answers):
    return {m.metric: m for m in metric.measure(answers)}


def test_is_the_distance_over_that_of_as_many_held_out_samples():
    given = known()
    found = by_name(FrechetRatio(["identity", "norm"]), given)
    for name in ("identity", "norm"):
        (own,) = FrechetDistance(name, num_samples=50).measure(given)
        (floor,) = FrechetDistance(name).measure(compared(given.held_out, given.reference, SPACES))
        assert found[f"fdr[{name}]"].value == pytest.approx(own.value / floor.value, rel=1e-9)
    assert found["fdr"].value == pytest.approx((found["fdr[identity]"].value + found["fdr[norm]"].value) / 2)
    assert found["fdr[identity]"].protocol == "identity/train-90/50-over-test-50"
    assert found["fdr"].protocol.endswith("/train-90/50-over-test-50")
    assert {m.n for m in found.values()} == {50}
    few = by_name(FrechetRatio(["identity"], num_samples=20, num_reference=30), given)
    assert few["fdr"].protocol == "identity/train-30/20-over-test-20"


def test_held_out_data_have_one_and_fresh_data_have_it_within_the_interval():
    metric = FrechetRatio(["identity", "norm"], interval=True)
    given = known()
    same = by_name(metric, compared(given.held_out, given.reference, SPACES, held_out=given.held_out))
    assert [same[name].value for name in ("fdr[identity]", "fdr[norm]", "fdr")] == [1.0, 1.0, 1.0]
    fresh = by_name(metric, known(shift=0.0))
    for space in ("[identity]", "[norm]", ""):
        low, value, high = (fresh[f"{name}{space}"].value for name in ("fdr_low", "fdr", "fdr_high"))
        assert low < value < high
        assert low < 1 < high
        assert fresh[f"fdr_low{space}"].protocol == fresh[f"fdr{space}"].protocol + "/jackknife-95"


def test_the_floor_of_real_data_has_one():
    data = FlowDataModule("eight_gaussians", batch_size=8)
    metric = FrechetRatio(["auto", "norm"])
    evaluator = Evaluator(
        {"fdr": metric}, references={"floor": Floor()}, num_samples=70, reference="test", held_out="val"
    )
    rows = {row.metric: row.value for row in evaluator.reference_rows(data)}
    assert rows == {"fdr[identity]": 1.0, "fdr[norm]": 1.0, "fdr": 1.0}
    assert declare(evaluator, data, None)["floor"].main == frozenset(rows)


def test_names_probes_and_sweeps():
    metric = FrechetRatio(["auto", "norm", "auto"], num_samples=40, interval=True, sweep=False)
    assert metric.extractors == ("auto", "norm")
    assert metric.with_features({"auto": "identity"}).extractors == ("identity", "norm")
    assert metric.with_features({"auto": "norm"}).extractors == ("norm",)
    assert metric.probes() == (Samples(frozenset({("auto", 40), ("norm", 40)})),)
    assert metric.in_sweep is False
    assert {info.goal for info in metric.declares if "_" not in info.name} == {"down"}
    assert {info.goal for info in metric.declares if "_" in info.name} == {"none"}
    given = known()
    swept = Answers(
        POINTS, given.reference, given.held_out, SPACES, {Samples().key(): given[Samples()]}, num_samples=60,
        override=SamplerOverride(network_evaluations=2),
    )  # fmt: skip
    found = by_name(FrechetRatio(["norm"], interval=True), swept)
    assert set(found) == {"fdr[norm]", "fdr"}


def test_a_diverged_sample_costs_these_rows():
    broken = cloud(20, POINTS, 0)
    broken[3, 0] = math.nan
    given = known()
    found = by_name(FrechetRatio(["norm"]), compared(collected(broken, "generated"), given.reference, SPACES))
    assert all(math.isnan(m.value) for m in found.values())


@pytest.mark.parametrize("features", ["inception", []])
def test_a_list_of_extractors_is_needed(features):
    with pytest.raises(ValueError, match=r"features must be a list of extractors, got .*: write \["):
        FrechetRatio(features)
