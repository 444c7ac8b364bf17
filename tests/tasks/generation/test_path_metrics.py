"""Rows of path straightness and of the pairs of training, by hand."""

from __future__ import annotations

import pytest
import torch

from flowbench.evaluation import Answers
from flowbench.metrics import PathGeometry, block_geometry, path_geometry
from flowbench.tasks.generation import PathStraightness, TrainingPairs
from flowbench.tasks.generation.paths import Paths, SampledPaths, TransportCost, WassersteinCost
from flowbench.tasks.generation.training_pairs import Pairs

from ...evaluation.known import known


def with_paths(geometry: PathGeometry, cost: WassersteinCost | None = None, space: str = "data") -> Answers:
    paths = SampledPaths(geometry, torch.empty(0), torch.empty(0), space)
    return known(given={Paths(): paths, TransportCost(): cost})


def test_block_paths_by_hand():
    """(0,0) -> (3,4) -> (3,0): lengths 5 and 4, half a unit of time each; the chord is 3."""
    states = torch.tensor([[[0.0, 0.0]], [[3.0, 4.0]], [[3.0, 0.0]]])
    given = with_paths(block_geometry(states), WassersteinCost(4.0, "2048-points"))
    found = {m.metric: m for m in PathStraightness().measure(given)}
    energy = 0.5 * (10.0**2 + 8.0**2)
    assert found["path_energy"].value == pytest.approx(energy)
    assert found["displacement"].value == pytest.approx(9.0)
    assert found["straightness"].value == pytest.approx(energy - 9.0)
    assert found["path_length_ratio"].value == pytest.approx(3.0)
    assert found["npe"].value == pytest.approx((energy - 4.0) / 4.0)
    assert found["npe_curvature"].value == pytest.approx((energy - 9.0) / 4.0)
    assert found["npe_coupling"].value == pytest.approx((9.0 - 4.0) / 4.0)
    assert found["npe"].protocol == "data/1-paths/2048-points-w2-squared=4.0000"
    assert not {"curvature", "one_step_error"} & set(found), "a path with corners has neither"
    assert found["path_energy"].unit == "squared data units"
    given = with_paths(block_geometry(states), space="latent 4x4x4")
    latent = {m.metric: m for m in PathStraightness().measure(given)}
    assert not {"npe", "npe_curvature", "npe_coupling"} & set(latent)
    assert (latent["straightness"].protocol, latent["straightness"].unit) == (
        "latent 4x4x4/1-paths",
        "squared latent units",
    )


def test_paths_of_a_continuous_flow_by_hand():
    """Z_t = t^2 / 2 in one dimension: v = t, a = 1; one Euler step from rest goes nowhere."""
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    geometry = path_geometry((times**2 / 2)[:, None, None], times[:, None, None], times)
    given = with_paths(geometry, WassersteinCost(0.2, "reference"))
    found = {m.metric: m for m in PathStraightness().measure(given)}
    assert found["curvature"].value == pytest.approx(1.0)
    assert found["one_step_error"].value == pytest.approx(0.25)
    assert found["straightness"].value == pytest.approx(1 / 3 - 1 / 4)
    assert found["npe"].value == pytest.approx((1 / 3 - 0.2) / 0.2)
    assert found["npe"].value == pytest.approx(found["npe_curvature"].value + found["npe_coupling"].value)
    assert {found[name].unit for name in ("curvature", "one_step_error")} == {"squared data units"}
    assert found["npe_coupling"].protocol == "data/1-paths/reference-w2-squared=0.2000"
    assert found["npe_coupling"].unit == ""


def test_training_pairs_are_reported_as_the_family_gives_them():
    pairs = {"ess": 0.6, "tilt_source": 0.1, "tilt_target": 0.4, "cost_ratio": 0.7}
    found = TrainingPairs(num_pairs=512).measure(known(given={Pairs(512): pairs}))
    assert {m.metric: m.value for m in found} == pairs
    assert {(m.n, m.protocol, m.unit) for m in found} == {(512, "training-pairs/512", "")}
    with pytest.raises(ValueError, match=r"num_pairs must be a whole number in .*, got 1"):
        TrainingPairs(num_pairs=1)


def test_two_metrics_of_a_class_measure_each_its_own_number_of_pairs():
    few, many = Pairs(16), Pairs(64)
    given = known(given={few: {"ess": 0.9}, many: {"ess": 0.5}})
    rows = [row for num in (16, 64) for row in TrainingPairs(num).measure(given)]
    assert [(row.value, row.n, row.protocol) for row in rows] == [
        (0.9, 16, "training-pairs/16"),
        (0.5, 64, "training-pairs/64"),
    ]
