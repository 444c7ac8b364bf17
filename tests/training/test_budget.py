from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flowbench.networks import CausalTransformer, DiT
from flowbench.training import Budget, BudgetLimit, Preparation, count_flops


def test_flops_of_a_linear_layer():
    layer, x = nn.Linear(30, 20), torch.randn(7, 30, requires_grad=True)
    # Forward, gradient of the weight, gradient of the input: a product of 7 x 30 x 20 each, two operations a term.
    assert count_flops(lambda: layer(x).sum()) == 3 * 2 * 7 * 30 * 20


def transformer_matmuls(batch: int, slots: int, width: int, depth: int, ratio: float) -> float:
    """Forward multiply-adds of the blocks: projections, MLP and both attention products, counted by hand."""
    per_token = 4 * width**2 + 2 * ratio * width**2
    return depth * batch * (slots * per_token + 2 * slots**2 * width)


def test_flops_of_a_causal_transformer_agree_with_the_analytic_count():
    batch, tokens, dim, width, depth = 4, 16, 3, 32, 3
    net = CausalTransformer(tokens, dim, width=width, depth=depth, head_dim=16)
    x = torch.randn(batch, tokens, dim, requires_grad=True)
    forward = transformer_matmuls(batch, tokens, width, depth, 4.0)
    forward += batch * tokens * width * 3 * dim  # embedding and output layer
    assert count_flops(lambda: net(x).square().sum()) == pytest.approx(3 * 2 * forward, rel=0.02)


def test_flops_of_a_dit_agree_with_the_analytic_count():
    batch, tokens, width, depth = 4, 16, 32, 2
    net = DiT((1, 8, 8), None, width=width, depth=depth, num_heads=2, patch_size=2)
    x = torch.randn(batch, 1, 8, 8, requires_grad=True)
    forward = transformer_matmuls(batch, tokens, width, depth, 4.0)
    forward += batch * (6 * depth + 2) * width**2  # adaptive norms: six vectors a block, two at the end
    counted = count_flops(lambda: net(x, torch.rand(batch)).square().sum())
    assert counted == pytest.approx(3 * 2 * forward, rel=0.08)


def test_flops_grow_with_the_batch():
    net = DiT((1, 8, 8), None, width=32, depth=1, num_heads=2, patch_size=2)
    counts = [count_flops(lambda n=n: net(torch.randn(n, 1, 8, 8), torch.rand(n)).sum()) for n in (4, 8)]
    assert counts[1] == 2 * counts[0]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def fake_trainer() -> SimpleNamespace:
    strategy = SimpleNamespace(reduce_boolean_decision=lambda value, all: value, broadcast=lambda value: value)
    return SimpleNamespace(global_step=0, should_stop=False, strategy=strategy)


MODULE = SimpleNamespace(device=torch.device("cpu"))


@given(durations=st.lists(st.floats(0.01, 2.0), min_size=1, max_size=20))
@settings(max_examples=20, deadline=None)
def test_seconds_are_those_inside_training_steps(durations):
    clock, trainer = Clock(), fake_trainer()
    budget = Budget(
        BudgetLimit("train_seconds", 5.0), flops_per_step=10, samples_per_step=4, num_train=100, clock=clock
    )
    spent = 0.0
    for step, duration in enumerate(durations, start=1):
        clock.now += 100.0  # validation, checkpoints: not counted
        budget.on_train_batch_start(trainer, MODULE, None, 0)
        clock.now += duration
        spent += duration
        trainer.global_step = step
        budget.on_train_batch_end(trainer, MODULE, None, None, 0)
        assert budget.train_seconds == pytest.approx(spent)
        assert trainer.should_stop == (spent >= 5.0)
        if trainer.should_stop:
            break
    assert budget.samples_seen == 4 * trainer.global_step
    assert budget.train_flops == 10 * trainer.global_step


def test_state_round_trip():
    def make() -> Budget:
        return Budget(BudgetLimit("steps", 8), flops_per_step=1, samples_per_step=1, num_train=100)

    a, b = make(), make()
    a.steps, a.train_seconds = 4, 1.5
    b.load_state_dict(a.state_dict())
    assert (b.progress, b.train_seconds, b.exhausted) == (0.5, 1.5, False)


