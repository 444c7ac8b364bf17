"""Runs commands in forked processes that kill themselves at a stated point; one JSON line in, one out.

A process of its own, because a process that has trained cannot always be forked: importing everything once and forking
for each kill takes a tenth of a start.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

from flowbench.cli import main
from flowbench.commands import runs  # noqa: F401 - imported once for all children
from flowbench.config import Experiment
from flowbench.training.progress import ProgressFile

CALLS: Counter[str] = Counter()
KILL: dict = {}


def reach(point: str) -> None:
    """Count a point, and die at the one that is asked for."""
    CALLS[point] += 1
    if point == KILL.get("point") and CALLS[point] == KILL["call"]:
        os.kill(os.getpid(), signal.SIGKILL)


def watch_files() -> None:
    inner = os.replace

    def replace(source, target):
        name = Path(target).name
        reach(f"before {name}")
        inner(source, target)
        reach(f"after {name}")

    os.replace = replace


def watch_hooks() -> None:
    """Every hook of a callback, and what asks it for its state: our own callback stands for all of them."""
    for name in dir(ProgressFile):
        inner = getattr(ProgressFile, name)
        if name.startswith("on_") or name in ("setup", "teardown", "state_dict"):

            def hook(self, *given, _name=name, _inner=inner, **named):
                reach(f"hook {_name}")
                return _inner(self, *given, **named)

            setattr(ProgressFile, name, hook)


def child(request: dict) -> None:
    KILL.update(request)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    watch_files()
    watch_hooks()
    status = main(request["words"])
    if "counts" in request:
        Path(request["counts"]).write_text(json.dumps(CALLS))
        Path(request["counts"]).with_name("modules.json").write_text(json.dumps(sorted(sys.modules)))
    os._exit(status)


def import_for_all(names: list[str]) -> None:
    """What a whole run imports on the way is imported here, once, and not in every child."""
    for name in names:
        if name != "__main__":
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def serve(request: dict) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            child(request)
        finally:
            os._exit(99)
    _, status = os.waitpid(pid, 0)
    if "counts" in request:
        import_for_all(json.loads(Path(request["counts"]).with_name("modules.json").read_text()))
        Experiment.from_files([request["words"][2]])  # validated once: what its classes take is kept
    return os.waitstatus_to_exitcode(status)


print("ready", flush=True)
for line in sys.stdin:
    print(serve(json.loads(line)), flush=True)
