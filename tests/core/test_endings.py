from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from flowbench.core.endings import (
    LOG,
    ProcessEnded,
    describe,
    is_distributed,
    is_expected,
    keep_details,
    note,
    recorded_error,
)
from flowbench.core.processes import exit_status, how_it_ended, run_child


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.1.1]:38829"),
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms"),
        RuntimeError("Connection reset by peer"),
        torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"),
        torch.distributed.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)"),
        torch.distributed.DistStoreError("wait timeout after 300000ms"),
        torch.distributed.DistNetworkError("failed to recv, got 0 bytes"),
    ],
)
def test_what_the_backends_say_of_a_lost_process_is_recognised(error):
    assert is_distributed(error)
    line, status = describe(error)
    assert line.startswith("error: the processes of the run lost each other: ")
    assert status == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("Distributed package doesn't have NCCL built in"),
        RuntimeError("DataLoader timed out after 5 seconds"),
        torch.distributed.DistBackendError("NCCL error: unhandled cuda error, invalid usage"),
        ValueError("gloo"),
        KeyError("nccl"),
    ],
)
def test_other_errors_are_not_mistaken_for_it(error):
    assert not is_distributed(error)


def test_a_long_message_is_cut_and_stays_in_one_line():
    line, _ = describe(RuntimeError("many\nwords " * 200))
    assert "\n" not in line
    assert len(line) < 500


def test_the_end_of_another_process_decides_the_status():
    error = ProcessEnded("process 1 was ended by SIGKILL", exit_status(-9))
    assert is_expected(error)
    note(error, "at step 3")
    assert describe(error) == ("error: process 1 was ended by SIGKILL; at step 3", 137)


def test_notes_of_others_are_not_shown():
    error = RuntimeError("shapes")
    error.add_note("somebody else's")
    assert describe(error)[0] == "error: RuntimeError: shapes"


def test_details_of_all_processes_lie_in_one_log_and_each_is_found_again(tmp_path):
    first, second = raised(RuntimeError("the first")), raised(ValueError("two\nlines"))
    keep_details(first, tmp_path)
    keep_details(second, tmp_path)
    keep_details(second, tmp_path)  # what is kept already is not written twice
    text = (tmp_path / LOG).read_text()
    assert text.count("Traceback (most recent call last)") == 2
    assert describe(first)[0] == f"error: RuntimeError: the first; details in {tmp_path / LOG}"
    assert recorded_error(tmp_path, os.getpid()) == "two lines"
    assert recorded_error(tmp_path, os.getpid() + 1) is None
    assert recorded_error(tmp_path / "nowhere", 1) is None


def test_a_log_that_cannot_be_written_hides_nothing(tmp_path):
    (tmp_path / LOG).mkdir()
    error = raised(RuntimeError("the cause"))
    keep_details(error, tmp_path)
    assert "RuntimeError: the cause; the details cannot be kept (Is a directory)" in describe(error)[0]


@pytest.mark.parametrize(
    ("code", "words", "status"),
    [
        (-9, "was ended by SIGKILL, perhaps for want of memory", 137),
        (137, "was ended by SIGKILL, perhaps for want of memory", 137),
        (-15, "was ended by SIGTERM", 143),
        (143, "was ended by SIGTERM", 143),
        (-11, "was ended by SIGSEGV", 139),
        (2, "ended with exit status 2", 2),
        (1, "ended with exit status 1", 1),
    ],
)
def test_ends_of_processes_in_words_and_in_the_status_of_shells(code, words, status):
    assert how_it_ended(code) == words
    assert exit_status(code) == status


def test_a_child_is_asked_to_end_before_it_is_killed(tmp_path, monkeypatch):
    """What interrupts the parent reaches the child, which has time to save its state."""
    code = (
        "import pathlib, signal, sys, time\n"
        "def end(*_): pathlib.Path('saved').touch(); sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, end); pathlib.Path('ready').touch(); time.sleep(60)"
    )
    monkeypatch.chdir(tmp_path)

    def interrupted(process, timeout=None):
        if timeout is None:
            while not (tmp_path / "ready").exists():
                pass
            raise KeyboardInterrupt
        return inner(process, timeout)

    inner = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_child([sys.executable, "-c", code], tmp_path / "log.txt", os.environ)
    assert (tmp_path / "saved").exists()
