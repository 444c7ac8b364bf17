"""Objectives against the path's conversions, autograd, quadrature and the Gaussians of the variational bound."""

from __future__ import annotations

import math
import re
from pathlib import Path as File

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.flows import (
    ClassifierFreeGuidance,
    CosinePath,
    DataObjective,
    LinearPath,
    NoiseObjective,
    Objective,
    Path,
    RatioAwareGuidance,
    RungeKutta4,
    SchrodingerBridgePath,
    ScoreObjective,
    TargetConditionalPath,
    VariancePreservingPath,
    VelocityObjective,
)
from flowbench.flows.path.base import PathSample

from .gaussian_flow import GaussianFlow

PATHS = [LinearPath(), CosinePath(), TargetConditionalPath(0.1), VariancePreservingPath()]
EVERY = [VelocityObjective, DataObjective, NoiseObjective, ScoreObjective]
every_path = pytest.mark.parametrize("path", PATHS, ids=repr)
every_objective = pytest.mark.parametrize("kind", EVERY)
inside = st.floats(0.05, 0.95)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sampled(path: Path, seed: int, time: float, num: int = 4) -> PathSample:
    x0, x1 = normal(seed, 2, num, 3)
    return path.sample(x0, x1, torch.full((num,), time, dtype=torch.float64))


def as_output(kind: type[Objective], path: Path, velocity: torch.Tensor, point: PathSample, std: float = 1.0):
    """What a network of this prediction outputs where the velocity is this one, by the path's conversions."""
    given_there = (velocity, point.xt, point.t)
    return {
        "velocity": lambda: velocity,
        "data": lambda: path.velocity_to_data(*given_there),
        "noise": lambda: path.velocity_to_source(*given_there),
        "score": lambda: path.velocity_to_score(*given_there, std),
    }[kind.prediction]()


# ---- conversions --------------------------------------------------------------------------------------


@every_path
@every_objective
@given(seed=st.integers(0, 99), time=inside, std=st.floats(0.3, 3))
@settings(max_examples=15, deadline=None)
def test_a_prediction_gives_the_velocity_that_it_was_converted_from(path, kind, seed, time, std):
    point = sampled(path, seed, time)
    velocity = normal(seed + 100, 4, 3)
    output = as_output(kind, path, velocity, point, std)
    found = kind().for_path(path, std).velocity(output, point.xt, point.t)
    torch.testing.assert_close(found, velocity, rtol=1e-8, atol=1e-8)


@every_objective
def test_a_field_asks_its_network_at_the_clipped_time_with_all_that_it_is_given(kind):
    seen = []

    def network(x, t, *conditions):
        seen.append((t, conditions))
        return torch.ones_like(x)

    objective = kind().for_path(LinearPath())
    t = torch.tensor([0.0, 0.5, 1.0])
    objective.field(network)(torch.zeros(3, 2), t, "label", "values")
    ((asked, conditions),) = seen
    assert conditions == ("label", "values")
    low, high = {"velocity": (0, 1), "data": (0, 0.98)}.get(objective.prediction, (0.02, 1))
    torch.testing.assert_close(asked, torch.tensor([low, 0.5, high], dtype=torch.float32))


def test_a_velocity_is_left_as_it_is():
    def network(x, t):
        return x

    objective = VelocityObjective().for_path(LinearPath())
    assert objective.field(network) is network
    point = sampled(LinearPath(), 0, 0.3)
    output = normal(5, 4, 3)
    assert torch.equal(objective.error(output, point), (output - point.velocity).float().square().mean(1))
    assert objective.metrics(output, point) == {}


@pytest.mark.parametrize("kind", [DataObjective, NoiseObjective, ScoreObjective])
def test_what_the_clip_costs_falls_with_its_square(kind):
    """From N(0, 1) to N(m, b^2), by the exact prediction and more steps than matter."""
    flow = GaussianFlow(LinearPath(), 1.0, 0.6, torch.tensor([1.5], dtype=torch.float64))
    z, path = flow.noise(50), LinearPath()
    exact = flow.m + 0.6 * z
    errors = []
    for clip in (0.1, 0.05):

        def network(x, t):
            point = PathSample(x, x, t, x, x)
            if kind is ScoreObjective:  # which is finite at the end, where the conversion is not
                return flow.score(t[:, None], x)
            return as_output(kind, path, flow(t[:, None], x), point)

        field = kind(clip=clip).for_path(path).field(network)
        times = torch.tensor([0.0, clip, 1 - clip, 1.0], dtype=torch.float64)
        end = RungeKutta4(150).solve(lambda t, x: field(x, t.expand(len(x))), z, times).states[-1]  # noqa: B023
        errors.append((end - exact).abs().max().item())
    assert errors[0] < 0.05
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)


