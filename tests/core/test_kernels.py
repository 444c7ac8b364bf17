"""Kernels are chosen by measurement: once for each machine and shape, by nobody's modes, whatever the cache is like."""

from __future__ import annotations

import json
import os
import signal
import threading

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flowbench.core import kernels
from flowbench.core.kernels import ONEDNN, PLAIN, Kernels, is_clearly_faster, machine_identity, override, rounded_up


class Ways:
    """Two ways whose times are told by the test: a way that is called `calls` times a turn is so much slower."""

    def __init__(self, plain: int, other: int) -> None:
        self.made = 0
        self._sizes = {PLAIN: 20_000 * plain, ONEDNN: 20_000 * other}

    def __call__(self):
        self.made += 1
        return {name: lambda size=size: torch.arange(size).sum() for name, size in self._sizes.items()}


@pytest.mark.parametrize(("plain", "other", "expected"), [(1, 20, PLAIN), (20, 1, ONEDNN)])
def test_the_faster_way_is_taken(plain, other, expected):
    assert Kernels(None).fastest("sum", (1,), Ways(plain, other)) == expected


def test_a_tie_goes_to_pytorch(monkeypatch):
    monkeypatch.setattr(kernels, "seconds_of", lambda *_: {PLAIN: [1.0], ONEDNN: [0.91]})
    assert Kernels(None).fastest("sum", (1,), Ways(1, 1)) == PLAIN
    monkeypatch.setattr(kernels, "seconds_of", lambda *_: {PLAIN: [1.0], ONEDNN: [0.89]})
    assert Kernels(None).fastest("sum", (1,), Ways(1, 1)) == ONEDNN


def test_what_differs_between_repeats_decides_nothing():
    """A processor that runs at half its rate for a while makes one call fast, not a way."""
    plain = [1.0, 1.0, 2.0, 2.0, 2.0]
    assert is_clearly_faster([0.8, 0.8, 1.6, 1.6, 1.6], plain)
    assert is_clearly_faster([0.8, 0.8, 1.6, 1.6, 3.0], plain)
    assert not is_clearly_faster([0.5, 1.0, 2.0, 2.0, 2.0], plain)
    assert not is_clearly_faster([0.95, 0.95, 1.9, 1.9, 1.9], plain)


def test_a_shape_is_measured_once_and_each_shape_alone():
    found, ways = Kernels(None), Ways(1, 20)
    for _ in range(3):
        found.fastest("sum", (1, 2), ways)
    assert ways.made == 1
    found.fastest("sum", (2, 1), ways)
    found.fastest("product", (1, 2), ways)
    assert ways.made == 3
    assert found.summary() == "plain 3"


def test_the_number_of_threads_is_a_part_of_the_question():
    found, ways, before = Kernels(None), Ways(1, 20), torch.get_num_threads()
    found.fastest("sum", (1,), ways)
    try:
        torch.set_num_threads(before + 1)
        found.fastest("sum", (1,), ways)
    finally:
        torch.set_num_threads(before)
    assert ways.made == 2


def test_a_later_process_takes_what_was_measured(tmp_path, monkeypatch):
    first, ways = Kernels(tmp_path), Ways(20, 1)
    assert first.fastest("sum", (1,), ways) == ONEDNN
    monkeypatch.setattr(kernels, "seconds_of", lambda *_: {PLAIN: [1.0], ONEDNN: [9.0]})  # now it would lose
    assert Kernels(tmp_path).fastest("sum", (1,), ways) == ONEDNN
    assert ways.made == 1
    (file,) = tmp_path.glob("*.json")
    content = json.loads(file.read_text())
    assert content["machine"] == machine_identity()
    assert {"way", "plain_us", "onednn_us"} == next(iter(content["choices"].values())).keys()


def test_of_two_processes_the_first_decides(tmp_path, monkeypatch):
    slow, fast = Kernels(tmp_path), Kernels(tmp_path)
    assert slow.fastest("other", (1,), Ways(1, 20)) == PLAIN  # it has read the file by now
    assert fast.fastest("sum", (1,), Ways(20, 1)) == ONEDNN
    assert slow.fastest("sum", (1,), Ways(1, 20)) == ONEDNN


