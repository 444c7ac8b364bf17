"""How wide the terminal is, and text that fits it."""

from __future__ import annotations

import shutil
import textwrap

__all__ = ["command_lines", "terminal_width", "wrapped"]


def terminal_width() -> int:
    """Columns of the terminal, at least 40; 80 where there is none, or what $COLUMNS says."""
    return max(40, shutil.get_terminal_size((80, 24)).columns)


def wrapped(text: str, start: str = "", further: str = "") -> str:
    """Text on as many lines as it needs; a word that is longer than a line, such as a path, stays whole.

    Args:
        text: white space in it counts as one blank.
        start: before the first line.
        further: before the other lines.
    """
    filled = textwrap.fill(
        " ".join(text.split()),
        terminal_width(),
        initial_indent=start,
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return filled or start.rstrip()


def command_lines(command: str, indent: str = "  ") -> str:
    """A shell command on as many lines as it needs, with backslashes between them."""
    width = terminal_width() - 2
    lines = textwrap.wrap(
        command,
        width,
        initial_indent=indent,
        subsequent_indent=f"{indent}    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return " \\\n".join(lines)
