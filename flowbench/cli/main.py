"""The entry point: finds the command, runs it, and reports errors in one line."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence

from flowbench.cli import bench_commands, data_commands, experiment_commands
from flowbench.cli.output import answer, safe_streams
from flowbench.cli.parser import UsageError, make_parser, plain_overrides
from flowbench.core.endings import describe, is_expected, keep_details, note
from flowbench.core.launch import is_first_process
from flowbench.core.nearest import suggestion
from flowbench.core.stopping import reason_of_exit, stops_on_signals
from flowbench.core.terminal import command_lines, wrapped

__all__ = ["COMMANDS", "main"]

COMMANDS = {**experiment_commands.COMMANDS, **bench_commands.COMMANDS, **data_commands.COMMANDS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``flowbench``; None reads ``sys.argv``.

    Returns:
        Exit status: 0 done, 2 a user's mistake, 1 a failure, 3 done but for numbers that could not be computed,
        128 + number ended by a signal.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with safe_streams():
        return _run(words)


def _run(words: list[str]) -> int:
    try:
        with stops_on_signals():
            return _dispatch(words)
    except BaseException as error:
        if "--debug" in words and isinstance(error, Exception):
            raise
        return _end(reason_of_exit(error) if isinstance(error, SystemExit) else error)


def _end(error: BaseException) -> int:
    """Say in one line what ended the command; the traceback of what nobody expects goes to a log."""
    if isinstance(error, SystemExit):
        return _report(f"error: {error.code}", 1) if isinstance(error.code, str) else int(error.code or 0)
    if not is_expected(error):
        keep_details(error)
        note(error, "--debug shows the traceback")
    return _report(*describe(error))


def _report(message: str, status: int) -> int:
    if is_first_process():  # the others fail for the same reason, or because this one did
        print(f"flowbench: {' '.join(message.split())}", file=sys.stderr)
    return status


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        answer(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        answer(f"flowbench {importlib.metadata.version('flowbench')}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        raise UsageError(f"unknown command '{name}'{suggestion(name, COMMANDS, 'see flowbench --help')}")
    command = COMMANDS[name]
    parser = make_parser(name, command)
    # Overrides stand anywhere between the options, which argparse allows only here.
    return command.run(parser.parse_intermixed_args(plain_overrides(parser, rest)))


def _overview() -> str:
    width = max(map(len, COMMANDS))
    further = " " * (width + 4)
    lines = [wrapped(command.summary, f"  {name:<{width}}  ", further) for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: flowbench COMMAND [options] [key=value ...]",
            "",
            wrapped("Train flow families under the same data, budget and seeds, and measure what each buys you."),
            "",
            "commands:",
            *lines,
            "",
            "examples:",
            command_lines("flowbench fit -c flowbench:digits/wcfm.yaml trainer.max_steps=500 --test"),
            command_lines("flowbench bench -c flowbench:starflow_vs_wcfm.yaml"),
            command_lines("flowbench COMMAND --help"),
        ]
    )
