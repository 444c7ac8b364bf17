"""Diffusion solvers against the exact velocity of Gaussian mixtures, NumPy and the laws of a stochastic flow."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from flowbench.core.seeds import generator
from flowbench.flows.likelihood.change_of_variables import log_likelihood
from flowbench.flows.likelihood.divergence import ExactDivergence
from flowbench.flows.path.affine import CosinePath, LinearPath
from flowbench.flows.path.base import Path
from flowbench.flows.path.bridge import SchrodingerBridgePath
from flowbench.flows.path.diffusion import VariancePreservingPath
from flowbench.flows.solver.diffusion import DDIM, DiffusionSolver, DPMSolverPlusPlus2M, EulerMaruyama
from flowbench.flows.solver.fixed_step import Euler, Heun, Midpoint, RungeKutta4
from flowbench.flows.solver.time_grid import EDMGrid, TimeGrid
from tests.closeness import assert_near
from tests.marks import slow

UNIT = torch.tensor([0.0, 1.0], dtype=torch.float64)
INNER = torch.tensor([0.01, 0.99], dtype=torch.float64)
PATHS = [LinearPath(), CosinePath(), VariancePreservingPath()]
MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [-1.0, -1.5]], dtype=torch.float64)
STDS = torch.tensor([0.3, 0.5, 0.4], dtype=torch.float64)
every_path = pytest.mark.parametrize("path", PATHS, ids=repr)
every_method = pytest.mark.parametrize("method", [DDIM, DPMSolverPlusPlus2M])


class LogSNRGrid(TimeGrid):
    """Even steps of log(t / (1 - t)) between 0.01 and 0.99."""

    def points(self, num_steps):
        end = math.log(99)
        points = (torch.linspace(-end, end, num_steps + 1).double().sigmoid() - 0.01) / 0.98
        points[0], points[-1] = 0, 1
        return points


def mixture_field(path: Path, means=MEANS, stds=STDS):
    """Marginal velocity of a standard normal source, independent of a mixture of equal weights."""

    def field(t, x):
        c = path.coefficients(t.double())
        variance = (c.alpha * stds) ** 2 + c.sigma**2
        apart = x.double()[:, None] - c.alpha * means
        share = torch.softmax(-0.5 * apart.square().sum(2) / variance - x.shape[1] / 2 * variance.log(), 1)[..., None]
        data = (share * (means + (c.alpha * stds**2 / variance)[:, None] * apart)).sum(1)
        source = (share * (c.sigma / variance)[:, None] * apart).sum(1)
        return (c.d_alpha * data + c.d_sigma * source).to(x)

    return field


def points(num: int = 20, dim: int = 2, seed: int = 0):
    return torch.randn(num, dim, generator=generator(seed, "points"), dtype=torch.float64)


@functools.cache
def exact_end(path: Path):
    """Where the field of a path carries the points, to an accuracy that no tested method has."""
    return end(RungeKutta4(512), path, points(), INNER)


def end(solver, path, x, times=UNIT, field=None):
    return solver.for_path(path).solve(field or mixture_field(path), x, times).states[-1]


# ---- deterministic -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "grid"),
    [
        (Euler, None),
        (Midpoint, None),
        (Heun, None),
        (RungeKutta4, None),
        (DDIM, None),
        (DDIM, LogSNRGrid()),
        (DPMSolverPlusPlus2M, None),
        (DPMSolverPlusPlus2M, LogSNRGrid()),
    ],
)
@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=repr)
def test_orders_on_a_mixture(method, grid, path):
    x, steps = points(), np.array([32, 64, 128])
    errors = [(end(method(int(n), grid), path, x, INNER) - exact_end(path)).abs().max().item() for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(method(1).order, abs=0.3 if method is RungeKutta4 else 0.2)


@pytest.mark.parametrize("grid", [None, EDMGrid()])
@pytest.mark.parametrize("times", [UNIT, UNIT.flip(0)], ids=["sample", "encode"])
def test_ddim_is_euler_on_the_linear_path(grid, times):
    x, path = points(), LinearPath()
    torch.testing.assert_close(
        end(DDIM(9, grid), path, x, times), end(Euler(9, grid), path, x, times), rtol=0, atol=1e-13
    )


@every_path
def test_both_agree_with_their_equations(path: Path):
    """NumPy, in the exponential form of the papers: e^-h, lambda = log(alpha / sigma)."""
    x, field = points(), mixture_field(path)
    times = torch.linspace(0.05, 0.9, 7, dtype=torch.float64)
    c = path.coefficients(times)
    alpha, sigma = c.alpha.numpy(), c.sigma.numpy()
    level = np.log(alpha / sigma)
    ddim = multi = x.numpy()
    before = None
    for i, t in enumerate(times[:-1]):
        state = torch.from_numpy(ddim)
        velocity = field(t, state)
        data, source = path.velocity_to_data(velocity, state, t), path.velocity_to_source(velocity, state, t)
        ddim = alpha[i + 1] * data.numpy() + sigma[i + 1] * source.numpy()
        state = torch.from_numpy(multi)
        data = path.velocity_to_data(field(t, state), state, t).numpy()
        h = level[i + 1] - level[i]
        expected = data if before is None else data + (data - before) * h / (2 * (level[i] - level[i - 1]))
        multi = sigma[i + 1] / sigma[i] * multi - alpha[i + 1] * np.expm1(-h) * expected
        before = data
    span = times[[0, -1]]
    np.testing.assert_allclose(end(DDIM(6), path, x, span), ddim, rtol=1e-9)
    np.testing.assert_allclose(end(DPMSolverPlusPlus2M(6), path, x, span), multi, rtol=1e-9)


@every_path
def test_the_first_step_of_the_multistep_method_is_ddim(path: Path):
    times = torch.tensor(path.interval, dtype=torch.float64)
    torch.testing.assert_close(end(DPMSolverPlusPlus2M(1), path, points(), times), end(DDIM(1), path, points(), times))


@every_method
@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=repr)
def test_the_last_step_to_no_noise_is_the_expected_data_point(method, path):
    x, field, seen = points(), mixture_field(path), []
    final = end(method(8), path, x, field=lambda t, x: seen.append((t, x, field(t, x))) or seen[-1][2])
    t, state, velocity = seen[-1]
    torch.testing.assert_close(final, path.velocity_to_data(velocity, state, t.double()))
    assert final.isfinite().all()


@every_method
@pytest.mark.parametrize("path", [PATHS[0], *map(slow, PATHS[1:])], ids=repr)
def test_encoding_and_decoding_return(method, path: Path):
    times = torch.tensor([0.02, 0.95], dtype=torch.float64)
    x = end(RungeKutta4(500), path, points(), times)
    noise = end(method(400), path, x, times.flip(0))
    torch.testing.assert_close(end(method(400), path, noise, times), x, rtol=0, atol=0.05)


@every_method
def test_data_can_be_encoded_from_the_very_end(method):
    noise = end(method(200), LinearPath(), points(), UNIT.flip(0))
    truth = end(RungeKutta4(400), LinearPath(), points(), UNIT.flip(0))
    torch.testing.assert_close(noise, truth, rtol=0, atol=0.1)


def test_two_m_beats_ddim_at_equal_cost():
    x, path = points(), CosinePath()
    truth = end(RungeKutta4(500), path, x, INNER)
    errors = [(end(m(48), path, x, INNER) - truth).abs().mean() for m in (DDIM, DPMSolverPlusPlus2M)]
    assert errors[1] < 0.3 * errors[0]


# ---- stochastic --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "solver"),
    [
        (LinearPath(), EulerMaruyama(300)),
        pytest.param(LinearPath(), EulerMaruyama(300, EDMGrid(), "constant", eta=0.5), marks=pytest.mark.slow),
        pytest.param(CosinePath(), EulerMaruyama(300, eta=2.0), marks=pytest.mark.slow),
        (VariancePreservingPath(), EulerMaruyama(600, diffusion="path")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_marginals_of_a_gaussian_target(path, solver):
    """32,000 scalar flows from N(0, 1) to N(1.5, 0.6^2), 64 streams of 500."""
    mean, std = torch.full((1, 1), 1.5, dtype=torch.float64), torch.tensor([0.6], dtype=torch.float64)
    field = mixture_field(path, mean.expand(1, 500), std)
    last = torch.tensor(path.interval, dtype=torch.float64)
    middle = torch.tensor([path.interval[0], 0.5], dtype=torch.float64)
    source = points(64, 500)
    for times in (middle, last):
        x = end(solver, path, source, times, field)
        c = path.coefficients(times[1])
        expected = ((c.alpha * 0.6) ** 2 + c.sigma**2).sqrt().item()
        assert x.mean().item() == pytest.approx(1.5 * c.alpha.item(), abs=4 * expected / math.sqrt(32_000) + 0.005)
        assert x.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * 32_000) + 0.01)
    # Noise decouples the end from the start: the deterministic flow of this pair has correlation 1.
    assert torch.corrcoef(torch.stack([source.flatten(), x.flatten()]))[0, 1] < 0.9


def test_without_noise_it_is_euler():
    x, path = points(), CosinePath()
    assert torch.equal(end(EulerMaruyama(7, eta=0), path, x), end(Euler(7), path, x))


def test_the_score_of_another_source_scale():
    """Drift v + w s and noise sqrt(2 w h) for w = sigma std^2, one step from NumPy's formulas."""
    x, path, times = points(), LinearPath(), torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64)
    field = mixture_field(path)
    solver = EulerMaruyama(2, source_std=2.0)
    first = solver.for_path(path).solve(field, x, times).states[1]
    velocity = field(times[0], x)
    drift = velocity + 0.8 * 4 * path.velocity_to_score(velocity, x, times[0], 2.0)
    noise = (first - x - 0.1 * drift) / math.sqrt(2 * 0.8 * 4 * 0.1)
    assert noise.std().item() == pytest.approx(1, abs=0.4)
    unit = EulerMaruyama(2).for_path(path).solve(field, x, times).states[1]
    drift = velocity + 0.8 * path.velocity_to_score(velocity, x, times[0])
    torch.testing.assert_close((unit - x - 0.1 * drift) / math.sqrt(2 * 0.8 * 0.1), noise)