def test_all_processes_follow_the_clock_of_the_first():
    """The learning rate follows the seconds: replicas with clocks of their own would drift apart."""
    clocks, trainers = [Clock(), Clock()], [fake_trainer(), fake_trainer()]
    limit = BudgetLimit("train_seconds", 5.0)
    first, second = (
        Budget(limit, flops_per_step=1, samples_per_step=1, num_train=100, clock=clock) for clock in clocks
    )
    trainers[1].strategy.broadcast = lambda value: first.train_seconds
    for step in range(1, 4):
        for budget, clock, trainer, seconds in zip((first, second), clocks, trainers, (1.0, 1.7), strict=True):
            budget.on_train_batch_start(trainer, MODULE, None, 0)
            clock.now += seconds
            trainer.global_step = step
            budget.on_train_batch_end(trainer, MODULE, None, None, 0)
        assert first.train_seconds == second.train_seconds == step
        assert first.progress_within(step) == second.progress_within(step)


def test_what_is_made_before_the_first_step_is_paid_from_the_budget():
    limit = BudgetLimit("train_flops", 1000.0)
    assert limit.max_steps(10, 4, 100) == 100
    assert limit.max_steps(10, 4, 100, spent_flops=255.0) == 74
    assert BudgetLimit("steps", 7).max_steps(10, 4, 100, spent_flops=255.0) == 7
    with pytest.raises(ValueError, match=r"does not pay for one step, which costs 10 after 995 before the first one"):
        limit.max_steps(10, 4, 100, spent_flops=995.0)


def test_preparation_counts_in_operations_and_seconds_and_travels_in_the_checkpoint():
    spent = Preparation(flops=255.0, seconds=2.0)
    settings = {"flops_per_step": 10, "samples_per_step": 4, "num_train": 100}
    budget = Budget(BudgetLimit("train_flops", 1000.0), **settings, preparation=spent)
    budget.steps, budget.train_seconds = 37, 2.0 + 37.0
    assert budget.train_flops == 370 + 255
    assert budget.step_seconds == 37.0
    assert budget.progress == 0.5
    # Where weights are only measured, nothing is prepared: the checkpoint holds what was.
    other = Budget(BudgetLimit("train_flops", 1000.0), **settings)
    other.load_state_dict(budget.state_dict())
    assert other.preparation == spent
    assert other.max_steps == 74
    assert other.train_flops == 625
    plain = Budget(BudgetLimit("train_flops", 1000.0), **settings)
    assert "preparation" not in plain.state_dict(), "as in files of earlier versions"


@pytest.mark.parametrize(("kind", "amount"), [("train_seconds", 10.0), ("train_hours", 10.0 / 3600)])
def test_seconds_before_the_first_step_are_a_part_of_a_limit_of_time(kind, amount):
    """The steps share what is left, and their schedule begins at 0: else warm-up would be skipped."""
    settings = {"flops_per_step": 1, "samples_per_step": 1, "num_train": 100}
    budget = Budget(BudgetLimit(kind, amount), **settings, preparation=Preparation(seconds=4.0))
    assert budget.progress == budget.progress_within(0) == 0.0
    budget.steps, budget.train_seconds = 3, 7.0
    assert budget.progress == pytest.approx(0.5)
    assert budget.progress_within(3) == pytest.approx(3.5 / 6), "half a step of one second on"
    budget.train_seconds = 10.0
    assert budget.exhausted
    with pytest.raises(ValueError, match=rf"{kind}=.* does not pay for one step after 10 s before the first one"):
        Budget(BudgetLimit(kind, amount), **settings, preparation=Preparation(seconds=10.0))
    lower = Budget(BudgetLimit(kind, 0.3 * amount), **settings)
    with pytest.raises(ValueError, match=rf"{kind}=.* does not pay for one step after 4 s before the first one"):
        lower.load_state_dict(budget.state_dict())
