"""Rows of the mode metrics: names, protocols and what they are computed from."""

from __future__ import annotations

import math

import pytest
import torch

from flowbench.data import FlowDataModule
from flowbench.evaluation import Answers
from flowbench.evaluation.mode_metrics import ModeRecovery, NearestData, class_means
from flowbench.evaluation.samples import Collector, RealSet
from flowbench.metrics.modes import failure_rate, mode_discrepancy

from .known import compared

ARCS = FlowDataModule("chi_arcs")


def against_test(x: torch.Tensor, data: FlowDataModule = ARCS) -> Answers:
    collector = Collector(data.spec, {}, {}, len(x))
    collector.add(torch.arange(len(x)), x)
    return compared(collector.gathered("generated"), RealSet(data, "test", 1000))


def test_rows_of_points_near_the_data():
    x = ARCS.model_values("val")[:500]
    near, far = NearestData(radius=1 / 30).measure(against_test(x))
    reference = ARCS.model_values("test")[:1000]
    assert (near.metric, near.unit, near.n) == ("average_minimum_distance", "data units", 500)
    assert near.protocol == "points/test-1000/500"
    assert 0 < near.value < 0.02
    assert (far.metric, far.unit) == ("failure_rate", "%")
    assert far.protocol == "points/test-1000/500/radius-0.0333333"
    assert far.value == failure_rate(x, reference, 1 / 30)
    shares, within = ModeRecovery().measure(against_test(x))
    assert (shares.metric, shares.unit) == ("mode_discrepancy", "nats")
    assert shares.protocol == "points/test-1000/500/3-class-means"
    modes = torch.stack([reference[ARCS.split("test").label[:1000] == number].mean(0) for number in range(3)])
    assert shares.value == pytest.approx(mode_discrepancy(x, reference, modes))
    assert within.metric == "mode_matched_w2"
    assert 0 < within.value < 0.5


def test_modes_lie_on_the_arcs():
    modes = class_means(against_test(ARCS.model_values("val")))
    angle = torch.remainder(torch.atan2(modes[:, 1], modes[:, 0]), 2 * torch.pi)
    torch.testing.assert_close(angle, torch.tensor([4.4956, 5.9167, 1.1018]), atol=0.01, rtol=0)


def test_samples_that_diverged_have_no_value():
    x = ARCS.model_values("val")[:50].clone()
    x[3] = math.nan
    rows = [*NearestData(0.1).measure(against_test(x)), *ModeRecovery().measure(against_test(x))]
    assert len(rows) == 4
    assert all(math.isnan(row.value) for row in rows)


def test_data_without_labels_have_no_modes():
    data = FlowDataModule("checkerboard")
    assert ModeRecovery().measure(against_test(data.model_values("val")[:20], data)) == []


def test_a_radius_is_positive():
    with pytest.raises(ValueError, match=r"radius must be a number in .*, got 0"):
        NearestData(0.0)