@pytest.mark.parametrize("content", ["", "{", "[]", '{"choices": {"sum 1 threads=1": {}}}', '{"choices": 3}', "\x00"])
def test_a_damaged_file_is_measured_anew(content, tmp_path):
    Kernels(tmp_path).fastest("sum", (1,), Ways(1, 20))
    (file,) = tmp_path.glob("*.json")
    file.write_text(content)
    assert Kernels(tmp_path).fastest("sum", (1,), Ways(20, 1)) == ONEDNN
    assert json.loads(file.read_text())["choices"]


def test_a_cache_that_cannot_be_written_is_no_hindrance(tmp_path):
    """Each process measures for itself then, once."""
    (tmp_path / "file").write_text("")
    found, ways = Kernels(tmp_path / "file" / "folder"), Ways(20, 1)
    assert [found.fastest("sum", (1,), ways) for _ in range(2)] == [ONEDNN] * 2
    assert ways.made == 1


def test_that_there_is_no_choice_is_kept_too(tmp_path):
    """What the ways are may itself have been measured."""
    assert Kernels(tmp_path).fastest("sum", (1,), lambda: {PLAIN: lambda: None}) == PLAIN
    assert Kernels(tmp_path).fastest("sum", (1,), Ways(20, 1)) == PLAIN


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("not enough memory: you tried to allocate 9 bytes")])
def test_where_memory_does_not_suffice_to_measure_pytorch_decides(tmp_path, error, capsys):
    def no_room():
        raise error

    assert Kernels(tmp_path).fastest("sum", (1,), no_room) == PLAIN
    assert not list(tmp_path.iterdir())
    assert not capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_process_that_is_forked_while_a_thread_measures_measures_for_itself(monkeypatch):
    """The thread, and with it the lock's owner, does not exist in the child."""
    monkeypatch.setattr(kernels, "_kernels", Kernels(None))
    monkeypatch.setattr(kernels, "override", lambda: None)
    measuring, go_on = threading.Event(), threading.Event()

    def slow():
        measuring.set()
        go_on.wait(60)
        return Ways(20, 1)()

    thread = threading.Thread(target=lambda: kernels.fastest("sum", (1,), slow))
    thread.start()
    assert measuring.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if kernels.fastest("sum", (1,), Ways(20, 1)) == ONEDNN else 1)
    go_on.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_measuring_disturbs_nothing_of_the_caller():
    """No gradient, no counted operation, no global random number, no tensor on its device."""
    devices = set()

    def product():
        devices.add((torch.ones(64, 64) @ torch.ones(64, 64)).device.type)

    torch.manual_seed(0)
    state = torch.get_rng_state()
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.enable_grad():
        Kernels(None).fastest("product", (64,), lambda: {PLAIN: product, ONEDNN: product})
    assert counter.get_total_flops() == 0
    assert devices == {"cpu"}
    assert torch.equal(torch.get_rng_state(), state)


def test_many_threads_agree():
    found, names = Kernels(None), []
    ways = Ways(20, 1)
    threads = [threading.Thread(target=lambda: names.append(found.fastest("sum", (1,), ways))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == [ONEDNN] * 8
    assert ways.made == 1


@pytest.fixture
def asked(monkeypatch):
    def ask(value: str) -> None:
        monkeypatch.setenv("FLOWBENCH_KERNELS", value)
        override.cache_clear()

    yield ask
    monkeypatch.undo()
    override.cache_clear()


@pytest.mark.parametrize("name", [PLAIN, ONEDNN])
def test_the_user_may_decide(name, asked):
    asked(name)
    ways = Ways(1, 20)
    assert kernels.fastest("sum", (1,), ways) == name
    assert ways.made == 0
    assert kernels.kernel_summary() == name


def test_an_unknown_way_is_refused(asked):
    asked("mkl")
    with pytest.raises(ValueError, match="FLOWBENCH_KERNELS is 'mkl': take auto, plain or onednn"):
        kernels.fastest("sum", (1,), Ways(1, 1))


def test_shapes_are_rounded_to_powers_of_two():
    assert [rounded_up(n) for n in (1, 2, 3, 4, 5, 1000, 1024, 1025)] == [1, 2, 4, 4, 8, 1024, 1024, 2048]
