"""What the commands' parsers have in common.

Nothing heavy is imported here or in the commands' modules; each handler imports what it calls, so that ``--help``
answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from flowbench.cli.output import answer
from flowbench.core.checks import MOST
from flowbench.core.places import expand
from flowbench.core.terminal import command_lines, wrapped

__all__ = [
    "Command",
    "Parser",
    "UsageError",
    "config_options",
    "count",
    "make_parser",
    "path",
    "plain_overrides",
]

_OVERRIDES = (
    "key=value sets one key of the composed files, e.g. trainer.max_steps=500, data.batch_size=64 or "
    "model.init_args.training.optimizer.lr=1e-3; --key=value means the same. Later ones win."
)


class UsageError(ValueError):
    """A command line that cannot be read."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are raised rather than printed."""

    def error(self, message: str) -> NoReturn:
        """Raise a :class:`UsageError` of one line."""
        hint = ""
        if message.startswith("unrecognized arguments: --") and "." in message:
            hint = "; options of the experiment are written key=value"
        raise UsageError(f"{message}{hint}; see {self.prog} --help")

    def print_help(self, file: object = None) -> None:
        """Print the help, as wide as the terminal."""
        answer(self.format_help().rstrip())


@dataclass(frozen=True)
class Command:
    """One subcommand: what it is for, commands that show it, its options, what it calls, what its overrides are."""

    summary: str
    examples: tuple[str, ...]
    options: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]
    overrides: str = _OVERRIDES


def make_parser(name: str, command: Command) -> Parser:
    """The parser of one subcommand."""
    parser = Parser(
        prog=f"flowbench {name}",
        description=wrapped(command.summary),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.options(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.epilog = "\n".join(["examples:", *map(command_lines, command.examples)])
    if any(action.dest == "overrides" for action in parser._actions):
        parser.epilog = f"overrides:\n{wrapped(command.overrides, '  ', '  ')}\n\n{parser.epilog}"
    return parser


def plain_overrides(parser: Parser, words: list[str]) -> list[str]:
    """Turn ``--key=value`` into ``key=value`` unless the parser has the option."""
    known = parser._option_string_actions
    return [w[2:] if w.startswith("--") and "=" in w and w.partition("=")[0] not in known else w for w in words]


def count(text: str) -> int:
    """A whole number of at least 1, as an option's type."""
    if not text.isdecimal() or not 1 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"expected a whole number in [1, {MOST:g}], got '{text}'")
    return int(text)


def path(text: str) -> Path:
    """A path as an option's type: a file, a folder, or nothing yet. A pipe is refused: reading one may never end."""
    try:
        found = expand(text)
        other = found.resolve().exists() and not (found.is_file() or found.is_dir())
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a null byte, no such user
        raise argparse.ArgumentTypeError(str(error)) from error
    if other:
        raise argparse.ArgumentTypeError(f"{text} is neither a file nor a folder")
    return found


def config_options(parser: Parser) -> None:
    """Options of every command that takes an experiment file."""
    parser.add_argument(
        "-c",
        "--config",
        dest="files",
        action="append",
        metavar="FILE",
        required=True,
        help="experiment file; may be repeated, later files win",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, see below")
    parser.add_argument("--print-config", action="store_true", help="print the composed YAML and stop")
    parser.add_argument("--dry-run", action="store_true", help="validate, say what would run, and stop")
