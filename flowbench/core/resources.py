"""Files that ship with flowbench: experiments and embedded data, found in a checkout and in an installed package alike.

Their sources are ``experiments/`` and ``data/`` of the repository; a wheel carries both in ``flowbench/shipped/``.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from flowbench.core.nearest import nearest

__all__ = ["PREFIX", "experiment_names", "find_experiment", "portable_name", "resource", "shipped_like"]

PREFIX = "flowbench:"
"""Names a shipped experiment or bench from any directory: ``flowbench:digits/wcfm.yaml``."""

_PACKAGE = Path(__file__).resolve().parents[1]


def resource(name: str) -> Path:
    """Path of a shipped file or folder.

    Args:
        name: its path in the repository, e.g. ``experiments`` or ``data/fashion_mnist_mini.npz``.
    """
    installed = _PACKAGE / "shipped"
    return (installed if installed.is_dir() else _PACKAGE.parent) / name


@cache
def experiment_names() -> tuple[str, ...]:
    """The shipped experiment and bench files, relative to ``experiments/``, sorted."""
    folder = resource("experiments")
    return tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml")))


def find_experiment(text: str) -> Path | None:
    """The shipped file that a name with the prefix means; None for other texts, which are paths.

    Args:
        text: e.g. ``flowbench:base/trainer.yaml``.

    Raises:
        ValueError: one line: no file of that name ships.
    """
    if not text.startswith(PREFIX):
        return None
    name = text.removeprefix(PREFIX)
    if name not in experiment_names():
        near = nearest(name, experiment_names())
        hint = f"did you mean '{PREFIX}{near}'?" if near else "see flowbench list experiments"
        raise ValueError(f"{text}: no file of that name ships with flowbench; {hint}")
    return resource("experiments") / name


def portable_name(path: Path) -> str:
    """A file's name with the prefix where it ships, which holds wherever the package lies; else its path."""
    folder = resource("experiments").resolve()
    resolved = path.resolve()
    name = resolved.relative_to(folder).as_posix() if resolved.is_relative_to(folder) else ""
    return f"{PREFIX}{name}" if name in experiment_names() else str(path)


def shipped_like(path: Path) -> str:
    """The end of a message about a file that is not there: the shipped one that its path names, where there is one.

    ``experiments/base/trainer.yaml`` is how a checkout names ``flowbench:base/trainer.yaml``.
    """
    ends = ("/".join(path.parts[first:]) for first in range(len(path.parts)))
    name = next((end for end in ends if end in experiment_names()), None)
    return f"; it ships as '{PREFIX}{name}'" if name else ""
