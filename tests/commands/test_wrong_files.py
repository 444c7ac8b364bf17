"""Every command with a path to the wrong kind of thing: one line, no traceback, and never waiting for ever."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flowbench.cli import COMMANDS, main
from flowbench.core.storage import write_text

ROOT = Path(__file__).parents[2]
LONG = "x" * 300  # longer than file systems take
KINDS = [
    "folder", "empty", "pipe", "binary", "loop", "text", "list.yaml", "missing", "folder/missing", "text/below",
    LONG, "~nobody-here/x", "a\0b", "unreadable",
]  # fmt: skip
# At doors behind which data are read or models built before.
FEWER = ["folder", "empty", "pipe", "binary", "loop", "missing", LONG]
# Where a command takes a path; what stands for {} is the wrong thing.
DOORS = [
    "fit -c {}",
    "fit -c {} --print-config",
    "fit -c {file} -c {} --dry-run",
    "fit -c {file} requires.autoencoder={} --print-config",
    "test -c {file} --ckpt {}",
    "predict -c {file} --ckpt {}",
    "count -c {}",
    "prepare -c {}",
    "bench -c {} --dry-run",
    "report {}",
    "compare {} {}/..",
    "evaluate --samples {} --data digits --features identity",
    "evaluate --samples x.npz --bench {}",
    "evaluate --samples x.npz -c {}",
    "stats --data digits --features identity --samples {} -o out.npz",
    "stats --data npz --path {} --features identity -o out.npz",
    "stats --data npy --path {} --features identity -o out.npz",
    "stats --data pt --path {} --features identity -o out.npz",
    "stats --data image_folder --path {} --features identity -o out.npz",
]


@pytest.fixture
def things(tmp_path, monkeypatch) -> Path:
    """A working directory with one of each kind."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("empty").touch()
    os.mkfifo("pipe")
    Path("binary").write_bytes(bytes(range(256)))
    Path("loop").symlink_to("loop")
    Path("text").write_text("hello")
    Path("list.yaml").write_text("- 1\n")
    Path("unreadable").write_text("no mapping, where a superuser reads it\n")
    Path("unreadable").chmod(0)
    return tmp_path


class StillWaiting(BaseException):
    """No exception that a command would report."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise where something waits, for a pipe that nobody writes for instance."""

    def ring(*_: object) -> None:
        raise StillWaiting

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("door", DOORS)
def test_one_line_and_a_status(door, things, capsys):
    """Every kind at every door."""
    for kind in FEWER if door.startswith(("test", "predict", "evaluate", "stats")) else KINDS:
        words = [word.format(kind, kind, file=ROOT / "experiments/toy/cfm.yaml") for word in door.split()]
        with at_most(100):
            status = main(words)
        captured = capsys.readouterr()
        assert status in (1, 2), (kind, captured)
        assert captured.err.startswith("flowbench: error: "), (kind, captured)
        assert captured.err.count("\n") == 1, (kind, captured.err)
        assert len(captured.err) < 1000, kind
    assert sorted(path.name for path in things.iterdir() if path.is_file()) == [
        "binary", "empty", "list.yaml", "text", "unreadable",
    ], "nothing is left behind"  # fmt: skip


def test_every_command_that_takes_a_path_is_tried():
    assert set(COMMANDS) - {door.split()[0] for door in DOORS} == {"validate", "reference", "list", "check", "data"}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_a_file_never_replaces_what_is_none(make: Callable[[str], None], tmp_path):
    """Renaming a file over a device would make the device a file."""
    target = tmp_path / "target"
    make(str(target))
    with pytest.raises(ValueError, match=r"is (no regular file|a folder); give another name"):
        write_text(target, "words")
    assert not target.is_file()
    assert list(tmp_path.iterdir()) == [target]
