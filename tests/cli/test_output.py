"""Printing never decides about a result: encodings, closed and full streams, pipes that nobody reads."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowbench.cli import main
from flowbench.cli.output import answer, safe_streams

TABLE = "┏━┳━┓ fd ↓ ┃ ≤ 2.8 ± 0.1 − ½ ✓ é"


def printed(encoding: str, monkeypatch) -> str:
    """What comes out of a stream of an encoding."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, newline="\n"))
    with safe_streams():
        print(TABLE)
    return raw.getvalue().decode(encoding)


def test_characters_that_the_encoding_lacks_are_replaced_by_what_looks_alike(monkeypatch):
    assert printed("utf-8", monkeypatch) == TABLE + "\n"
    assert printed("ascii", monkeypatch) == "+-+-+ fd v | <= 2.8 +/- 0.1 - \\xbd \\u2713 \\xe9\n"
    assert printed("latin-1", monkeypatch) == "+-+-+ fd v | <= 2.8 ± 0.1 - ½ \\u2713 é\n"


class Broken(io.StringIO):
    """A stream that cannot be written, as a full disk or a pipe that nobody reads any more."""

    encoding = "ascii"

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


FAULTS = [
    OSError(errno.ENOSPC, "No space left on device"),
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    OSError(errno.EBADF, "Bad file descriptor"),
    OSError(errno.EIO, "Input/output error"),
    ValueError("I/O operation on closed file"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_stream_that_cannot_be_written_is_dropped(fault, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Broken(fault))
    with safe_streams():
        print("a line")
        print("another", file=sys.stderr, flush=True)
        assert sys.stdout.fault is fault


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_what_a_command_is_there_to_print_is_missed(fault, monkeypatch, capsys):
    """A list that could not be printed is no list, unless the reader of a pipe has seen enough."""
    monkeypatch.setattr(sys, "stdout", Broken(fault))
    status = main(["--help"])
    if isinstance(fault, BrokenPipeError):
        assert status == 0
    else:
        assert status == 1
        assert "flowbench: error: standard output could not be written" in capsys.readouterr().err


def test_streams_that_were_never_opened(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with safe_streams():
        print("a line")
        print("another", file=sys.stderr)
    assert sys.stdout is None


def test_the_streams_are_given_back(monkeypatch):
    before = sys.stdout, sys.stderr
    with pytest.raises(KeyError), safe_streams():
        raise KeyError
    assert (sys.stdout, sys.stderr) == before


def test_an_answer_is_printed(capsys):
    answer("a table")
    assert capsys.readouterr().out == "a table\n"


RUN = """
import sys, types
runs = types.ModuleType("flowbench.commands.runs")
def validate(experiment, ckpt):
    open("measured", "w").close()
    print("≤ ± ┃", file=sys.stderr)
    return {"loss [bits/dim] ≤": 0.5}
runs.validate = validate
sys.modules["flowbench.commands.runs"] = runs
from flowbench.cli import main
import flowbench.cli.experiment_commands as commands
commands._experiment = lambda arguments, trains=False: object()
sys.exit(main(["validate", "-c", "x.yaml"]))
"""


@pytest.mark.parametrize(
    ("shell", "variables"),
    [
        ("{run}", {"PYTHONIOENCODING": "ascii"}),
        ("{run}", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        ("{run} > out.txt", {"PYTHONIOENCODING": "latin-1"}),
        ("{run} | cat > out.txt", {"PYTHONIOENCODING": "ascii:strict"}),
        ("{run} > /dev/full 2> /dev/full", {}),
        ("{run} >&-", {}),
        ("{run} >&- 2>&- <&-", {}),
        ("{run} 2>&-", {}),
        ("({run}; echo $? > status) | true", {}),
    ],
)
def test_the_status_of_a_process_is_that_of_its_work(tmp_path, shell, variables):
    """The real streams: what was measured stays, and the status is 0 whatever becomes of the words."""
    (tmp_path / "run.py").write_text(RUN, encoding="utf-8")
    environment = {**os.environ, **variables}
    command = shell.format(run=f"{sys.executable} run.py")
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "measured").is_file()
    if (tmp_path / "status").exists():
        assert (tmp_path / "status").read_text() == "0\n"
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path):
    """A process without standard output would write what it prints into the first file that it opens."""
    code = (
        "import os, sys\nfrom flowbench.cli.output import safe_streams\n"
        "with safe_streams():\n    handle = open('file', 'w')\n    print('words')\n    os.write(1, b'from a library')\n"
        "sys.exit(handle.fileno() < 3)"
    )
    (tmp_path / "run.py").write_text(code)
    command = f"{sys.executable} run.py >&- 2>&- <&-"
    assert subprocess.run(command, shell=True, cwd=tmp_path, check=False).returncode == 0
    assert Path(tmp_path / "file").read_text() == ""