@every_objective
def test_a_network_that_gives_zero_has_a_finite_field_at_all_times(kind):
    objective = kind().for_path(LinearPath())
    t = torch.linspace(0, 1, 101)
    field = objective.field(lambda x, t: torch.zeros_like(x))(torch.ones(101, 2), t)
    assert field.isfinite().all()
    assert field.abs().max() <= 1 / 0.02 * 1.0001


# ---- weights ------------------------------------------------------------------------------------------


def test_the_weights_of_the_linear_path_in_closed_form():
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    path = LinearPath()
    expected = {
        VelocityObjective("elbo"): t / (1 - t),
        DataObjective("velocity"): 1 / (1 - t) ** 2,
        DataObjective("elbo"): t / (1 - t) ** 3,
        NoiseObjective("velocity"): 1 / t**2,
        NoiseObjective("elbo"): 1 / (t * (1 - t)),
    }
    for objective, weight in expected.items():
        torch.testing.assert_close(objective.for_path(path).weight_at(t), weight, msg=repr(objective))
    assert torch.equal(DataObjective().for_path(path).weight_at(t), torch.ones_like(t))


@pytest.mark.parametrize("weight", ["velocity", "elbo"])
@every_objective
def test_weights_stay_what_they_are_at_the_clip_up_to_the_end(kind, weight):
    if weight not in kind.weights:
        pytest.skip("the natural one")
    objective = kind(weight, clip=0.1).for_path(LinearPath())
    there = objective.weight_at(torch.tensor([0.0, 0.1, 0.9, 1.0]))
    assert there.isfinite().all()
    assert (there > 0).all()
    grows = objective.weight_at(torch.tensor([0.15, 0.85])) < there[[1, 2]]
    assert grows.any(), "the weight grows towards an end, else there is nothing to clip"
    assert ((there[[0, 3]] == there[[1, 2]]) | ~grows).all()


@every_path
@given(seed=st.integers(0, 99), time=inside, std=st.floats(0.3, 3))
@settings(max_examples=15, deadline=None)
def test_the_losses_of_all_predictions_differ_by_their_weights_alone(path, seed, time, std):
    point, velocity = sampled(path, seed, time), normal(seed + 100, 4, 3)
    of_velocity = (velocity - point.velocity).square().mean(1)
    of_data = (path.velocity_to_data(velocity, point.xt, point.t) - point.x1).square().mean(1)
    t = point.t.clone().requires_grad_()
    (rate,) = torch.autograd.grad(((2 * path.log_snr(t)).exp() / std**2).sum(), t)
    expected = {"velocity": of_velocity, "elbo": rate / 2 * of_data}
    for kind in EVERY:
        output = as_output(kind, path, velocity, point, std)
        for weight in set(kind.weights) - {"natural"}:
            found = kind(weight).for_path(path, std).error(output, point)
            torch.testing.assert_close(found.double(), expected[weight], rtol=1e-5, atol=1e-9, msg=f"{kind} {weight}")


