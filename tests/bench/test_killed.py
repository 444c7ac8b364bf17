"""What a signal or a full disk ends: the cause is named, a kill is tried once more, and nobody else fails with it."""

from __future__ import annotations

import os
import shutil
import signal
from collections import namedtuple

import pytest

from flowbench.bench import causes
from flowbench.bench.causes import explain, last_line, was_killed
from flowbench.bench.machine import memory_limit
from flowbench.bench.results import load_rows
from flowbench.bench.status import read_status
from tests.marks import slow

KILL, SEGV, TERM = (-getattr(signal, name) for name in ("SIGKILL", "SIGSEGV", "SIGTERM"))


def bench(workshop, contenders=("a", "b"), **fake):
    """The first contender has the fake's settings, all of them share their data and evaluator."""
    workshop.experiment(contenders[0], **fake)
    for name in contenders[1:]:
        workshop.experiment(name, value=2.0)
    return workshop.bench(contenders={name: f"{name}.yaml" for name in contenders}, seeds=[0])


def states(workshop, *names):
    return [read_status(workshop.cell(name, 0)).state for name in names]


@pytest.mark.parametrize(
    ("verb", "code"),
    [
        ("prepare", KILL),
        ("fit", SEGV),
        ("fit", 137),
        slow("reference", KILL),
        ("reference", 137),
    ],
)
def test_what_was_killed_once_is_tried_once_more(workshop, verb, code):
    """137: a child of the process was killed, and its command passed that on."""
    assert workshop.run(bench(workshop, die={verb: [code]})) == 0
    assert sum(call.startswith(verb) for call in workshop.calls()) == {"prepare": 2, "fit": 3, "reference": 2}[verb]
    assert "tried once more" in workshop.output
    assert states(workshop, "a", "b") == ["DONE", "DONE"]


def test_a_cell_that_is_killed_again_fails_alone_with_its_cause(workshop):
    assert workshop.run(bench(workshop, die={"fit": [KILL, KILL]})) == 1
    assert workshop.calls().count("fit a 0") == 2
    assert states(workshop, "a", "b") == ["FAILED", "DONE"]
    status = read_status(workshop.cell("a", 0))
    assert status.message.startswith("was ended by SIGKILL, perhaps for want of memory (there are ")
    assert status.message.endswith("; its last line: step 1")
    (row,) = [row for row in load_rows(workshop.runs / "mini") if row.status == "failed"]
    assert (row.contender, row.provenance["attempts"]) == ("a", 2)
    assert "was ended by SIGKILL" in (workshop.runs / "mini/report.md").read_text()


@pytest.mark.parametrize("code", [TERM, *(slow(code) for code in (143, -signal.SIGINT, 2)), 1])
def test_a_request_to_end_and_an_error_are_not_tried_again(workshop, code):
    assert workshop.run(bench(workshop, die={"fit": [code]})) == 1
    assert workshop.calls().count("fit a 0") == 1
    assert states(workshop, "a", "b") == ["FAILED", "DONE"]


def test_a_preparation_that_is_killed_twice_fails_those_that_share_it_with_its_cause(workshop):
    path = bench(workshop, ("a", "b", "c"), die={"prepare": [KILL, KILL]})
    (workshop.folder / "c.yaml").write_text("data: {dataset: other}\ntrainer: {accelerator: cpu}\n")
    assert workshop.run(path, jobs=1) == 1
    calls = workshop.calls()
    assert [call for call in calls if call.startswith("prepare")] == ["prepare a 0", "prepare a 0", "prepare c 0"]
    assert states(workshop, "a", "b", "c") == ["FAILED", "FAILED", "DONE"]
    for name in ("a", "b"):
        message = read_status(workshop.cell(name, 0)).message
        assert message.startswith("preparation: was ended by SIGKILL, perhaps for want of memory")


def test_an_error_in_one_contenders_preparation_fails_that_contender_alone(workshop):
    """Though it is the first of those with the same data, evaluator and prerequisites."""
    path = bench(workshop, ("a", "b", "c"), prepare_fails=True)
    assert workshop.run(path) == 1
    assert [call for call in workshop.calls() if call.startswith("prepare")] == ["prepare a 0", "prepare b 0"]
    assert states(workshop, "a", "b", "c") == ["FAILED", "DONE", "DONE"]
    assert "no such dataset" in read_status(workshop.cell("a", 0)).message
    assert read_status(workshop.cell("b", 0)).message == ""


@pytest.mark.slow
def test_a_cell_that_was_killed_runs_alone_the_second_time(workshop):
    """Two that were killed beside each other, for want of memory perhaps, and would wait for each other's end."""
    workshop.experiment("a", die={"fit": [KILL]}, steps=2, step_seconds=0.2)
    workshop.experiment("b", die={"fit": [KILL]}, steps=2, step_seconds=0.2)
    path = workshop.bench(contenders={"a": "a.yaml", "b": "b.yaml"}, seeds=[0])
    assert workshop.run(path, jobs=2) == 0
    lines = [line for line in workshop.output.splitlines() if line[9:].startswith(("start", "done"))]
    again = next(k for k, line in enumerate(lines) if "(attempt 2)" in line)
    assert [line[9:14] for line in lines[again:]] == ["start", "done ", "start", "done "]


def test_weights_of_a_cell_that_was_killed_are_waited_for(workshop):
    workshop.experiment("a", die={"fit": [KILL]})
    guided = {"trained": "a", "overrides": {"fake.die": {}}}
    path = workshop.bench(contenders={"a": "a.yaml", "guided": guided}, seeds=[0])
    assert workshop.run(path, jobs=2) == 0
    assert states(workshop, "a", "guided") == ["DONE", "DONE"]


@pytest.mark.parametrize("number", sorted(signal.Signals, key=int))
def test_every_signal_has_a_name_and_only_requests_are_taken_for_one(tmp_path, number):
    asked = {"SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"}
    for code in (-number, 128 + number):
        assert explain(code, tmp_path / "log").startswith(f"was ended by {signal.Signals(number).name}")
        assert was_killed(code) == (signal.Signals(number).name not in asked)


def test_limits_of_the_kernel_are_named(tmp_path):
    assert "ulimit -t" in explain(-signal.SIGXCPU, tmp_path / "log")
    assert "ulimit -f" in explain(-signal.SIGXFSZ, tmp_path / "log")
    assert f"there are {memory_limit() / 2**30:.1f} GiB here" in explain(KILL, tmp_path / "log")


def test_the_memory_is_that_of_the_group_or_of_the_machine(monkeypatch):
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory_limit() <= physical
    monkeypatch.setattr("flowbench.bench.machine._group_memory", lambda: 5)
    assert memory_limit() == 5
    monkeypatch.setattr("flowbench.bench.machine._group_memory", lambda: None)
    assert memory_limit() == physical


def test_a_reason_is_that_of_the_last_attempt(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("=== a seed 0, attempt 1\nRuntimeError: the old reason\n=== a seed 0, attempt 2\n")
    assert last_line(log) == ""
    assert explain(3, log) == "ended with exit status 3 and gave no reason"
    assert "old" not in explain(KILL, log)
    log.write_text(log.read_text() + "ValueError: the new one\n\n")
    assert explain(1, log) == "ValueError: the new one"


def test_a_full_disk_is_named_even_when_it_left_no_room_for_the_reason(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9, 9, 0))
    (tmp_path / "log.txt").write_text("=== prepare a seed 0\n")
    expected = "ended with exit status 1 and gave no reason; the disk is full: make room"
    assert causes.explain(1, tmp_path / "log.txt") == expected