def test_noise_depends_on_the_sample_alone():
    x, path = points(9).float(), LinearPath()
    solver = EulerMaruyama(5)
    whole = end(solver, path, x)
    assert_near(end(solver, path, x[[4, 1]]), whole[[4, 1]], ulps=16)
    assert torch.equal(end(solver, path, x), whole)
    torch.testing.assert_close(end(solver, path, x.double()).float(), whole, rtol=1e-4, atol=1e-4)
    assert not torch.equal(end(EulerMaruyama(5, seed=1), path, x), whole)
    twins = end(solver, path, x[[2, 2]])
    assert_near(twins[0], twins[1], ulps=16)
    with torch.inference_mode():
        assert torch.equal(end(solver, path, x + 0), whole)


def test_long_solves_draw_fresh_noise(monkeypatch):
    monkeypatch.setattr("flowbench.flows.solver.diffusion._STEPS_AT_ONCE", 3)
    x = torch.zeros(2, 2).double()
    states = EulerMaruyama(12).for_path(LinearPath()).solve(lambda t, x: x / 1e9, x, torch.linspace(0, 1, 13)).states
    moves = states.diff(dim=0)[:-1, 0, 0]
    assert len(set(moves.tolist())) == 11


def test_data_cannot_be_encoded_with_noise():
    with pytest.raises(ValueError, match="cannot run backward from data to source: encode with an ODE solver"):
        end(EulerMaruyama(4), LinearPath(), points(), UNIT.flip(0))


