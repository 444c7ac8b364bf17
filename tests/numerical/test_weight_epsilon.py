"""Rules for the temperature against a scan by NumPy, closed forms and scaling laws."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.core.seeds import generator
from flowbench.flows import GibbsWeight
from flowbench.flows.weight.epsilon import EffectiveSampleEpsilon, ElbowEpsilon

kinds = pytest.mark.parametrize("cost", ["norm", "squared"])


def points(seed: int, num: int = 200, dim: int = 3):
    rng = generator(seed, "points")
    return torch.randn(num, dim, generator=rng), 1 + 1.5 * torch.randn(num, dim, generator=rng)


def rng():
    return generator(0, "fit")


@kinds
def test_the_elbow_is_the_point_farthest_below_the_chord(cost):
    x0, x1 = (x.double().numpy() for x in points(0))
    distance = np.sqrt(((x0[:, None] - x1) ** 2).sum(-1))
    c = distance if cost == "norm" else distance**2
    kappas = np.geomspace(0.02, 20, 31)
    curve = []
    for kappa in kappas:
        w = np.exp(-(c - c.min()) / (kappa * math.sqrt(3)))
        tilt = max(m.var() / m.mean() ** 2 for m in (w.mean(0), w.mean(1)))
        curve.append(tilt / (1 + tilt))
    u, y = np.log(kappas), np.array(curve)
    # Distance of a point to the line through the ends, after both axes are scaled to one.
    u, y = (u - u[0]) / (u[-1] - u[0]), (y - y[-1]) / (y[0] - y[-1])
    expected = kappas[np.argmax((1 - u - y) / math.sqrt(2))] * math.sqrt(3)
    rule = ElbowEpsilon(num_kappas=31, kappa_min=0.02, kappa_max=20)
    x0, x1 = points(0)
    assert rule.choose(x0, x1, cost, rng()) == pytest.approx(expected, rel=1e-5)


def test_the_elbow_keeps_most_of_the_sample_and_most_of_the_marginals():
    """What the rule is for, on Gaussians, on a shifted ring and in high dimension."""
    noise = generator(1, "noise")
    angle = 2 * math.pi * torch.rand(500, generator=noise)
    ring = 5 * torch.stack([angle.cos(), angle.sin()], 1) + 2.5
    images = torch.randn(400, 768, generator=noise) * 0.5 * torch.exp(0.25 * torch.randn(400, 1, generator=noise))
    for data in (points(0)[1], ring, images):
        source = torch.randn(400, data.shape[1], generator=noise)
        weight = GibbsWeight(epsilon="elbow")
        weight.fit(source, data, rng(), True)
        result = weight(source, data[:400] if len(data) >= 400 else data.repeat(2, 1)[:400])
        found = result.diagnostics()
        assert 0.4 < found["ess"] < 0.99
        assert max(found["tilt_source"], found["tilt_target"]) < 0.5


@given(factor=st.floats(0.2, 5))
@settings(max_examples=10, deadline=None)
def test_rules_follow_the_scale_of_the_data(factor):
    """Points scaled by s and kappas scaled by s: epsilon scales by s, for the norm; by s^2 for the square."""
    x0, x1 = points(2, 100)
    scaled = x0 * factor, x1 * factor
    elbow = ElbowEpsilon(15, 0.05, 10).choose(x0, x1, "norm", rng())
    wide = ElbowEpsilon(15, 0.05 * factor, 10 * factor).choose(*scaled, "norm", rng())
    assert wide == pytest.approx(factor * elbow, rel=1e-4)
    for cost, power in (("norm", 1), ("squared", 2)):
        rule = EffectiveSampleEpsilon(0.5)
        expected = factor**power * rule.choose(x0, x1, cost, rng())
        assert rule.choose(*scaled, cost, rng()) == pytest.approx(expected, rel=1e-4)


@kinds
@given(share=st.floats(0.05, 0.95), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_the_effective_sample_is_the_wanted_one(cost, share, seed):
    x0, x1 = points(seed, 50)
    epsilon = EffectiveSampleEpsilon(share).choose(x0, x1, cost, rng())
    distance = torch.cdist(x0.double(), x1.double()).numpy()
    w = np.exp(-(distance if cost == "norm" else distance**2) / epsilon)
    assert w.sum() ** 2 / (w.size * (w**2).sum()) == pytest.approx(share, rel=1e-4)


def test_a_gaussian_pair_keeps_what_the_closed_form_says():
    """Squared cost, x - y ~ N(0, s^2): ESS/B = sqrt(1 + 4 s^2 / eps) / (1 + 2 s^2 / eps); s^2 = 2, eps = 3."""
    expected = math.sqrt(1 + 8 / 3) / (1 + 4 / 3)
    x = torch.special.ndtri((torch.arange(500, dtype=torch.float64) + 0.5) / 500)[:, None]
    assert EffectiveSampleEpsilon(expected).choose(x, x, "squared", rng()) == pytest.approx(3, rel=0.02)


def test_a_rule_is_a_pure_function_of_its_points_and_generator():
    x0, x1 = points(3, 300)
    rule = ElbowEpsilon(num_points=50)
    assert rule.choose(x0, x1, "norm", rng()) == rule.choose(x0, x1, "norm", rng())
    images = x1.reshape(300, 1, 3, 1)
    assert rule.choose(x0.reshape(300, 1, 3, 1), images, "norm", rng()) == rule.choose(x0, x1, "norm", rng())


def test_a_chosen_temperature_travels_in_the_checkpoint():
    x0, x1 = points(4)
    weight = GibbsWeight(epsilon=EffectiveSampleEpsilon(0.6))
    assert weight.needs_fit
    with pytest.raises(ValueError, match=r"chosen on data: call fit"):
        weight(x0, x1)
    with pytest.raises(ValueError, match=r"chosen on data: call fit"):
        weight.epsilon(3)
    weight.fit(x0, x1, rng(), True)
    weight(x0, x1)
    file = io.BytesIO()
    torch.save(weight.state_dict(), file)
    file.seek(0)
    fresh = GibbsWeight(epsilon=EffectiveSampleEpsilon(0.6))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert fresh.epsilon(3) == weight.epsilon(3)
    assert torch.equal(fresh(x0, x1).weight, weight(x0, x1).weight)


def test_a_weight_that_is_given_its_temperature_is_not_fitted():
    weight = GibbsWeight(epsilon=2.0)
    assert not weight.needs_fit
    weight.fit(*points(0), rng(), True)
    assert weight.epsilon(7) == 2.0
    assert GibbsWeight().epsilon(16) == pytest.approx(0.5 * 4)


@pytest.mark.parametrize("rule", [ElbowEpsilon(), EffectiveSampleEpsilon()])
def test_rules_refuse_points_without_an_answer(rule):
    x0, x1 = points(0, 10)
    with pytest.raises(ValueError, match=r"at least 2 points a side, got 1 and 10"):
        rule.choose(x0[:1], x1, "norm", rng())
    with pytest.raises(ValueError, match="not finite"):
        rule.choose(x0, x1 * math.nan, "norm", rng())
    with pytest.raises(ValueError, match=r"no elbow|cost the same"):
        rule.choose(torch.ones(10, 3), torch.ones(10, 3), "norm", rng())


def test_a_range_without_an_elbow_is_refused():
    with pytest.raises(ValueError, match=r"no elbow for kappa in \[0\.0001, 0\.001\] .*: widen the range"):
        ElbowEpsilon(kappa_min=1e-4, kappa_max=1e-3).choose(*points(0), "norm", rng())


def test_a_share_that_no_epsilon_keeps_is_refused():
    """The effective sample of 40 x 40 pairs is one pair at least."""
    x0, x1 = (torch.randn(40, 2, generator=generator(0, name)) for name in ("source", "data"))
    with pytest.raises(ValueError, match=r"no epsilon keeps share=.*choose a share between"):
        EffectiveSampleEpsilon(1e-9).choose(x0, x1, "norm", generator(0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ElbowEpsilon(num_kappas=2), "num_kappas must be a whole number in"),
        (lambda: ElbowEpsilon(kappa_min=0.0), "kappa_min must be a number in"),
        (lambda: ElbowEpsilon(kappa_min=2, kappa_max=1), "need kappa_min < kappa_max"),
        (lambda: ElbowEpsilon(num_points=1), "num_points must be a whole number in"),
        (lambda: EffectiveSampleEpsilon(share=1.0), "share must be a number in"),
    ],
)
def test_bad_rules_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
