"""Limits on training: what may be written, and the steps that they pay for."""

from __future__ import annotations

import pytest

from flowbench.core.budget import BudgetLimit, read_budgets


@pytest.mark.parametrize(
    ("mapping", "steps"),
    [
        ({"train_flops": 1e6}, 1000),
        ({"steps": 17}, 17),
        ({"samples_seen": 640}, 20),
        ({"epochs": 2}, 6),
        ({"train_seconds": 3.0}, None),
    ],
)
def test_limits_in_steps(mapping, steps):
    assert BudgetLimit.from_mapping(mapping).max_steps(1000, 32, 100) == steps


@pytest.mark.parametrize(
    "mapping",
    [{}, {"steps": 1, "epochs": 1}, {"hours": 1}, {"steps": 0}, {"steps": -1}, {"train_flops": float("inf")}],
)
def test_limits_that_are_none(mapping):
    with pytest.raises(ValueError, match="budget"):
        BudgetLimit.from_mapping(mapping)


def test_a_budget_below_one_step():
    with pytest.raises(ValueError, match="does not pay for one step"):
        BudgetLimit.from_mapping({"train_flops": 10}).max_steps(1000, 1, 1)


@pytest.mark.parametrize(
    ("mapping", "given"),
    [
        (None, {}),
        ({}, {}),
        ({"steps": None}, {}),
        ({"steps": None, "epochs": 0.5}, {"epochs": 0.5}),
        ({"steps": 3.0, "samples_seen": 10**9}, {"steps": 3.0, "samples_seen": 10**9}),
    ],
)
def test_what_is_null_is_not_set_and_several_kinds_are_read(mapping, given):
    assert read_budgets(mapping) == given


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            [1],
            "budget must be one of train_flops, train_seconds, train_hours, steps, samples_seen, epochs, "
            r"e.g. .*, got \[1\]",
        ),
        ({"epoch": 1}, r"budget: unknown kind 'epoch'; did you mean 'epochs'\?"),
        ({"steps": 0.5}, "budget.steps must be a whole number > 0, got 0.5"),
        ({"samples_seen": 2.5}, "budget.samples_seen must be a whole number > 0, got 2.5"),
        ({"epochs": 0}, r"budget.epochs must be a number in \(0, 1e\+30\], got 0"),
        ({"train_seconds": True}, r"budget.train_seconds must be a number in \(0, 1e\+30\], got True"),
    ],
)
def test_mistakes_are_named(mapping, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        read_budgets(mapping)
