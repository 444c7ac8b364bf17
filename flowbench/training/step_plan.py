"""How many steps fit into a number of seconds, estimated from the first ones of a training."""

from __future__ import annotations

import math

from flowbench.core.checks import LARGEST_BUDGET, check_number

__all__ = ["StepPlan"]

# The first steps are slower: memory is allocated, kernels are chosen or compiled.
SKIPPED_STEPS = 10
TIMED_STEPS = 30
# Of the seconds: the most that are spent on the estimate, where steps are long.
WARMUP_SHARE = 0.05


class StepPlan:
    """The number of steps that a training is given, so that its schedule ends after a number of seconds.

    The steps after the first few are timed, and the rest of the seconds is divided by their mean. The plan is made
    once: where the machine is slower or faster later on, the training takes longer or shorter, and its schedule ends.

    Attributes:
        steps: the whole number of steps, those of the estimate included; None until it is known.
        seconds_per_step: the estimate.

    Args:
        seconds: to be spent inside of training steps, above 0.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> plan = StepPlan(100.0)
        >>> for step in range(1, 51):
        ...     plan.note(step, 1.0 + 0.1 * step)  # the first step took a second more
        >>> plan.steps, round(plan.seconds_per_step, 3)
        (990, 0.1)
    """

    def __init__(self, seconds: float) -> None:
        check_number("seconds", seconds, above=0, at_most=LARGEST_BUDGET)
        self.seconds = seconds
        self.steps: int | None = None
        self.seconds_per_step: float | None = None
        self._began = self._timed_from = (0, 0.0)

    def note(self, steps: int, spent: float) -> None:
        """Take note of a step; the plan is made when enough of them are timed.

        Args:
            steps: done so far.
            spent: seconds of them.
        """
        if self.steps is not None:
            return
        done = steps - self._began[0]
        if done == SKIPPED_STEPS:
            self._timed_from = (steps, spent)
        waited = spent - self._began[1]
        if done >= SKIPPED_STEPS + TIMED_STEPS or waited >= WARMUP_SHARE * (self.seconds - self._began[1]):
            first, before = self._timed_from if done > SKIPPED_STEPS else self._began
            self._make((spent - before) / (steps - first), steps, spent)

    def go_on(self, steps: int, spent: float, seconds_per_step: float | None) -> None:
        """Plan from what an interrupted training measured; without a measurement, the next steps are timed.

        Args:
            steps: done before.
            spent: seconds of them, and of what came before the first one.
            seconds_per_step: None where it was interrupted before there was an estimate.
        """
        self.steps, self.seconds_per_step = None, None
        self._began = self._timed_from = (steps, spent)
        if seconds_per_step:
            self._make(seconds_per_step, steps, spent)

    def keep(self, steps: int, seconds_per_step: float) -> None:
        """Take the plan of the same seconds from a checkpoint."""
        self.steps, self.seconds_per_step = steps, seconds_per_step

    def _make(self, seconds_per_step: float, steps: int, spent: float) -> None:
        if seconds_per_step > 0:
            self.seconds_per_step = seconds_per_step
            # Below the steps that are done where more is spent than the seconds give.
            self.steps = max(1, steps + math.floor((self.seconds - spent) / seconds_per_step))
