"""The one error a user's configuration can cause, and the wording shared by all its messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["ConfigError", "one_line", "suggestion"]

_LISTED = 12
_LONGEST = 1000


class ConfigError(ValueError):
    """A mistake in an experiment file or an override: one line that says what to do about it."""

    def __init__(self, message: object = "") -> None:
        text = one_line(message)
        # A message may quote a user's text of any length; what to do about it stands at the end.
        super().__init__(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 305]} ... {text[-300:]}")


def one_line(text: object) -> str:
    """Collapse any message to a single line."""
    return " ".join(str(text).split())


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or a short list of them."""
    names = sorted({str(k) for k in known})
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    if not names:
        return "; it takes none"
    shown = ", ".join(names[:_LISTED])
    return f"; known: {shown}{', ...' if len(names) > _LISTED else ''}"
