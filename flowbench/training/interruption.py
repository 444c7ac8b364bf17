"""Unplanned ends of a run: a signal, and the loss of one of its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from flowbench.core.endings import LOST, ProcessEnded, is_distributed, recorded_error
from flowbench.core.launch import is_first_process
from flowbench.core.processes import exit_status, how_it_ended
from flowbench.core.stopping import LISTENER, Handler, Stopped
from flowbench.training.progress import note_end, read_phase

__all__ = ["ProcessWatch", "StopOnSignal", "speak_of_loss"]

_POLL_SECONDS = 0.2
# How long a process that lost another one may take to fail by itself, with a traceback, before it is ended.
_GRACE_SECONDS = 5.0


class StopOnSignal(L.Callback):
    """Ends the training at the end of a step after a signal, with a checkpoint of that step.

    All processes stop at the same step, whichever of them received the signal. Where no training step runs, the signal
    ends the process at once; a second one always does.

    Args:
        path: where the checkpoint goes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._scheduler: dict[int, Handler] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """From now on a signal waits for the end of the step; Lightning has put its own handlers in place by now."""
        if not LISTENER.is_listening:
            return
        self._scheduler = {number: LISTENER.add(number) for number in _scheduler_signals()}
        LISTENER.take_over()
        LISTENER.deferring = True

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop, if any process received a signal.

        Raises:
            Stopped: on all processes.
        """
        number = _agreed(trainer, module.device)
        if not number:
            return
        if trainer.checkpoint_callback is not None:  # a trial run keeps nothing
            trainer.save_checkpoint(self.path)
        handler = self._scheduler.get(number)
        if callable(handler):
            self._put_into_queue(trainer, handler, number)
        raise Stopped(number)

    def _put_into_queue(self, trainer: L.Trainer, handler: Callable[..., object], number: int) -> None:
        """Do under SLURM what Lightning does: its handler saves a checkpoint of its own and calls ``scontrol``."""
        handler(number, None)
        trainer.strategy.barrier("flowbench.queue")
        if trainer.is_global_zero:
            for copy in Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"):
                copy.unlink()  # of the checkpoint above; found later, it would be older than that

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """One process need not wait for the end of a long evaluation, which can be repeated."""
        LISTENER.take_over()
        if trainer.world_size == 1:
            LISTENER.raise_pending()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Training goes on."""
        training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        LISTENER.deferring = LISTENER.is_listening and training

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """What came too late for the last step is raised after the last checkpoint."""
        LISTENER.deferring = False

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Lightning has put its own handlers in place by now."""
        LISTENER.take_over()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Whatever ended the run, a signal waits no longer."""
        LISTENER.deferring = False


def _scheduler_signals() -> list[int]:
    """Signals that Lightning handles, because SLURM announces with one of them that it will end the job."""
    numbers = (getattr(signal, name, None) for name in ("SIGUSR1", "SIGUSR2"))
    return [n for n in numbers if n is not None and _is_lightnings(signal.getsignal(n))]


def _is_lightnings(handler: Handler) -> bool:
    return callable(handler) and type(handler).__module__.startswith("lightning.")


def _agreed(trainer: L.Trainer, device: torch.device) -> int:
    """The signal that any process received, 0 for none; a collective call where there are several."""
    number = LISTENER.pending or 0
    if trainer.world_size == 1:
        return number
    found = trainer.strategy.reduce(torch.tensor(number, device=device), reduce_op="max")
    return int(found)


class ProcessWatch:
    """Detects that a process of the run has ended, reports which and how, and ends this one if it hangs.

    Lightning's own observer ends the first process by SIGKILL then, without a word; this one takes its place. Processes
    that a launcher started watch their parent in turn.

    Args:
        trainer: its launcher may start processes.
        progress: where the end of the first process is noted, by itself or by the second.
    """

    def __init__(self, trainer: L.Trainer, progress: Path) -> None:
        self._trainer = trainer
        self._progress = progress
        self._processes: list[subprocess.Popen[bytes]] = []
        self._parent = os.getppid()
        self._over = threading.Event()
        if trainer.world_size > 1:
            threading.Thread(target=self._watch, name="flowbench-process-watch", daemon=True).start()

    def explain(self, error: BaseException) -> BaseException:
        """The end of another process in place of what it caused here; else the exception itself."""
        if self._trainer.world_size == 1 or not is_distributed(error):
            return error
        # The others need not find out which one it was, only whether the first, which reports it, is gone.
        limit = time.monotonic() + (_GRACE_SECONDS if is_first_process() else _GRACE_SECONDS / 5)
        while (lost := self._loss()) is None and time.monotonic() < limit:
            time.sleep(_POLL_SECONDS)
        return error if lost is None else ProcessEnded(*lost)

    def close(self, failed: bool) -> None:
        """Stop watching; after a failure, end what the launcher started."""
        self._over.set()
        self._adopt()
        limit = time.monotonic() + _GRACE_SECONDS
        for process in self._processes if failed else ():
            try:
                process.wait(max(0.0, limit - time.monotonic()))  # it may be writing its traceback
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _loss(self) -> tuple[str, int] | None:
        """What became of another process of this run, and the exit status that follows; None while all is well.

        Processes that failed because they had lost another one explain nothing.
        """
        self._adopt()
        for rank, process in enumerate(self._processes, start=1):
            if process.poll() in (None, 0):
                continue
            said = recorded_error(self._progress.parent, process.pid)
            if said is None or not said.startswith(LOST):
                end = f"failed: {said}" if said else how_it_ended(process.returncode)
                return f"process {rank} of {self._trainer.world_size} {end}", exit_status(process.returncode)
        if not is_first_process() and os.getppid() != self._parent and not self._is_ended():
            starter = "the launcher" if "TORCHELASTIC_RUN_ID" in os.environ else "process 0"
            return f"{starter} is gone, killed perhaps for want of memory", 1
        return None

    def _is_ended(self) -> bool:
        """Whether the first process has noted its own end."""
        return read_phase(self._progress) not in ("fit", "test")

    def _adopt(self) -> None:
        """Take the launcher's processes out of its list, which Lightning's observer looks through."""
        started: list[subprocess.Popen[bytes]] = getattr(self._trainer.strategy.launcher, "procs", [])
        while started:
            self._processes.append(started.pop(0))

    def _watch(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            lost = self._loss()
            if lost is not None and not self._over.wait(_GRACE_SECONDS):
                self._end(*lost)

    def _end(self, reason: str, status: int) -> None:
        """End a process that waits for one that is gone, or works on without it."""
        for process in self._processes:
            process.kill()
        speak_of_loss(self._progress, reason)
        os._exit(status)


def speak_of_loss(progress: Path, reason: str) -> None:
    """Record and report the loss of a process: in the first one, or in the second where the first is gone."""
    if is_first_process() or os.environ.get("LOCAL_RANK") == "1":
        note_end(progress, "failed", reason)
        print(f"flowbench: error: {reason}; the same command continues", file=sys.stderr, flush=True)
