"""Fields with a memory: one commit for each accepted step, at its start, and refusals where commits would be lost."""

from __future__ import annotations

import pytest
import torch

from flowbench.flows import (
    DDIM,
    CosinePath,
    DormandPrince,
    DPMSolverPlusPlus2M,
    EDMGrid,
    Euler,
    EulerMaruyama,
    ExactDivergence,
    GaussianSource,
    Heun,
    LinearPath,
    Midpoint,
    RescheduledField,
    RungeKutta4,
    log_likelihood,
    sample_with_log_prob,
)

UNIT = torch.tensor([0.0, 1.0], dtype=torch.float64)
FIXED = [
    Euler(6),
    Midpoint(6),
    Heun(6),
    RungeKutta4(6),
    Euler(6, grid=EDMGrid()),
    DDIM(6).for_path(LinearPath()),
    DPMSolverPlusPlus2M(6).for_path(LinearPath()),
    EulerMaruyama(6).for_path(LinearPath()),
]
every_fixed = pytest.mark.parametrize("solver", FIXED, ids=repr)


class Remembering:
    """A linear field that writes down its evaluations and its commits, in their order."""

    def __init__(self, rate: float = -1.0):
        self.rate = rate
        self.events: list[tuple[str, float, torch.Tensor]] = []

    def __call__(self, t, x):
        self.events.append(("evaluated", float(t), x))
        return self.rate * x

    def commit(self, t, x):
        self.events.append(("committed", t, x))

    def named(self, name):
        return [(t, x) for what, t, x in self.events if what == name]


@every_fixed
def test_one_commit_for_each_step_at_its_start(solver):
    field, x = Remembering(), torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = solver.solve(field, x, UNIT)
    commits = field.named("committed")
    assert [t for t, _ in commits] == [step.start for step in solver.steps(UNIT)]
    assert len(commits) == solution.stats.accepted_steps == 6
    # What is committed is what a step began with: the state at which its first evaluation was made.
    per_step = len(field.events) // 6
    for step in range(6):
        events = field.events[step * per_step : (step + 1) * per_step]
        assert [what for what, _, _ in events] == ["evaluated"] * (per_step - 1) + ["committed"]
        assert events[0][2] is events[-1][2]
        assert events[0][1] == pytest.approx(events[-1][1])


@every_fixed
def test_a_memory_that_is_not_looked_at_changes_nothing(solver):
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    plain = solver.solve(lambda t, x: -x, x, UNIT).states
    assert torch.equal(solver.solve(Remembering(), x, UNIT).states, plain)


@pytest.mark.parametrize("times", [(0.0, 0.5, 1.0), (1.0, 0.5, 0.0)])
@pytest.mark.parametrize("method", [Euler, Midpoint, Heun, RungeKutta4])
def test_steps_between_requested_times_and_backward_steps_are_committed_too(method, times):
    field = Remembering()
    method(4).solve(field, torch.ones(1, 1), torch.tensor(times))
    starts = torch.tensor([t for t, _ in field.named("committed")])
    torch.testing.assert_close(starts, torch.linspace(times[0], times[-1], 5)[:-1])


def test_an_adaptive_method_commits_accepted_steps_and_no_rejected_ones():
    class Switching(Remembering):
        def __call__(self, t, x):
            return super().__call__(t, x) * (1.0 if float(t) < 0.5 else 200.0)

    field = Switching()
    solution = DormandPrince(1e-6, 1e-6).solve(field, torch.ones(2, 1, dtype=torch.float64), UNIT)
    commits = field.named("committed")
    assert solution.stats.rejected_steps > 0
    assert len(commits) == solution.stats.accepted_steps
    starts = [t for t, _ in commits]
    assert starts == sorted(set(starts))
    assert starts[0] == 0.0


def test_what_would_lose_the_commits_is_refused():
    x, field, source = torch.ones(2, 2), Remembering(), GaussianSource()
    with pytest.raises(ValueError, match="a step size per sample needs a velocity of time and state alone"):
        DormandPrince(per_sample=True).solve(field, x, UNIT)
    with pytest.raises(ValueError, match="sampling along another path needs"):
        RescheduledField(field, LinearPath(), CosinePath())
    for call in (log_likelihood, sample_with_log_prob):
        with pytest.raises(ValueError, match="a density by change of variables needs"):
            call(field, x, source.log_prob, Euler(2), ExactDivergence())