# ---- what all share ----------------------------------------------------------------------------------

SOLVERS = [DDIM(6), DPMSolverPlusPlus2M(6), EulerMaruyama(6)]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)


@every_solver
def test_evaluations_are_counted(solver: DiffusionSolver):
    seen, path = [], CosinePath()
    field = mixture_field(path)
    bound = solver.for_path(path)
    stats = bound.solve(lambda t, x: seen.append(t.item()) or field(t, x), points(), UNIT).stats
    assert stats.network_evaluations == stats.accepted_steps == len(seen) == 6
    assert seen == bound.stage_times(UNIT)
    assert bound.with_evaluations(3).solve(field, points(), UNIT).stats.network_evaluations == 3


@every_solver
def test_binding_makes_a_copy_and_budgets_keep_it(solver: DiffusionSolver):
    bound = solver.for_path(LinearPath())
    assert (solver.path, type(bound)) == (None, type(solver))
    assert repr(bound) == repr(solver)
    assert bound.with_evaluations(4).path is bound.path
    with pytest.raises(ValueError, match=r"needs the schedule of a path: bind it with for_path"):
        solver.solve(mixture_field(LinearPath()), points(), UNIT)
    for ordinary in (Euler(2), RungeKutta4(2)):
        assert ordinary.for_path(LinearPath()) is ordinary


