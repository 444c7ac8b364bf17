"""Solvers against closed-form solutions, torchdiffeq's fixed-grid methods and counted evaluations."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from torchdiffeq._impl import rk_common

from flowbench.core.seeds import generator
from flowbench.flows import DormandPrince, Euler, Heun, LinearPath, Midpoint, RungeKutta4, Solver

FIXED = [Euler, Midpoint, Heun, RungeKutta4]
UNIT = torch.tensor([0.0, 1.0])
DOUBLE = UNIT.double()
MATRIX = torch.tensor([[-0.5, 1.0], [-1.2, 0.3]], dtype=torch.float64)
every_solver = pytest.mark.parametrize("solver", [*(m(48) for m in FIXED), DormandPrince(1e-9, 1e-9)], ids=repr)


class Counted:
    """Linear field with a time-dependent rate; counts its calls and remembers its times."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, t, x):
        self.times.append(t.item())
        return (1 + t) * x @ MATRIX.T.to(x.dtype)


def exact_solution(x, times):
    """x(t) = exp(M (t + t^2 / 2 - t0 - t0^2 / 2)) x(t0)."""
    clock = times + times**2 / 2
    return torch.stack([x @ torch.linalg.matrix_exp(MATRIX * (c - clock[0])).T for c in clock])


def points(*shape: int):
    return torch.randn(*shape, generator=generator(0, "points"), dtype=torch.float64)


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, 0.0)])
def test_error_falls_with_the_order_of_the_method(method, times):
    x, t = points(5, 2), torch.tensor(times).double()
    steps = np.array([8, 16, 32, 64])
    truth = exact_solution(x, t)[-1]
    errors = [(method(int(n)).solve(Counted(), x, t).states[-1] - truth).abs().max().item() for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(method(1).order, abs=0.2)


@pytest.mark.parametrize(
    ("method", "name"), [(Euler, "euler"), (Midpoint, "midpoint"), (Heun, "heun2"), (RungeKutta4, "rk4")]
)
@given(num_steps=st.integers(1, 7), backward=st.booleans())
@settings(max_examples=10, deadline=None)
def test_fixed_steps_agree_with_torchdiffeq(method, name, num_steps, backward):
    x = points(3, 2)

    def field(t, x):
        # Its "rk4" is the 3/8 rule, equal to the classical method on linear autonomous fields only.
        return x @ MATRIX.T if name == "rk4" else torch.sin(3 * x) + t

    t = DOUBLE.flip(0) if backward else DOUBLE
    grid = torch.linspace(t[0], t[1], num_steps + 1, dtype=torch.float64)
    reference = torchdiffeq.odeint(field, x, grid, method=name)[-1]
    states = method(num_steps).solve(field, x, t).states
    torch.testing.assert_close(states[-1], reference)


@every_solver
@pytest.mark.parametrize("backward", [False, True])
def test_states_at_all_times_and_back(solver: Solver, backward: bool):
    x = points(4, 2)
    times = torch.tensor([0.1, 0.3, 0.4, 0.9], dtype=torch.float64)
    times = times.flip(0) if backward else times
    solution = solver.solve(Counted(), x, times)
    assert solution.states.shape == (4, 4, 2)
    assert torch.equal(solution.states[0], x)
    if solver.order > 1:
        torch.testing.assert_close(solution.states, exact_solution(x, times), rtol=1e-3, atol=1e-3)
    back = solver.solve(Counted(), solution.states[-1], times.flip(0)).states[-1]
    torch.testing.assert_close(back, x, rtol=0, atol=0.1 if solver.order == 1 else 1e-3)


@pytest.mark.parametrize(("method", "stages"), [(Euler, 1), (Midpoint, 2), (Heun, 2), (RungeKutta4, 4)])
@given(num_steps=st.integers(1, 9))
@settings(max_examples=10, deadline=None)
def test_fixed_steps_count_their_evaluations(method, stages: int, num_steps: int):
    field = Counted()
    stats = method(num_steps).solve(field, points(2, 2), DOUBLE).stats
    assert len(field.times) == stats.network_evaluations == stages * num_steps
    assert (stats.accepted_steps, stats.rejected_steps) == (num_steps, 0)
    assert method(1).evaluations_per_step == stages
    assert 0 <= min(field.times) <= max(field.times) <= 1


def test_times_of_the_last_stage_are_exact():
    field = Counted()
    Heun(7).solve(field, points(2, 2), torch.tensor([0.3, 0.9], dtype=torch.float64))
    assert field.times[-1] == 0.9
    assert max(field.times) == 0.9


@pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.25, 1.0)])
def test_dormand_prince_counts_every_call(times):
    field = Counted()
    stats = DormandPrince(1e-8, 1e-8).solve(field, 3 * points(4, 2), torch.tensor(times).double()).stats
    assert len(field.times) == stats.network_evaluations
    # First-same-as-last: six evaluations per attempted step, and two to start.
    assert stats.network_evaluations == 6 * (stats.accepted_steps + stats.rejected_steps) + 2
    assert 0 <= min(field.times) <= max(field.times) <= 1


