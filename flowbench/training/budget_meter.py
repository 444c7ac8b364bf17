"""The training budget of a contender, and how much of it is used."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L

from flowbench.core.budget import BudgetLimit
from flowbench.core.checks import LARGEST_BUDGET, check_count
from flowbench.training.preparation import Preparation
from flowbench.training.step_plan import StepPlan
from flowbench.training.step_timer import StepTimer

__all__ = ["Budget"]

# Steps that a device may lag behind the host when a limit of time is looked at.
STEPS_BEHIND = 2


class Budget(L.Callback):
    """Meters training and stops it when the limit is reached; its state travels in the checkpoint.

    Attributes:
        ended_early: a callback of the experiment ended the training before the limit, as early stopping does.
        max_steps: the limit in steps, without what was spent before the first; None of a limit in seconds, and of one
            in hours as long as its plan is not made.
        plan: how many steps a limit in hours gives; None of other limits.
        changed_from: the limit that a loaded checkpoint was trained under, where it was another one.

    Args:
        limit: what may be spent.
        flops_per_step: operations of one optimiser step over the global batch, >= 0.
        samples_per_step: samples of one optimiser step over all processes, >= 1.
        num_train: samples that are trained on, >= 1, which a limit in epochs counts.
        preparation: what was spent before the first step, which is a part of what the limit gives in operations or
            seconds. None is nothing. A checkpoint brings that of its own training.
        clock: seconds, monotonic; tests pass their own.

    Raises:
        ValueError: for a number out of range, or a limit that does not pay for one step after the preparation.

    Example:
        >>> budget = Budget(BudgetLimit("steps", 10), flops_per_step=10**9, samples_per_step=50, num_train=1000)
        >>> budget.progress, budget.exhausted
        (0.0, False)
        >>> budget.progress_within(5)  # in the middle of the sixth of ten steps
        0.55
    """

    def __init__(
        self,
        limit: BudgetLimit,
        *,
        flops_per_step: int,
        samples_per_step: int,
        num_train: int,
        preparation: Preparation | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        check_count("flops_per_step", flops_per_step, at_least=0, at_most=LARGEST_BUDGET)
        check_count("samples_per_step", samples_per_step)
        check_count("num_train", num_train)
        self.limit = limit
        self.flops_per_step = flops_per_step
        self.samples_per_step = samples_per_step
        self.num_train = num_train
        self.steps = 0
        self._prepare(preparation or Preparation())
        self.train_seconds = self.preparation.seconds
        self.plan = StepPlan(limit.seconds) if limit.is_planned and limit.seconds is not None else None
        if self.plan is not None:
            self.plan.go_on(0, self.preparation.seconds, None)
        self._timer = StepTimer(clock)
        self.ended_early = False
        self.changed_from: BudgetLimit | None = None

    def _prepare(self, spent: Preparation) -> None:
        """Count what was spent before the first step, and what the limit leaves for steps after it.

        Raises:
            ValueError: it leaves less than one step.
        """
        seconds, before = self.limit.seconds, spent.seconds
        if seconds is not None and before >= seconds:
            raise ValueError(
                f"budget.{self.limit.kind}={self.limit.amount:g} ({seconds:g} s) does not pay for one step after "
                f"{before:g} s before the first one: raise the budget or make less beforehand"
            )
        self.max_steps = self.limit.max_steps(self.flops_per_step, self.samples_per_step, self.num_train, spent.flops)
        self.preparation = spent

    @property
    def samples_seen(self) -> int:
        """Training samples over all processes, repeats included."""
        return self.steps * self.samples_per_step

    @property
    def train_flops(self) -> float:
        """Operations spent in training steps and before them, over all processes."""
        return float(self.steps) * self.flops_per_step + self.preparation.flops

    @property
    def step_seconds(self) -> float:
        """Wall time inside training steps: without what was spent before them."""
        return self.train_seconds - self.preparation.seconds

    @property
    def progress(self) -> float:
        """Share of what the limit leaves for steps that is used up, in [0, 1]."""
        if self.max_steps is not None:
            return min(1.0, self.steps / self.max_steps)
        return self._share(self.step_seconds)

    def _share(self, seconds: float) -> float:
        """What steps of so many seconds are of those that a limit of time leaves them."""
        left = (self.limit.seconds or 1.0) - self.preparation.seconds
        return min(1.0, seconds / left) if left > 0 else 1.0

    def progress_within(self, step: int) -> float:
        """Progress in the middle of step number `step`, counted from 0, as the learning-rate schedule wants it."""
        if self.max_steps is not None:
            return min(1.0, (step + 0.5) / self.max_steps)
        per_step = self.step_seconds / self.steps if self.steps else 0.0
        return self._share(self.step_seconds + 0.5 * per_step)

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left."""
        return self.progress >= 1.0

    @property
    def overspent(self) -> bool:
        """Whether more is spent than the limit gives, because it was lowered afterwards."""
        if self.max_steps is not None:
            return self.steps > self.max_steps
        return self.changed_from is not None and self.train_seconds > (self.limit.seconds or 0.0)

    @property
    def finished(self) -> bool:
        """Whether training has ended as the experiment says: by the limit, or by one of its callbacks."""
        return self.exhausted or self.ended_early

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Under a changed limit the next step's learning rate is not the one in the checkpoint."""
        if self.changed_from is not None:
            for config in trainer.lr_scheduler_configs:
                scheduler: Any = config.scheduler
                scheduler.step()

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock; validation and checkpoints in between do not count."""
        self._timer.start(module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock, count the step, stop the training when the limit is reached on any process."""
        self._timer.stop(module.device)
        # A limit of time must not fall far behind the device; elsewhere what has not finished is collected later.
        self.train_seconds += self._timer.collect(STEPS_BEHIND if self.max_steps is None else None)
        self.steps = trainer.global_step
        if self.max_steps is None:
            # The schedule follows the clock: with clocks of their own, replicas would step at different rates.
            self.train_seconds = trainer.strategy.broadcast(self.train_seconds)
            if self.plan is not None and self.steps:
                self.plan.note(self.steps, self.train_seconds)
                self.max_steps = self.plan.steps
        # The trainer ends after a number of steps by itself only where it was known before.
        if self.limit.seconds is not None and self._is_over(trainer):
            trainer.should_stop = True

    def _is_over(self, trainer: L.Trainer) -> bool:
        """Whether a limit of time is reached on any process; a planned number of steps is reached on all at once."""
        if self.max_steps is not None:
            return self.exhausted
        return bool(trainer.strategy.reduce_boolean_decision(self.exhausted, all=False))

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Wait for the last steps."""
        self.train_seconds += self._timer.collect(0)

    def state_dict(self) -> dict[str, Any]:
        """What is spent, and on which limit; waits for the device."""
        self.train_seconds += self._timer.collect(0)
        return {
            "steps": self.steps,
            "train_seconds": self.train_seconds,
            "kind": self.limit.kind,
            "amount": self.limit.amount,
            "ended_early": self.ended_early,
            **self._planned(),
            **self._prepared(),
        }

    def _planned(self) -> dict[str, Any]:
        """The plan of a limit in hours, once it is made."""
        if self.plan is None or self.plan.steps is None:
            return {}
        return {"planned_steps": self.plan.steps, "seconds_per_step": self.plan.seconds_per_step}

    def _prepared(self) -> dict[str, Any]:
        """What was spent before the first step, where something was."""
        spent = self.preparation
        return {} if spent == Preparation() else {"preparation": {"flops": spent.flops, "seconds": spent.seconds}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; what ended training early under another limit does not end it under this one.

        Raises:
            ValueError: the limit does not pay for one step after what the checkpoint's training spent before its first.
        """
        self._prepare(Preparation(**state_dict.get("preparation", {})))
        self.steps = int(state_dict["steps"])
        self.train_seconds = float(state_dict["train_seconds"])
        before = BudgetLimit(state_dict["kind"], state_dict["amount"])
        self.changed_from = None if before == self.limit else before
        self.ended_early = before == self.limit and bool(state_dict.get("ended_early", False))
        if self.plan is not None:
            measured = state_dict.get("seconds_per_step")
            if measured and before == self.limit:
                self.plan.keep(int(state_dict["planned_steps"]), float(measured))
            else:
                self.plan.go_on(self.steps, self.train_seconds, measured)
            self.max_steps = self.plan.steps