@every_path
def test_the_loss_of_the_score_is_that_of_the_noise(path):
    point, velocity, std = sampled(path, 3, 0.6), normal(4, 4, 3), 1.7
    score, noise = (as_output(kind, path, velocity, point, std) for kind in (ScoreObjective, NoiseObjective))
    found = ScoreObjective().for_path(path, std).error(score, point)
    torch.testing.assert_close(found, NoiseObjective().for_path(path, std).error(noise, point))
    # Weighted by (sigma std^2)^2 the target is the score of x_t given the data point, by autograd.
    xt = point.xt.clone().requires_grad_()
    c = path.coefficients(point.t[:, None])
    log_density = -((xt - c.alpha * point.x1) / (c.sigma * std)).square().sum() / 2
    (conditional,) = torch.autograd.grad(log_density, xt)
    by_hand = ((c.sigma * std**2) ** 2 * (score - conditional).square()).mean(1)
    torch.testing.assert_close(found.double(), by_hand, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("std", [1.0, 1.5])
@pytest.mark.parametrize("path", [LinearPath(), CosinePath(), VariancePreservingPath()], ids=repr)
def test_the_variational_weight_is_the_limit_of_the_bounds_kl_terms(path, std):
    """Gaussians q(x_u | x_t, x1) and p = q(x_u | x_t, estimate) of neighbouring times t < u, in NumPy.

    Noising runs from u to t: x_t = a x_u + N(0, v) with a = alpha_t / alpha_u, v = s_t^2 - a^2 s_u^2, s = sigma std.
    Bayes' rule gives both posteriors one precision a^2 / v + 1 / s_u^2, and means that differ by the error times
    alpha_u / s_u^2 over it.
    """
    times = np.linspace(0.1, 0.9, 8001)
    c = path.coefficients(torch.tensor(times))
    alpha, spread = c.alpha.numpy(), c.sigma.numpy() * std
    a = alpha[:-1] / alpha[1:]
    v = spread[:-1] ** 2 - (a * spread[1:]) ** 2
    precision = a**2 / v + 1 / spread[1:] ** 2
    apart = alpha[1:] / spread[1:] ** 2 / precision  # for an error of 1 in the data point
    bound = (precision * apart**2 / 2).sum()
    weight = DataObjective("elbo").for_path(path, std).weight_at(torch.tensor(times)).numpy()
    assert np.trapezoid(weight, times) == pytest.approx(bound, rel=1e-3)


# ---- the minimiser ------------------------------------------------------------------------------------

MEANS = torch.tensor([-2.0, 0.3, 1.5], dtype=torch.float64)
STDS = torch.tensor([0.4, 0.2, 0.7], dtype=torch.float64)
SHARES = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def of_mixture(path: Path, time: float, xt: torch.Tensor, std: float) -> tuple[PathSample, torch.Tensor, torch.Tensor]:
    """Pairs that lead to each x_t, their posterior probabilities, and the score of x_t by autograd.

    Data are a mixture of Gaussians: given x_t and the component, the data point is Gaussian, and a mean square is
    exact under Gauss-Hermite quadrature.
    """
    t = torch.tensor(time, dtype=torch.float64)
    c = path.coefficients(t)
    variance = (c.alpha * STDS) ** 2 + (c.sigma * std) ** 2
    x = xt.clone().requires_grad_()
    log_joint = SHARES.log() - (x[:, None] - c.alpha * MEANS) ** 2 / (2 * variance) - variance.log() / 2
    log_density = torch.logsumexp(log_joint, 1)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    share = torch.softmax(log_joint, 1).detach()
    nodes, weights = (torch.tensor(values) for values in np.polynomial.hermite_e.hermegauss(4))
    gain = c.alpha * STDS**2 / variance
    mean = MEANS + gain * (xt[:, None] - c.alpha * MEANS)
    spread = (STDS**2 * (c.sigma * std) ** 2 / variance).sqrt()
    x1 = (mean[..., None] + spread[:, None] * nodes).flatten()
    probability = (share[..., None] * weights / weights.sum()).flatten()
    states = xt[:, None, None].expand(-1, len(MEANS), len(nodes)).flatten()
    x0 = (states - c.alpha * x1) / c.sigma
    point = path.sample(x0[:, None], x1[:, None], t.expand(len(x1)))
    torch.testing.assert_close(point.xt[:, 0], states)
    return point, probability, score


@pytest.mark.parametrize("path", [LinearPath(), CosinePath(), VariancePreservingPath()], ids=repr)
@pytest.mark.parametrize("time", [0.2, 0.7])
def test_denoising_score_matching_is_least_at_the_score_of_a_mixture(path, time):
    std = 1.3
    xt = torch.linspace(-3, 3, 7, dtype=torch.float64)
    point, probability, score = of_mixture(path, time, xt, std)
    objective = ScoreObjective().for_path(path, std)
    repeats = len(probability) // len(xt)

    def loss(output: torch.Tensor) -> torch.Tensor:
        error = objective.error(output.repeat_interleave(repeats)[:, None], point)
        return (probability * error).view(len(xt), -1).sum(1)

    output = score.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(output).sum(), output)
    (elsewhere,) = torch.autograd.grad(loss(output + 0.1).sum(), output)
    assert slope.abs().max() < 1e-4 * elsewhere.abs().max(), "the loss has its minimum at the marginal score"
    for step in (-0.05, 0.05):
        assert (loss(score + step) > loss(score)).all()
    # The other three have theirs at what the path makes of this score.
    middle = PathSample(xt[:, None], xt[:, None], point.t[: len(xt)], xt[:, None], xt[:, None])
    velocity = path.score_to_velocity(score[:, None], middle.xt, middle.t, std)
    for kind in (VelocityObjective, DataObjective, NoiseObjective):
        best = as_output(kind, path, velocity, middle)[:, 0].requires_grad_()
        error = kind().for_path(path).error(best.repeat_interleave(repeats)[:, None], point)
        (slope,) = torch.autograd.grad((probability * error).sum(), best)
        assert slope.abs().max() < 1e-4 * best.abs().max()


