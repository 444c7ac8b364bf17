"""Rows of MIND."""

from __future__ import annotations

import math

import ot
import pytest
import torch

from flowbench.core.seeds import generator
from flowbench.evaluation import MIND, Samples
from flowbench.evaluation.sampling import samples_of

from .known import DIGITS, POINTS, cloud, compared, flat, known, sample_set


@pytest.mark.parametrize("spec", [POINTS, DIGITS], ids=["points", "images"])
def test_is_that_of_pot_with_the_same_projections(spec):
    given = known(spec)
    directions = torch.randn(50, spec.num_dims, generator=generator(0, "mind"), dtype=torch.float64)
    directions = (directions / directions.norm(dim=1, keepdim=True)).T.numpy()
    sides = [flat(side.shown, spec) for side in (samples_of(given), given.reference)]
    expected = 3 * spec.num_dims * float(ot.sliced_wasserstein_distance(*sides, projections=directions)) ** 2
    (found,) = MIND("identity", num_projections=50).measure(given)
    assert found.value == pytest.approx(expected, rel=1e-10)
    assert (found.metric, found.n) == ("mind[identity]", 60)
    assert found.protocol == "identity/val-90/60/50-directions"


def test_counts_and_names():
    (found,) = MIND("identity", num_samples=40, num_reference=30).measure(known())
    assert found.protocol == "identity/val-30/40/1000-directions"
    metric = MIND("inception", sweep=False)
    assert [(info.name, info.goal, info.group) for info in metric.declares] == [("mind[inception]", "down", "quality")]
    assert metric.probes() == (Samples.with_features("inception", None),)
    assert (metric.in_sweep, MIND("identity").in_sweep, metric.extractors) == (False, True, ("inception",))


def test_a_diverged_sample_costs_this_row():
    broken = cloud(20, POINTS, 0)
    broken[3, 0] = math.nan
    real = sample_set(cloud(30, POINTS, 1), POINTS, "val")
    (found,) = MIND("identity").measure(compared(sample_set(broken, POINTS, "generated"), real))
    assert math.isnan(found.value)
