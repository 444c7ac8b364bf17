"""A run while it trains: what it resumes, when its training is finished, and what is noted of its end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from flowbench.config import Built, Experiment
from flowbench.core.endings import ProcessEnded, describe, keep_details, note, notes, reason
from flowbench.core.launch import is_first_process
from flowbench.core.stopping import LISTENER, Stopped, reason_of_exit
from flowbench.evaluation.curve import Curve
from flowbench.training import Budget, BudgetLimit, TrainingModule, load_checkpoint
from flowbench.training.interruption import ProcessWatch, speak_of_loss
from flowbench.training.progress import ProgressFile

__all__ = ["Run", "last_checkpoint", "load_weights", "noting_the_end", "resume_training", "train"]


@dataclass
class Run:
    """A built experiment with its trainer."""

    experiment: Experiment
    built: Built
    module: TrainingModule
    budget: Budget | None
    trainer: L.Trainer
    progress: ProgressFile
    loaded_step: int | None = None

    @property
    def checkpoint(self) -> Path:
        """Path of the run's checkpoint: weights and state."""
        return last_checkpoint(self.experiment.run_dir)


def last_checkpoint(run_dir: Path) -> Path:
    """The checkpoint from which a run goes on, and which is measured."""
    return run_dir / "checkpoints" / "last.ckpt"


def resume_training(run: Run) -> bool:
    """Load the last checkpoint, where there is one; True when training goes on from it.

    Raises:
        ValueError: when the budget was lowered below what is spent.
    """
    if not run.checkpoint.is_file():
        return False
    load_weights(run, run.checkpoint)
    budget = run.budget
    if budget is not None and budget.changed_from is not None:
        _accept_change(run, budget, budget.changed_from)
    return True


def _accept_change(run: Run, budget: Budget, before: BudgetLimit) -> None:
    now = budget.limit
    change = f"budget.{before.kind} {before.amount:g} -> budget.{now.kind} {now.amount:g}"
    if budget.overspent:
        raise ValueError(
            f"{run.experiment.run_dir} has trained {budget.steps} steps, more than the budget now gives ({change}): "
            "give a larger budget, or another run.dir or run.name"
        )
    if run.trainer.is_global_zero and not budget.exhausted:
        print(
            f"{change}: training goes on from step {budget.steps}; its learning rate is now that of "
            f"{budget.progress:.0%} of the budget, so the weights will not be those of one training with this budget",
            file=sys.stderr,
            flush=True,
        )


def train(run: Run, resumed: bool) -> None:
    """Fit until the budget is used up; nothing to do when it is so already."""
    budget, trainer = run.budget, run.trainer
    if budget is None or not budget.finished:
        path = str(run.checkpoint) if resumed else None
        trainer.fit(run.module, datamodule=run.built.datamodule, ckpt_path=path, weights_only=True)
        if getattr(trainer, "fast_dev_run", False):
            return
        if budget is not None:
            _check_end(budget, trainer)
        trainer.save_checkpoint(run.checkpoint, weights_only=False)
    else:
        _make_up(run, budget.steps)
    run.progress.trained = True
    LISTENER.raise_pending()


def _make_up(run: Run, step: int) -> None:
    """Measure the last point of the curve, where a run was killed between its last checkpoint and that."""
    evaluator, trainer = run.built.evaluator, run.trainer
    if evaluator is None or not evaluator.curve or not Curve.of(trainer).lacks(trainer, step):
        return
    evaluator.missing_step = step
    # The trainer counts from 0 here: loggers would get the point at that step.
    loggers, trainer.loggers = trainer.loggers, []
    trainer.validate(run.module, datamodule=run.built.datamodule, verbose=False)
    evaluator.missing_step, trainer.loggers = None, loggers


def _check_end(budget: Budget, trainer: L.Trainer) -> None:
    """Training that ends before its budget is finished only if a callback of the experiment ended it.

    Raises:
        ValueError: when nothing of the kind did.
    """
    if budget.exhausted:
        return
    budget.ended_early = trainer.should_stop
    if not budget.ended_early:
        raise ValueError(
            f"training ended after {budget.steps} steps, at {budget.progress:.0%} of its budget, and no callback asked "
            "for it: look at trainer.limit_train_batches and trainer.overfit_batches"
        )


def load_weights(run: Run, path: Path) -> None:
    """Load weights and what training had spent."""
    state = load_checkpoint(run.module, path)
    run.loaded_step = state.get("global_step")
    if run.budget is not None:
        spent = state.get("callbacks", {}).get(run.budget.state_key)
        if spent is not None:
            run.budget.load_state_dict(spent)


@contextmanager
def noting_the_end(run: Run, phase: str | None = None) -> Iterator[None]:
    """Record the cause that ends a run: in progress.json, in the log of errors, and on the exception.

    Args:
        run: the run.
        phase: for progress.json; None stands for how the run ended.
    """
    watch = ProcessWatch(run.trainer, run.progress.path)
    try:
        yield
    except BaseException as raised:
        cause = _noted(run, reason_of_exit(raised) if isinstance(raised, SystemExit) else raised, watch, phase)
        watch.close(failed=True)
        if cause is raised:
            raise
        raise cause from raised
    watch.close(failed=False)


def _noted(run: Run, error: BaseException, watch: ProcessWatch, phase: str | None) -> BaseException:
    """Note what an exception ended; returns it, or the end of another process that caused it."""
    # Of a mistake that is found before the first step, the message is enough.
    is_plain = describe(error)[1] == 2 and _is_fresh(run)
    if isinstance(error, Exception) and not isinstance(error, FloatingPointError):
        if not (is_plain and is_first_process()):
            # At once: where processes fail together, the first one looks here for the cause.
            keep_details(error, run.experiment.run_dir)
    cause = watch.explain(error)
    stopped = isinstance(cause, Stopped | KeyboardInterrupt)
    said = (str(cause) or "interrupted") if stopped else reason(cause)
    if not is_plain:
        note(cause, _standing(run))
    for text in notes(error) if cause is not error else ():
        note(cause, text)
    with suppress(OSError):  # of a full disk, which must not hide the exception
        run.progress.write(run.trainer, phase or ("interrupted" if stopped else "failed"), reason=said)
        if isinstance(cause, ProcessEnded) and not is_first_process():
            speak_of_loss(run.progress.path, str(cause))
    return cause


def _is_fresh(run: Run) -> bool:
    return not run.checkpoint.is_file() and not (run.budget.steps if run.budget else run.trainer.global_step)


def _standing(run: Run) -> str:
    """One line with the step at which a run ended, and where the same command continues."""
    budget, path = run.budget, run.checkpoint
    steps = budget.steps if budget else run.trainer.global_step
    of = f" of {budget.max_steps}" if budget and budget.max_steps else ""
    doing = "measuring after step" if run.trainer.state.fn == TrainerFn.TESTING else "at step"
    if not path.is_file():
        return f"{doing} {steps}{of}; there is no checkpoint yet, so the same command starts over"
    saved = getattr(run.trainer.strategy.checkpoint_io, "step", None)
    held = run.loaded_step if saved is None else saved
    holds = "" if held is None else f" (step {held})"
    return f"{doing} {steps}{of}; the same command continues from {path}{holds}"
