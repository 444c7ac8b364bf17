"""The entry point: finds the command, runs it, and reports errors in one line."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence

from flowbench.cli import bench_commands, data_commands, experiment_commands
from flowbench.cli.output import answer, safe_streams
from flowbench.cli.parser import UsageError, make_parser, plain_overrides
from flowbench.core.terminal import command_lines, wrapped

__all__ = ["COMMANDS", "main"]

COMMANDS = {**experiment_commands.COMMANDS, **bench_commands.COMMANDS, **data_commands.COMMANDS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``flowbench``; None reads ``sys.argv``.

    Returns:
        Exit status: 0 done, 2 a user's mistake, 1 a failure, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with safe_streams():
        return _run(words)


def _run(words: list[str]) -> int:
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        return _report("interrupted; the same command continues", 130)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning turns an interrupt into exit(1)
            return _report("interrupted; the same command continues", 130)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if "--debug" in words or not _is_expected(error):
            raise
        return _report(f"error: {error}", 2 if _is_user_mistake(error) else 1)


def _report(message: str, status: int) -> int:
    print(f"flowbench: {' '.join(message.split())}", file=sys.stderr)
    return status


def _is_user_mistake(error: Exception) -> bool:
    return isinstance(error, ValueError) or type(error).__name__ == "MisconfigurationException"  # Lightning's


def _is_expected(error: Exception) -> bool:
    return _is_user_mistake(error) or isinstance(error, (OSError, FloatingPointError))


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        answer(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        answer(f"flowbench {importlib.metadata.version('flowbench')}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "see flowbench --help"
        raise UsageError(f"unknown command '{name}'; {hint}")
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
            command_lines("flowbench fit -c experiments/digits/wcfm.yaml trainer.max_steps=500 --test"),
            command_lines("flowbench bench -c experiments/starflow_vs_wcfm.yaml"),
            command_lines("flowbench COMMAND --help"),
        ]
    )