@every_solver
def test_states_at_several_times_keep_shape_and_type(solver: DiffusionSolver):
    x = points(3, 12).float().view(3, 3, 2, 2)
    solution = solver.for_path(LinearPath()).solve(lambda t, x: (1 + t) * x, x, torch.linspace(0, 1, 4))
    assert solution.states.shape == (4, 3, 3, 2, 2)
    assert solution.states.dtype == torch.float32
    assert torch.equal(solution.states[0], x)


def test_several_times_continue_the_history():
    path, x, times = CosinePath(), points(), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    solver = DPMSolverPlusPlus2M(8).for_path(path)
    through = solver.solve(mixture_field(path), x, times).states[-1]
    torch.testing.assert_close(through, solver.solve(mixture_field(path), x, times[[0, -1]]).states[-1])


@every_solver
def test_paths_and_uses_that_do_not_fit_are_refused(solver: DiffusionSolver):
    with pytest.raises(ValueError, match="which adds noise of its own: use an ODE solver"):
        solver.for_path(SchrodingerBridgePath(0.5))
    bound = solver.for_path(VariancePreservingPath())
    with pytest.raises(ValueError, match=r"is singular: stay strictly inside|cannot run backward"):
        bound.solve(lambda t, x: x, points(), UNIT.flip(0))
    with pytest.raises(ValueError, match="follows velocities of a path only"):
        log_likelihood(lambda t, x: x, points(), lambda z: z.sum(1), bound, ExactDivergence())


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="diffusion must be one of sigma, path, constant, got 'vp'"):
        EulerMaruyama(4, diffusion="vp")
    with pytest.raises(ValueError, match=r"eta must be a number in .*, got -1"):
        EulerMaruyama(4, eta=-1)
    with pytest.raises(ValueError, match="source_std must be a number in"):
        EulerMaruyama(4, source_std=0)
    with pytest.raises(ValueError, match=r'diffusion="path" is infinite at t = 0 of LinearPath\(\)'):
        end(EulerMaruyama(4, diffusion="path"), LinearPath(), points())


def test_names():
    assert repr(DDIM(5)) == "DDIM(num_steps=5)"
    assert repr(DPMSolverPlusPlus2M(5, EDMGrid())).startswith("DPMSolverPlusPlus2M(num_steps=5, grid=EDMGrid(")
    assert repr(EulerMaruyama(5)) == "EulerMaruyama(num_steps=5, diffusion='sigma', eta=1)"
    assert repr(EulerMaruyama(5, seed=2, source_std=0.5)).endswith("eta=1, seed=2, source_std=0.5)")
