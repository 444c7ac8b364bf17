"""A limit in hours: planned from the first steps, ended in time, gone on with, and carried by checkpoints."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from flowbench.training import Budget, BudgetLimit, Preparation
from flowbench.training.step_plan import StepPlan

MODULE = SimpleNamespace(device=torch.device("cpu"))


class Training:
    """Steps of given seconds under a budget, without a model."""

    def __init__(self, hours: float, state: dict | None = None, before: float = 0.0) -> None:
        self.now = 0.0
        strategy = SimpleNamespace(reduce_boolean_decision=lambda value, all: value, broadcast=lambda value: value)
        self.trainer = SimpleNamespace(global_step=0, should_stop=False, strategy=strategy)
        limit = BudgetLimit("train_hours", hours)
        settings = {"flops_per_step": 1, "samples_per_step": 1, "num_train": 100}
        self.budget = Budget(limit, **settings, preparation=Preparation(seconds=before), clock=lambda: self.now)
        if state is not None:
            self.budget.load_state_dict(state)
            self.trainer.global_step = self.budget.steps

    def step(self, seconds: float) -> None:
        self.budget.on_train_batch_start(self.trainer, MODULE, None, 0)
        self.now += seconds
        self.trainer.global_step += 1
        self.budget.on_train_batch_end(self.trainer, MODULE, None, None, 0)

    def until_the_end(self, seconds: float) -> list[float]:
        """The progress in the middle of every step, which the learning rate follows."""
        found = []
        while not self.trainer.should_stop:
            found.append(self.budget.progress_within(self.trainer.global_step))
            self.step(seconds)
            assert len(found) < 10**5
        return found


def test_the_schedule_reaches_its_end_in_time():
    training = Training(hours=0.1)
    for _ in range(5):
        training.step(2.0)  # the first steps are slow, and not taken for the pace
    progress = training.until_the_end(0.5)
    # 10 s of slow steps, and (360 - 10) / 0.5 others.
    assert training.budget.steps == 705
    assert training.budget.train_seconds == pytest.approx(360)
    assert progress[40:] == sorted(progress[40:])
    assert progress[-1] == pytest.approx(704.5 / 705)
    late = [b - a for a, b in pairwise(progress[100:])]
    assert max(late) == pytest.approx(min(late)), "after the estimate every step is an equal share"


def test_a_machine_that_slows_down_ends_the_schedule_and_not_the_clock():
    training = Training(hours=0.1)
    for _ in range(100):
        training.step(0.5)
    assert training.budget.max_steps == 720
    training.until_the_end(1.0)
    assert training.budget.steps == 720
    assert training.budget.train_seconds == pytest.approx(50 + 620)


def test_steps_that_are_long_are_not_waited_for():
    training = Training(hours=0.1)
    training.step(18.0)  # a twentieth of the limit
    assert training.budget.max_steps == 20


def test_what_came_before_the_first_step_is_no_part_of_the_pace():
    training = Training(hours=1.0, before=300.0)
    for _ in range(39):
        training.step(0.1)
    assert training.budget.max_steps is None, "300 s before the steps are no reason to stop timing them"
    training.step(0.1)
    assert training.budget.max_steps == pytest.approx(33_000, abs=1)
    again = Training(hours=1.0, state=training.budget.state_dict())
    assert again.budget.max_steps == training.budget.max_steps


def test_a_resumed_training_keeps_the_estimate():
    whole, first = Training(hours=0.1), Training(hours=0.1)
    for _ in range(200):
        whole.step(0.5)
        first.step(0.5)
    rest = Training(hours=0.1, state=first.budget.state_dict())
    assert rest.until_the_end(0.7) == whole.until_the_end(0.7)
    assert rest.budget.steps == whole.budget.steps == 720


def test_one_that_is_interrupted_before_the_estimate_times_the_next_steps():
    first = Training(hours=0.1)
    for _ in range(8):
        first.step(1.0)
    rest = Training(hours=0.1, state=first.budget.state_dict())
    for _ in range(10):
        rest.step(3.0)
        assert rest.budget.max_steps is None or rest.budget.train_seconds >= 18
    rest.until_the_end(0.5)
    assert rest.budget.exhausted


@pytest.mark.parametrize(("hours", "steps"), [(0.2, 1440), (0.05, 360)])
def test_another_number_of_hours_is_planned_from_what_was_measured(hours, steps):
    first = Training(hours=0.1)
    for _ in range(200):
        first.step(0.5)
    changed = Training(hours, state=first.budget.state_dict())
    assert changed.budget.changed_from == BudgetLimit("train_hours", 0.1)
    assert changed.budget.max_steps == steps
    assert not changed.budget.overspent


def test_fewer_hours_than_are_spent_are_refused():
    first = Training(hours=0.1)
    for _ in range(200):
        first.step(0.5)
    assert Training(0.01, state=first.budget.state_dict()).budget.overspent


def test_other_limits_have_no_plan():
    budget = Budget(BudgetLimit("train_seconds", 5), flops_per_step=1, samples_per_step=1, num_train=100)
    assert budget.plan is None
    assert "planned_steps" not in budget.state_dict()
    assert BudgetLimit("train_hours", 2).seconds == 7200
    assert BudgetLimit("train_hours", 2).max_steps(1, 1, 1) is None
    assert BudgetLimit("steps", 2).seconds is None


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf")])
def test_seconds_out_of_range_are_refused(seconds):
    with pytest.raises(ValueError, match="seconds"):
        StepPlan(seconds)
