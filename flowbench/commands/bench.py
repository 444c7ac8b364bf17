"""The bench command: plan, run, gather, judge, report."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from flowbench.bench.display import make_display
from flowbench.bench.forked import PROGRAM, Starter
from flowbench.bench.plan import Plan, make_plan
from flowbench.bench.preview import plan_lines, plan_table
from flowbench.bench.process import Start
from flowbench.bench.results import collect
from flowbench.bench.runner import Interrupted, Runner
from flowbench.bench.status import read_status
from flowbench.commands.bench_claims import check_claims
from flowbench.commands.bench_experiments import check_experiments
from flowbench.commands.run_folder import claim
from flowbench.core.processes import die_with_parent
from flowbench.core.rows import unmeasured_text
from flowbench.core.statuses import PARTLY_MEASURED
from flowbench.core.storage import write_text

__all__ = ["run_bench"]


def run_bench(
    path: str | Path,
    overrides: Sequence[str] = (),
    jobs: int | None = None,
    dry_run: bool = False,
    *,
    program: Sequence[str] = PROGRAM,
    server: Sequence[str] = (),
    console: Console | None = None,
) -> int:
    """Run a bench file, or continue it: finished cells are kept, failed ones are tried again.

    Args:
        path: the bench file.
        overrides: ``key=value`` changes of the bench file.
        jobs: cells at once; None takes the bench file's ``jobs``.
        dry_run: validate every contender's experiment in every problem, print the plan and stop; nothing is written.
        program: command line that runs a cell; the subcommand is appended.
        server: command line of what forks such processes instead, where all cells run on the CPU; empty for new ones.
        console: where to print.

    Returns:
        0 when every cell is finished; 1 when one failed or the results could not be written; 3 when numbers could not
        be computed, whose rows hold the reason; 128 + signal when interrupted.

    Raises:
        ValueError: one line, for what the user got wrong.
    """
    console = console or Console()
    plan = make_plan(path, overrides, jobs)
    claim(plan.directory, "bench", "give another run_dir")
    is_done = all(read_status(cell.directory).is_done(cell.config_hash) for cell in plan.everything)
    if dry_run:
        check_experiments(plan)
        if not is_done:
            check_claims(plan)
        _print_plan(plan, console)
        return 0
    # A GPU's context cannot be forked. The server imports while the experiments are rehearsed.
    with Starter(program, () if is_done or not plan.cpu_only else server, plan.policy.environment) as start:
        if not is_done:
            _rehearse([*program, "bench", "-c", str(path), *overrides, "--dry-run"])
        _print_plan(plan, console)
        return _run_here(plan, start, console)


def _print_plan(plan: Plan, console: Console) -> None:
    console.print(plan_table(plan))
    console.print(plan_lines(plan), highlight=False, markup=False, soft_wrap=True)


def _run_here(plan: Plan, start: Start, console: Console) -> int:
    """Run a plan in its directory; what ends it is told in one line. Returns the exit status."""
    try:
        with _only_one(plan.directory):
            return _run(plan, start, console)
    except Interrupted as stop:
        console.print("interrupted; the same command continues", highlight=False)
        return 128 + stop.number
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        where = error.filename or plan.directory
        remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
        line = f"{error.strerror}: {where}; {remedy}, then the same command continues"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
        return 1


def _rehearse(command: Sequence[str]) -> None:
    """Check every experiment in a process of its own: this one stays small for the hours in which cells run.

    Raises:
        ValueError: one line, for what the user got wrong.
        RuntimeError: when the check itself failed.
    """
    try:
        ended = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            preexec_fn=die_with_parent(),
        )
    except FileNotFoundError:  # reported where the first cell is started
        return
    if ended.returncode == 0:
        return
    said = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
    if ended.returncode == 2:
        raise ValueError(said.removeprefix("flowbench: error: "))
    raise RuntimeError(f"the experiments could not be checked: {said}")


def _run(plan: Plan, start: Start, console: Console) -> int:
    from flowbench.bench.report import build_report, print_summary

    write_text(plan.directory / "plan.json", json.dumps(plan.describe(), indent=2) + "\n")
    with make_display(console) as display:
        complete = Runner(plan, display, start).run()
    rows = collect(plan.directory)
    report = build_report(plan.directory)
    print_summary(plan.directory, console)
    console.print(f"report: {report}", highlight=False, markup=False, soft_wrap=True)
    if not complete:
        return 1
    return PARTLY_MEASURED if unmeasured_text(rows) else 0


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Hold the bench's lock.

    Raises:
        ValueError: when another bench works in the same directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory / "bench.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another bench is at work in {directory}; wait for it, or choose another run_dir"
            ) from None
        yield
    finally:
        os.close(handle)
