from __future__ import annotations

import signal
import threading

import pytest

from flowbench.core.stopping import LISTENER, Stopped, reason_of_exit, stops_on_signals


def test_a_signal_is_raised_at_once_where_nothing_defers_it():
    with pytest.raises(Stopped, match="ended by SIGTERM") as caught, stops_on_signals():
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("went on")
    assert caught.value.status == 143


def test_a_deferred_signal_waits_for_the_better_moment():
    done = []
    with pytest.raises(Stopped) as caught, stops_on_signals():
        LISTENER.deferring = True
        signal.raise_signal(signal.SIGTERM)
        done.append("the step")
        LISTENER.raise_pending()
        done.append("more")
    assert caught.value.number == signal.SIGTERM
    assert done == ["the step"]
    assert not LISTENER.is_listening


def test_a_second_signal_does_not_wait():
    with pytest.raises(Stopped, match="interrupted") as caught, stops_on_signals():
        LISTENER.deferring = True
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")
    assert caught.value.status == 130


def test_contexts_nest_and_give_the_handlers_back():
    before = signal.getsignal(signal.SIGTERM)
    with stops_on_signals():
        inside = signal.getsignal(signal.SIGTERM)
        with stops_on_signals():
            pass
        assert signal.getsignal(signal.SIGTERM) == inside != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_handlers_of_others_stay_unless_they_are_taken_over():
    seen = []
    before = signal.signal(signal.SIGHUP, lambda number, frame: seen.append(number))
    try:
        with stops_on_signals():
            signal.raise_signal(signal.SIGHUP)
            assert seen == [signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, before)
    with pytest.raises(Stopped), stops_on_signals():
        signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))  # as Lightning does
        LISTENER.take_over()
        signal.raise_signal(signal.SIGTERM)


def test_the_warnings_of_slurm_are_left_to_lightning(monkeypatch):
    for name, value in {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "x"}.items():
        monkeypatch.setenv(name, value)
    with stops_on_signals():
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL


def test_the_script_of_a_job_is_no_task_of_slurm_and_ends_like_any_other(monkeypatch):
    """Lightning takes it for a process that is alone, and has no use of its own for the warnings then."""
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(Stopped, match="ended by SIGUSR1"), stops_on_signals():
        signal.raise_signal(signal.SIGUSR1)


def test_other_threads_leave_the_signals_alone():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def work():
        with stops_on_signals():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


def test_what_lightning_made_of_an_interrupt():
    def interrupted():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904 - as Lightning does

    with pytest.raises(SystemExit) as caught:
        interrupted()
    assert isinstance(reason_of_exit(caught.value), KeyboardInterrupt)
    other = SystemExit(3)
    assert reason_of_exit(other) is other