def test_dormand_prince_counts_rejected_steps():
    stats = (
        DormandPrince(1e-7, 1e-7)
        .solve(lambda t, x: torch.where(t < 0.5, 0.0, 50.0) * torch.cos(40 * x + t), points(4, 2), DOUBLE)
        .stats
    )
    assert stats.rejected_steps > 0
    assert stats.network_evaluations == 6 * (stats.accepted_steps + stats.rejected_steps) + 2


def test_dormand_prince_never_leaves_the_interval():
    field = Counted()
    # A tiny slope makes the probe for the first step reach far.
    DormandPrince().solve(lambda t, x: 1e-4 * field(t, x), 10 + points(4, 2), DOUBLE)
    assert 0 <= min(field.times) <= max(field.times) <= 1
    # A field that is not defined beyond the last time: int_0^1 sqrt(1 - t) dt = 2 / 3.
    states = DormandPrince(1e-4, 1e-4).solve(lambda t, x: (1 - t).sqrt() + 0 * x, points(2, 2), DOUBLE).states
    expected = torch.full((2, 2), 2 / 3, dtype=torch.float64)
    torch.testing.assert_close(states[-1] - states[0], expected, rtol=1e-3, atol=1e-3)


def test_dormand_prince_that_fails_says_so():
    with pytest.raises(RuntimeError, match="look for a non-finite field"):
        DormandPrince().solve(lambda t, x: x * float("nan"), points(2, 2), DOUBLE)
    with pytest.raises(RuntimeError, match="max_num_steps"):
        DormandPrince(1e-9, 1e-9, max_steps=3).solve(Counted(), points(2, 2), DOUBLE)


def test_an_adaptive_solve_ends_without_assertions_too(monkeypatch):
    """As under ``python -O``, which leaves out the assertions by which torchdiffeq gives up."""
    optimised = dict(vars(rk_common))
    exec(compile(inspect.getsource(rk_common), rk_common.__file__, "exec", optimize=1), optimised)
    for name in ("_advance", "_adaptive_step"):
        method = getattr(optimised["RKAdaptiveStepsizeODESolver"], name)
        monkeypatch.setattr(rk_common.RKAdaptiveStepsizeODESolver, name, method)
    x = torch.tensor([[1.0, -1.0], [2.0, -2.0]], dtype=torch.float64)  # one sign blows up each way
    for field, reason in (
        (lambda t, x: x / (0.5 - t), "underflow|max_num_steps|non-finite"),
        (lambda t, x: x * math.nan, "underflow|non-finite"),
        (lambda t, x: x**2 * 1e6, "underflow|max_num_steps|non-finite"),
    ):
        for times in (DOUBLE, DOUBLE.flip(0)):
            with pytest.raises(RuntimeError, match=f"failed \\(({reason})"):
                DormandPrince(1e-9, 1e-9, max_steps=200).solve(field, x, times)
    many = torch.linspace(0, 1, 9, dtype=torch.float64)
    DormandPrince(1e-6, 1e-6, max_steps=20).solve(lambda t, x: 20 * (20 * t).cos() * x, x, many)  # 20 between two times


@pytest.mark.parametrize("method", [Midpoint, Heun, RungeKutta4])
def test_one_evaluation_buys_an_euler_step(method):
    cheap = method(10).with_evaluations(1)
    assert isinstance(cheap, Euler)
    assert cheap.num_steps == 1


@pytest.mark.parametrize("method", FIXED)
@given(budget=st.integers(4, 40))
@settings(max_examples=20, deadline=None)
def test_budgets_are_spent_exactly_or_refused(method, budget):
    stages = method(1).evaluations_per_step
    if budget % stages:
        with pytest.raises(ValueError, match=f"cannot use exactly {budget}: choose a positive multiple"):
            method(3).with_evaluations(budget)
    else:
        solver = method(3).with_evaluations(budget)
        assert type(solver) is method
        assert solver.solve(Counted(), points(1, 2), DOUBLE).stats.network_evaluations == budget


def test_an_adaptive_solver_takes_no_budget():
    with pytest.raises(ValueError, match="chooses its own number"):
        DormandPrince().with_evaluations(20)
    with pytest.raises(ValueError, match="choose a positive multiple"):
        Euler(3).with_evaluations(0)


