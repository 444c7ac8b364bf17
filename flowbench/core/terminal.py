"""Width of the terminal, text that fits it, and durations as text."""

from __future__ import annotations

import shutil
import textwrap

__all__ = ["command_lines", "duration", "terminal_width", "wrapped"]


def terminal_width() -> int:
    """Columns of the terminal, at least 40; 80 where there is none, or the value of $COLUMNS."""
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


def duration(seconds: float) -> str:
    """A time as text in its two largest units; seconds are left out from an hour on.

    Example:
        >>> [duration(seconds) for seconds in (4.25, 180, 200, 3600, 7500)]
        ['4.2 s', '3 min', '3 min 20 s', '1 h', '2 h 5 min']
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (0 if hours else rest, "s"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number)
