"""Sections as processes: started ahead, given the word, and ended at their time; a line that was measured is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.setting import Line

__all__ = ["ALONE", "BENCH", "BESIDE", "LIMITS", "Section", "read_lines"]

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (sys.executable, "-m", "benchmarks.gpu")

# Section -> seconds after which it is ended. The bench comes first, and beside it what measures no time; then the
# others have the card for themselves, one after the other. Together they stay below eight minutes whatever happens.
LIMITS = {
    "bench": 280,
    "tests": 150,
    "memory": 125,
    "training": 50,
    "compiled": 60,
    "sampling": 45,
    "jacobi": 20,
    "inception": 20,
}
BENCH, BESIDE = ("bench",), ("tests", "memory")
ALONE = ("training", "compiled", "sampling", "jacobi", "inception")

# A dry run shares a small machine.
_PATIENCE_OF_A_DRY_RUN = 20


@dataclass
class Section:
    """One section in a process of its own.

    Attributes:
        name: of its module.
        folder: for its log, its lines and its files.
        options: of the command line, passed on.
        limit: seconds after which it is ended.
    """

    name: str
    folder: Path
    options: Sequence[str]
    limit: float
    seconds: float = field(default=0.0, init=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @classmethod
    def named(cls, name: str, folder: Path, options: Sequence[str], is_dry: bool) -> Section:
        """A section with its own limit."""
        return cls(name, folder, options, LIMITS[name] * (_PATIENCE_OF_A_DRY_RUN if is_dry else 1))

    @property
    def result(self) -> Path:
        """Its lines, one JSON record each."""
        return self.folder / f"{self.name}.jsonl"

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.folder / f"{self.name}.log"

    def start(self) -> None:
        """Start the process, which imports what it needs and waits for the word."""
        command = [*PROGRAM, "--section", self.name, "--result", str(self.result)]
        with self.log.open("wb") as handle:
            self._process = subprocess.Popen(
                [*command, "--seconds", str(self.limit), *self.options],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=handle,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def measure(self) -> list[Line]:
        """Let it measure; its lines, and one that says why there are no more if it did not come to its end."""
        if self._process is None:
            self.start()
        assert self._process is not None
        began = time.perf_counter()
        try:
            self._process.communicate(b"\n", self.limit)
            reason = "" if self._process.returncode == 0 else f"exit status {self._process.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"no end after {self.limit:g} s"
        finally:
            self.end()
        self.seconds = time.perf_counter() - began
        return [*read_lines(self.result), *([self._failure(reason)] if reason else [])]

    def end(self) -> None:
        """End the process, and what it started, if it still runs."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _failure(self, reason: str) -> Line:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        last = [line for line in text.splitlines() if line.strip()][-1:]
        return Line(f"section {self.name}", "FAILED", note=f"{reason}: {' '.join(last)[:200]}")


def read_lines(path: Path) -> Iterator[Line]:
    """The lines that a section has written so far."""
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if text.endswith("\n"):
                yield Line(**json.loads(text))
