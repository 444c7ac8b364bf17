"""Paths against automatic differentiation, closed forms and round trips."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.core.seeds import generator
from flowbench.flows.path.affine import CosinePath, LinearPath, TargetConditionalPath
from flowbench.flows.path.base import Path, PathCoefficients
from flowbench.flows.path.bridge import SchrodingerBridgePath
from flowbench.flows.path.diffusion import VariancePreservingPath

PATHS = [
    LinearPath(),
    CosinePath(),
    TargetConditionalPath(0.1),
    VariancePreservingPath(),
    VariancePreservingPath(0.5, 5.0),
    VariancePreservingPath(3.0, 3.0),
]
NOISY = [LinearPath(0.3), SchrodingerBridgePath(0.7)]
SHAPES = [(2,), (1, 3, 2)]
inside = st.floats(0.01, 0.99)
path_cases = pytest.mark.parametrize("path", PATHS, ids=repr)
noisy_cases = pytest.mark.parametrize("path", NOISY, ids=repr)


def pair(seed: int, shape: tuple[int, ...], num: int = 5):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num, *shape, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("path", PATHS + NOISY, ids=repr)
@pytest.mark.parametrize("shape", SHAPES)
@given(seed=st.integers(0, 99), time=inside)
@settings(max_examples=20, deadline=None)
def test_velocity_is_the_time_derivative_of_the_path(path: Path, shape, seed: int, time: float):
    x0, x1 = pair(seed, shape)
    t = torch.full((5,), time, dtype=torch.float64)

    def position(s):
        return path.sample(x0, x1, s, generator(seed)).xt

    expected, velocity = torch.func.jvp(position, (t,), (torch.ones_like(t),))
    sample = path.sample(x0, x1, t, generator(seed))
    torch.testing.assert_close(sample.xt, expected)
    torch.testing.assert_close(sample.velocity, velocity)


@noisy_cases
def test_noise_has_the_stated_scale_around_the_line(path: Path):
    x0, x1 = pair(2, (3,))
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    sample = path.sample(x0, x1, t, generator(0))
    mean = LinearPath().sample(x0, x1, t)
    scale, rate = torch.func.jvp(lambda s: path.noise_scale(s)[0], (t,), (torch.ones_like(t),))
    torch.testing.assert_close(path.noise_scale(t), (scale, rate))
    torch.testing.assert_close(sample.xt - mean.xt, scale[:, None] * sample.noise)
    torch.testing.assert_close(sample.velocity - mean.velocity, rate[:, None] * sample.noise)
    assert torch.equal(sample.noise, torch.randn(5, 3, generator=generator(0), dtype=torch.float64))
    assert mean.noise is None


def test_the_bridge_has_the_published_velocity():
    path, (x0, x1) = SchrodingerBridgePath(0.7), pair(3, (4,))
    t = torch.linspace(0.001, 0.999, 5, dtype=torch.float64)
    s = path.sample(x0, x1, t, generator(0))
    time = t[:, None]
    mean = (1 - time) * x0 + time * x1
    factor = (1 - 2 * time) / (2 * time * (1 - time))
    torch.testing.assert_close(s.velocity, factor * (s.xt - mean) + x1 - x0)
    torch.testing.assert_close((s.xt - mean) / s.noise, 0.7 * (time * (1 - time)).sqrt().expand(5, 4))
    assert SchrodingerBridgePath(1.0, clip=0.02).interval == (0.02, 0.98)
    ends = torch.tensor(path.interval)
    assert path.noise_scale(ends)[1].isfinite().all()


def test_lipmans_path_has_the_published_velocity_and_becomes_the_straight_line():
    x0, x1 = pair(4, (4,))
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    s, time = TargetConditionalPath(0.1).sample(x0, x1, t), t[:, None]
    torch.testing.assert_close(s.xt, time * x1 + (1 - 0.9 * time) * x0)
    torch.testing.assert_close(s.velocity, (x1 - 0.9 * s.xt) / (1 - 0.9 * time))
    torch.testing.assert_close(s.xt[-1], x1[-1] + 0.1 * x0[-1])
    line, limit = LinearPath().sample(x0, x1, t), TargetConditionalPath(0).sample(x0, x1, t)
    torch.testing.assert_close((line.xt, line.velocity), (limit.xt, limit.velocity))
    assert TargetConditionalPath(0.1).needs_standard_normal
    assert not LinearPath().needs_standard_normal


@pytest.mark.parametrize("path", [LinearPath(), CosinePath(), TargetConditionalPath(0)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_endpoints_are_exact(path: Path, dtype: torch.dtype):
    x0, x1 = (x.to(dtype) for x in pair(0, (3,)))
    assert torch.equal(path.sample(x0, x1, torch.zeros(5, dtype=dtype)).xt, x0)
    assert torch.equal(path.sample(x0, x1, torch.ones(5, dtype=dtype)).xt, x1)


def test_variance_preserving_ends():
    path = VariancePreservingPath()
    ends = path.coefficients(torch.tensor([0.0, 1.0], dtype=torch.float64))
    # Noise schedule of Song et al.: integral of beta over [0, 1] is (0.1 + 20) / 2.
    assert ends.alpha[0].item() == pytest.approx(math.exp(-0.5 * 10.05))
    assert ends.alpha[1] == 1
    assert ends.sigma[1] == 0
    t = torch.rand(100, dtype=torch.float64)
    c = path.coefficients(t)
    torch.testing.assert_close(c.alpha**2 + c.sigma**2, torch.ones_like(t))
    last = torch.tensor([path.interval[1]])
    assert path.coefficients(last).d_sigma.isfinite().all()


@path_cases
@pytest.mark.parametrize("shape", SHAPES)
@given(seed=st.integers(0, 99), time=inside, scalar=st.booleans())
@settings(max_examples=20, deadline=None)
def test_conversions_recover_both_ends_and_the_velocity(path: Path, shape, seed, time, scalar):
    x0, x1 = pair(seed, shape)
    t = torch.full((5,), time, dtype=torch.float64)
    s = path.sample(x0, x1, t)
    t = t[0] if scalar else t
    c = path.coefficients(torch.tensor(time, dtype=torch.float64))
    score = (c.alpha * x1 - s.xt) / (c.sigma * 1.5) ** 2  # of x_t given x1, with a source of standard deviation 1.5
    for converted, expected in [
        (path.velocity_to_data(s.velocity, s.xt, t), x1),
        (path.velocity_to_source(s.velocity, s.xt, t), x0),
        (path.data_to_velocity(x1, s.xt, t), s.velocity),
        (path.source_to_velocity(x0, s.xt, t), s.velocity),
        (path.data_to_source(x1, s.xt, t), x0),
        (path.source_to_data(x0, s.xt, t), x1),
        (path.velocity_to_score(s.velocity, s.xt, t, 1.5), score),
        (path.data_to_score(x1, s.xt, t, 1.5), score),
        (path.source_to_score(x0, s.xt, t, 1.5), score),
        (path.score_to_velocity(score, s.xt, t, 1.5), s.velocity),
        (path.score_to_data(score, s.xt, t, 1.5), x1),
        (path.score_to_source(score, s.xt, t, 1.5), x0),
    ]:
        torch.testing.assert_close(converted, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("path", "conversion", "time"),
    [
        (LinearPath(), "data_to_velocity", 1.0),
        (LinearPath(), "data_to_source", 1.0),
        (LinearPath(), "source_to_velocity", 0.0),
        (CosinePath(), "source_to_data", 0.0),
        (VariancePreservingPath(), "velocity_to_data", 1.0),
        (VariancePreservingPath(), "velocity_to_source", 1.0),
        (VariancePreservingPath(), "source_to_velocity", 1.0),
        (LinearPath(), "source_to_score", 1.0),
        (LinearPath(), "velocity_to_score", 1.0),
        (CosinePath(), "data_to_score", 1.0),
        (CosinePath(), "score_to_data", 0.0),
        (VariancePreservingPath(), "score_to_velocity", 1.0),
    ],
)
def test_singular_conversions_name_the_time(path: Path, conversion: str, time: float):
    x, t = torch.randn(3, 2), torch.tensor([0.5, time, 0.5])
    with pytest.raises(ValueError, match=f"at t = {time:g}: the path is singular"):
        getattr(path, conversion)(x, x, t)
    with pytest.raises(ValueError, match=f"at t = {time:g}: the path is singular"):
        getattr(path, conversion)(x, x, t[1])


@pytest.mark.parametrize("path", [LinearPath(), CosinePath(), TargetConditionalPath(0.1)], ids=repr)
@pytest.mark.parametrize("time", [0.0, 1.0])
def test_velocity_conversions_are_regular_at_the_ends(path: Path, time: float):
    x0, x1 = pair(1, (4,))
    t = torch.full((5,), time, dtype=torch.float64)
    s = path.sample(x0, x1, t)
    torch.testing.assert_close(path.velocity_to_data(s.velocity, s.xt, t), x1)
    torch.testing.assert_close(path.velocity_to_source(s.velocity, s.xt, t), x0)


@path_cases
@given(time=st.floats(1e-6, 1 - 1e-6))
@settings(max_examples=50, deadline=None)
def test_signal_to_noise_ratio_and_its_inverse(path: Path, time: float):
    t = torch.tensor([time], dtype=torch.float64)
    c, log_snr = path.coefficients(t), path.log_snr(t)
    torch.testing.assert_close(log_snr, (c.alpha / c.sigma).log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(path.time_of_log_snr(log_snr), t, rtol=1e-9, atol=1e-12)
    assert path.log_snr(t.float()).dtype == torch.float64


@path_cases
def test_signal_to_noise_ratio_increases_up_to_both_ends(path: Path):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    log_snr = path.log_snr(t)
    assert (log_snr.diff() > 0).all()
    torch.testing.assert_close(path.time_of_log_snr(log_snr), t, rtol=1e-9, atol=1e-12)
    c = path.coefficients(t)
    assert torch.equal(log_snr.isneginf(), c.alpha == 0)
    assert torch.equal(log_snr.isposinf(), c.sigma == 0)


CONVERSIONS = [f"{p}_to_{q}" for p, q in permutations(("velocity", "data", "source", "score"), 2)]


@noisy_cases
def test_paths_with_noise_convert_nothing(path: Path):
    x, t = torch.zeros(3, 2), torch.full((3,), 0.5)
    for name in CONVERSIONS:
        with pytest.raises(ValueError, match="adds noise of its own and has no conversion between predictions"):
            getattr(path, name)(x, x, t)
    for call in (path.log_snr, path.time_of_log_snr):
        with pytest.raises(ValueError, match="adds noise of its own and has no signal-to-noise ratio"):
            call(t)
    with pytest.raises(ValueError, match="got no generator"):
        path.sample(x, x, t)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VariancePreservingPath(beta_min=0), "beta_min"),
        (lambda: LinearPath(-0.1), "sigma must be a number in .*, got -0.1"),
        (lambda: TargetConditionalPath(1.0), r"sigma_min must be a number in .*, got 1.0"),
        (lambda: SchrodingerBridgePath(0), "sigma must be a number in .*, got 0: sigma = 0 is OT-CFM"),
        (lambda: SchrodingerBridgePath(float("nan")), "sigma must be a number in .*, got nan"),
        (lambda: SchrodingerBridgePath(1.0, clip=0), r"clip must be a number in .*, got 0"),
        (
            lambda: LinearPath().velocity_to_score(*torch.ones(2, 3, 1), torch.full((3,), 0.5), 0.0),
            "source_std must be",
        ),
        (
            lambda: TargetConditionalPath(0.1).time_of_log_snr(torch.tensor([0.0, 3.0])),
            "between -inf and 2.30259, got 3",
        ),
        (lambda: VariancePreservingPath().time_of_log_snr(torch.tensor(-6.0)), "between -5.02.* and inf, got -6"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message: str):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_path_without_a_closed_form_says_so():
    class Quadratic(Path):
        def coefficients(self, t):
            return PathCoefficients(t * t, 1 - t * t, 2 * t, -2 * t)

    t = torch.tensor(0.5, dtype=torch.float64)
    torch.testing.assert_close(Quadratic().log_snr(t), torch.tensor(1 / 3, dtype=torch.float64).log())
    with pytest.raises(ValueError, match="no closed form for the time"):
        Quadratic().time_of_log_snr(t)


def test_wrong_shapes_are_refused():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="x0 and x1 must have one shape"):
        LinearPath().sample(x, x[:2], torch.zeros(3))
    with pytest.raises(ValueError, match=r"t must have shape \(3,\)"):
        LinearPath().sample(x, x, torch.zeros(3, 1))