# ---- guidance -----------------------------------------------------------------------------------------


def labelled(prediction: str):
    """Data at 3 with a label and at -1 without, both spread by 0.5, as a network of this prediction (linear path)."""

    def network(x, t, label):
        flow = GaussianFlow(LinearPath(), 1.0, 0.5, torch.full((2,), -1.0 if label is None else 3.0).double())
        velocity = flow(t[:, None], x)
        return velocity if prediction == "velocity" else LinearPath().velocity_to_data(velocity, x, t)

    return network


def test_a_constant_scale_does_the_same_to_velocities_and_to_data_points_and_a_ratio_does_not():
    x, t, label = normal(0, 5, 2), torch.full((5,), 0.4, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    objective = DataObjective().for_path(LinearPath())
    constant, ratio = ClassifierFreeGuidance(3.0), RatioAwareGuidance(max_scale=3.0, decay=2.0)
    for guidance, same in ((constant, True), (ratio, False)):
        of_velocities = guidance.velocity(labelled("velocity"), x, t, label)
        of_data = objective.velocity(guidance.velocity(labelled("data"), x, t, label), x, t)
        assert torch.allclose(of_velocities, of_data, rtol=1e-9) == same, guidance
        # A flow converts before it guides, so that even the ratio means the same.
        converted = guidance.velocity(objective.field(labelled("data")), x, t, label)
        torch.testing.assert_close(converted, of_velocities)


# ---- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [LinearPath(sigma=0.3), SchrodingerBridgePath(0.5)], ids=repr)
def test_a_path_with_noise_of_its_own_has_velocities_alone(path):
    assert VelocityObjective().for_path(path).prediction == "velocity"
    for objective in (VelocityObjective("elbo"), DataObjective(), NoiseObjective(), ScoreObjective()):
        with pytest.raises(ValueError, match="adds noise of its own and has none: take VelocityObjective") as caught:
            objective.for_path(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataObjective("snr"), "weight of DataObjective must be one of natural, velocity, elbo, got 'snr'"),
        (lambda: VelocityObjective("velocity"), "weight of VelocityObjective must be one of natural, elbo"),
        (lambda: VelocityObjective(clip=0.1), "clip bounds the weight elbo"),
        (lambda: NoiseObjective(clip=0.5), "clip must be a number in"),
        (lambda: DataObjective().for_path(LinearPath(), math.nan), "source_std must be a number in"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


# ---- the page -----------------------------------------------------------------------------------------


def test_the_tests_that_the_page_names_are_there():
    root = File(__file__).parents[2]
    text = (root / "docs" / "principles.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    files = {root / "docs" / file for file in re.findall(r"\((\.\./tests/[\w/]+\.py)\)", text)}
    assert len(named) > 15
    written = "".join(file.read_text(encoding="utf-8") for file in files)
    assert not [name for name in named if f"def {name}(" not in written]
