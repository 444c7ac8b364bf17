"""The tests that need a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.setting import Line, Setting

__all__ = ["measure"]


ROOT = Path(__file__).resolve().parents[2]
# Processes at most; each takes a context of the card.
MOST_WORKERS = 6


def measure(setting: Setting) -> Iterator[Line]:
    """Passed, failed and skipped tests marked `gpu`; on a CPU all of them are skipped."""
    workers = min(MOST_WORKERS, max(1, (os.cpu_count() or 1) // 2))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-n",
        str(workers),
        *_files(),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    counts = dict((kind, int(n)) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout))
    shown = ", ".join(f"{n} {kind}" for kind, n in counts.items()) or f"exit status {done.returncode}"
    names = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    # No test ran at all (5): on a CPU they are skipped, not missing.
    yield Line("tests marked gpu", "FAILED" if done.returncode else shown, note="; ".join([shown, *names])[:600])


def _files() -> list[str]:
    """Test files with the marker: collecting all the others takes longer than these take."""
    folder = ROOT / "tests"
    marked = [path for path in folder.rglob("test_*.py") if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]
    return [str(path.relative_to(ROOT)) for path in sorted({folder / "gpu", *marked})]