def test_one_euler_step_is_exact_on_a_straight_flow():
    """Optimal transport between Gaussians: v(t, x) = m + (A - I)((1 - t) I + t A)^-1 (x - t m)."""
    root = torch.tensor([[1.5, 0.3], [0.3, 0.7]], dtype=torch.float64)
    shift, identity = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.eye(2, dtype=torch.float64)

    def field(t, x):
        return shift + (x - t * shift) @ torch.linalg.inv((1 - t) * identity + t * root) @ (root - identity)

    x = points(20, 2)
    expected = shift + x @ root
    torch.testing.assert_close(Euler(1).solve(field, x, DOUBLE).states[-1], expected)
    torch.testing.assert_close(RungeKutta4(10).solve(field, x, DOUBLE).states[-1], expected)


@pytest.mark.parametrize("solver", [RungeKutta4(50), DormandPrince(1e-10, 1e-10)], ids=repr)
def test_independent_gaussians_flow_to_the_scaled_source(solver: Solver):
    """The flow-matching minimiser between N(0, a^2) and N(m, b^2) maps z to m + (b / a) z."""
    a, b, shift = 1.3, 0.4, 2.0
    path = LinearPath()

    def field(t, x):
        c = path.coefficients(t)
        variance = (c.sigma * a) ** 2 + (c.alpha * b) ** 2
        slope = (c.sigma * c.d_sigma * a**2 + c.alpha * c.d_alpha * b**2) / variance
        return c.d_alpha * shift + slope * (x - c.alpha * shift)

    z = a * points(10, 3)
    end = solver.solve(field, z, DOUBLE).states[-1]
    torch.testing.assert_close(end, shift + b / a * z, rtol=1e-5, atol=1e-5)
    # One Euler step of this curved flow falls on the mean instead: v(0, z) = m - z.
    torch.testing.assert_close(Euler(1).solve(field, z, DOUBLE).states[-1], torch.full_like(z, shift))


@every_solver
def test_states_keep_shape_and_dtype_and_carry_gradients(solver: Solver):
    x = points(2, 1, 3, 3).float().requires_grad_()
    rate = torch.tensor(-1.0, requires_grad=True)
    states = solver.solve(lambda t, x: rate * x.double(), x, UNIT).states
    assert states.dtype == torch.float32
    assert states.shape == (2, 2, 1, 3, 3)
    states[-1].sum().backward()
    decay = math.exp(-1)
    torch.testing.assert_close(x.grad, torch.full_like(x, decay), rtol=0.02, atol=0)
    torch.testing.assert_close(rate.grad, x.sum().detach() * decay, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("solver", [Euler(4), DormandPrince()], ids=repr)
@pytest.mark.parametrize("times", [[0.0], [0.0, 0.0], [0.0, 1.0, 0.5], [[0.0, 1.0]], [0.0, float("nan")]])
def test_times_must_be_monotonic(solver: Solver, times):
    with pytest.raises(ValueError, match="strictly increasing or decreasing"):
        solver.solve(Counted(), points(1, 2), torch.tensor(times))


@pytest.mark.parametrize("solver", [Euler(4), DormandPrince()], ids=repr)
def test_a_field_of_another_shape_is_refused(solver: Solver):
    with pytest.raises(ValueError, match=r"must return the shape of its states \(3, 2\), got \(3, 1\)"):
        solver.solve(lambda t, x: x[:, :1], points(3, 2), DOUBLE)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="multiple of the 3 intervals between the requested times, got 4"):
        Euler(4).solve(Counted(), points(1, 2), torch.linspace(0, 1, 4))
    with pytest.raises(ValueError, match="num_steps must be a whole number in"):
        Heun(0)
    with pytest.raises(ValueError, match="rtol must be a number in"):
        DormandPrince(rtol=0)
    with pytest.raises(TypeError):
        Euler(4, rtol=1e-5)  # an option that the method does not use


def test_representations_name_method_and_effort():
    assert repr(RungeKutta4(8)) == "RungeKutta4(num_steps=8)"
    assert repr(DormandPrince(1e-4, 1e-5)) == "DormandPrince(rtol=0.0001, atol=1e-05)"


def test_runge_kutta_4_spends_two_evaluations_on_a_midpoint_step():
    assert repr(RungeKutta4(10).with_evaluations(2)) == repr(Midpoint(1))
    assert repr(RungeKutta4(10).with_evaluations(8)) == repr(RungeKutta4(2))
    with pytest.raises(ValueError, match="4 evaluations per step"):
        RungeKutta4(10).with_evaluations(3)
