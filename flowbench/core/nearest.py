"""The end of a message about an unknown name: the known one that it was probably meant to be."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["nearest", "suggestion"]

_LISTED = 12


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a name resembles most; None where it resembles none.

    Args:
        name: what the user wrote.
        known: what can be written.
    """
    import difflib  # late: only a mistake needs it

    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def suggestion(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """Hint after "unknown name ...": ``; did you mean 'steps'?``, or what else helps.

    Args:
        name: what the user wrote.
        known: what can be written.
        otherwise: the hint where no known name resembles it, nothing where it is empty; None lists the known names,
            at most twelve.

    Returns:
        Text that begins with a semicolon, or an empty one.
    """
    names = sorted({str(k) for k in known})
    near = nearest(name, names)
    if near:
        return f"; did you mean '{near}'?"
    if otherwise is None:
        shown = ", ".join(names[:_LISTED])
        otherwise = f"known: {shown}{', ...' if len(names) > _LISTED else ''}" if names else "it takes none"
    return f"; {otherwise}" if otherwise else ""
