"""Paths against automatic differentiation, closed forms and round trips."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.flows import CosinePath, LinearPath, Path, VariancePreservingPath

PATHS = [LinearPath(), CosinePath(), VariancePreservingPath(), VariancePreservingPath(0.5, 5.0)]
SHAPES = [(2,), (1, 3, 2)]
inside = st.floats(0.01, 0.99)
path_cases = pytest.mark.parametrize("path", PATHS, ids=repr)


def pair(seed: int, shape: tuple[int, ...], num: int = 5):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num, *shape, generator=generator, dtype=torch.float64) for _ in range(2))


@path_cases
@pytest.mark.parametrize("shape", SHAPES)
@given(seed=st.integers(0, 99), time=inside)
@settings(max_examples=20, deadline=None)
def test_velocity_is_the_time_derivative_of_the_path(path: Path, shape, seed: int, time: float):
    x0, x1 = pair(seed, shape)
    t = torch.full((5,), time, dtype=torch.float64)
    position, velocity = torch.func.jvp(lambda s: path.sample(x0, x1, s).xt, (t,), (torch.ones_like(t),))
    sample = path.sample(x0, x1, t)
    torch.testing.assert_close(sample.xt, position)
    torch.testing.assert_close(sample.velocity, velocity)


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=repr)
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
    for converted, expected in [
        (path.velocity_to_data(s.velocity, s.xt, t), x1),
        (path.velocity_to_source(s.velocity, s.xt, t), x0),
        (path.data_to_velocity(x1, s.xt, t), s.velocity),
        (path.source_to_velocity(x0, s.xt, t), s.velocity),
        (path.data_to_source(x1, s.xt, t), x0),
        (path.source_to_data(x0, s.xt, t), x1),
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
    ],
)
def test_singular_conversions_name_the_time(path: Path, conversion: str, time: float):
    x, t = torch.randn(3, 2), torch.tensor([0.5, time, 0.5])
    with pytest.raises(ValueError, match=f"at t = {time:g}: the path is singular"):
        getattr(path, conversion)(x, x, t)
    with pytest.raises(ValueError, match=f"at t = {time:g}: the path is singular"):
        getattr(path, conversion)(x, x, t[1])


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=repr)
@pytest.mark.parametrize("time", [0.0, 1.0])
def test_velocity_conversions_are_regular_at_the_ends(path: Path, time: float):
    x0, x1 = pair(1, (4,))
    t = torch.full((5,), time, dtype=torch.float64)
    s = path.sample(x0, x1, t)
    torch.testing.assert_close(path.velocity_to_data(s.velocity, s.xt, t), x1)
    torch.testing.assert_close(path.velocity_to_source(s.velocity, s.xt, t), x0)


@pytest.mark.parametrize("time", [0.1, 0.5, 0.9])
def test_best_gaussian_velocity_reaches_the_loss_floor_and_nothing_beats_it(time: float):
    a, b, shift, num = 1.0, 0.6, 1.5, 200_000
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, num, 1, generator=generator, dtype=torch.float64)
    t = torch.full((num,), time, dtype=torch.float64)
    s = LinearPath().sample(a * noise[0], shift + b * noise[1], t)
    variance = (1 - time) ** 2 * a**2 + time**2 * b**2
    slope = (time * b**2 - (1 - time) * a**2) / variance
    best = shift + slope * (s.xt - time * shift)
    loss = (s.velocity - best).square().mean().item()
    # Var(u | x_t) of a joint Gaussian: Var u - Cov(u, x_t)^2 / Var x_t.
    floor = a**2 + b**2 - slope**2 * variance
    assert loss == pytest.approx(floor, rel=0.02)
    for other in (best + 0.1, best * 1.05, best + 0.1 * s.xt):
        assert (s.velocity - other).square().mean().item() > loss
    # The least-squares line through the samples is the closed form: the independent-coupling minimiser.
    centred = s.xt - s.xt.mean()
    fitted = (centred * s.velocity).mean() / centred.square().mean()
    assert fitted.item() == pytest.approx(slope, abs=0.02)


def test_wrong_shapes_are_refused():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="x0 and x1 must have one shape"):
        LinearPath().sample(x, x[:2], torch.zeros(3))
    with pytest.raises(ValueError, match=r"t must have shape \(3,\)"):
        LinearPath().sample(x, x, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="beta_min"):
        VariancePreservingPath(beta_min=0)
