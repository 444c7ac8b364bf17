"""Seconds inside training steps, on devices that run behind the host too."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

__all__ = ["StepTimer"]


class StepTimer:
    """Times intervals of a run without making the host wait for the device.

    On a CPU an interval is one of the clock. On CUDA it lies between two events of the current stream: what the device
    spent on the step, or what the host spent on giving it its work, where that takes longer.

    Args:
        clock: seconds, monotonic; for the CPU.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began: float | torch.cuda.Event | None = None
        self._seconds = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def start(self, device: torch.device) -> None:
        """An interval begins."""
        self._began = _recorded(device) if device.type == "cuda" else self._clock()

    def stop(self, device: torch.device) -> None:
        """The interval ends."""
        if isinstance(self._began, float):
            self._seconds += self._clock() - self._began
        elif self._began is not None:
            self._pending.append((self._began, _recorded(device)))
        self._began = None

    def collect(self, unfinished: int | None = None) -> float:
        """Seconds of the intervals that have finished since the last call.

        Args:
            unfinished: wait for the device until at most so many intervals are left; None waits for none, and then
                what is still running is collected by a later call.
        """
        while self._pending:
            begin, end = self._pending[0]
            if unfinished is not None and len(self._pending) > unfinished:
                end.synchronize()
            elif not end.query():
                break
            self._seconds += begin.elapsed_time(end) / 1e3
            self._pending.popleft()
        found, self._seconds = self._seconds, 0.0
        return found


def _recorded(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
