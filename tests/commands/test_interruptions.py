"""Whatever ends a run: one line, the right status, files that agree, and the same command goes on."""

from __future__ import annotations

import json
import signal
import sys
import threading

import pytest
import torch

from flowbench.cli import main
from flowbench.commands import runs
from flowbench.core.stopping import LISTENER
from flowbench.data import FlowDataModule
from flowbench.families import FlowModule
from flowbench.training import read_checkpoint
from flowbench.training.progress import is_trained
from tests.marks import slow

from .conftest import POINTS, latent_files, quality

SMALL = POINTS.replace("    nll: {class_path: flowbench.tasks.generation.NegativeLogLikelihood}\n", "")
EARLY = (
    "callbacks.stop={class_path: lightning.pytorch.callbacks.EarlyStopping, "
    "init_args: {monitor: val/loss, patience: 1, min_delta: 1.0e+9}}"
)


@pytest.fixture
def file(tmp_path):
    """Words of a command whose run lies in tmp_path/<name>."""
    path = tmp_path / "points.yaml"
    path.write_text(SMALL)
    return lambda name: ["-c", str(path), f"run.dir={tmp_path / name}"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "points.yaml").write_text(SMALL)
    assert main(["fit", "-c", str(folder / "points.yaml"), f"run.dir={folder / 'run'}", "--test"]) == 0
    return folder / "run"


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


def progress(folder) -> dict:
    return json.loads((folder / "progress.json").read_text())


def line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("flowbench: "), err
    assert err.count("\n") == 1, err
    return err.strip()


def same(one, other) -> None:
    first, second = (read_checkpoint(last(folder)) for folder in (one, other))
    for name, value in first["ema"]["shadow"].items():
        assert torch.equal(value, second["ema"]["shadow"][name]), name
    assert quality(one) == quality(other)
    assert (one / "curve.jsonl").read_text().count("\n") == (other / "curve.jsonl").read_text().count("\n")


def at_step(monkeypatch, step, act, hook="on_train_batch_start", cls=FlowModule):
    """Call `act` in a hook when so many steps are done; gives the context in which that is so."""
    patch = monkeypatch.context()

    def hooked(module, *given):
        if module.trainer.global_step == step:
            act()

    context = patch.__enter__()
    context.setattr(cls, hook, hooked, raising=False)
    return patch


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]


@pytest.mark.parametrize("number", [SIGNALS[0], *(slow(number) for number in SIGNALS[1:])])
def test_a_signal_in_a_training_step_ends_at_its_end_and_the_same_command_goes_on(
    file, tmp_path, capsys, monkeypatch, whole, number
):
    words, folder = file("run"), tmp_path / "run"
    patch = at_step(monkeypatch, 7, lambda: signal.raise_signal(number))
    assert main(["fit", *words, "--test"]) == 128 + number
    patch.__exit__(None, None, None)
    how = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    assert line(capsys) == f"flowbench: {how}; at step 8 of 20; the same command continues from {last(folder)} (step 8)"
    assert read_checkpoint(last(folder))["global_step"] == 8
    noted = progress(folder)
    assert (noted["phase"], noted["trained"], noted["step"], noted["reason"]) == ("interrupted", False, 8, how)
    assert not (folder / "rows.jsonl").exists()
    assert not LISTENER.is_listening
    if number in (signal.SIGTERM, signal.SIGINT):
        assert main(["fit", *words, "--test"]) == 0
        assert (progress(folder)["phase"], progress(folder)["trained"]) == ("done", True)
        same(folder, whole)


def test_a_second_signal_does_not_wait_for_the_step(file, tmp_path, capsys, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("went on")

    patch = at_step(monkeypatch, 7, twice)
    assert main(["fit", *file("run")]) == 143
    patch.__exit__(None, None, None)
    assert line(capsys).endswith("(step 6)")


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_epoch_end"])
def test_a_signal_during_validation_ends_at_once(file, tmp_path, capsys, monkeypatch, whole, hook):
    words, folder = file("run"), tmp_path / "run"
    patch = at_step(monkeypatch, 8, lambda: signal.raise_signal(signal.SIGTERM), hook)
    assert main(["fit", *words, "--test"]) == 143
    patch.__exit__(None, None, None)
    assert line(capsys).endswith("at step 8 of 20; the same command continues from " + f"{last(folder)} (step 8)")
    assert main(["fit", *words, "--test"]) == 0
    same(folder, whole)


def test_a_signal_in_the_last_step_leaves_a_finished_training(file, tmp_path, capsys, monkeypatch, whole):
    words, folder = file("run"), tmp_path / "run"
    patch = at_step(monkeypatch, 19, lambda: signal.raise_signal(signal.SIGTERM))
    assert main(["fit", *words, "--test"]) == 143
    patch.__exit__(None, None, None)
    assert read_checkpoint(last(folder))["global_step"] == 20
    assert main(["fit", *words, "--test"]) == 0
    same(folder, whole)


@pytest.mark.parametrize(
    "place",
    [
        slow("families.FlowModule.on_test_batch_start"),
        "evaluation.evaluator.Evaluator._measure",
    ],
)
def test_a_signal_while_measuring_costs_the_rows_and_not_the_training(
    file, tmp_path, capsys, monkeypatch, whole, place
):
    words, folder = file("run"), tmp_path / "run"

    def stop(*given):
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(f"flowbench.{place}", stop)
        assert main(["fit", *words, "--test"]) == 143
    assert "ended by SIGTERM; measuring after step 20 of 20; the same command continues from" in line(capsys)
    assert not (folder / "rows.jsonl").exists()
    assert (progress(folder)["phase"], progress(folder)["trained"]) == ("interrupted", True)
    trained = last(folder).read_bytes()
    assert main(["fit", *words, "--test"]) == 0
    assert last(folder).read_bytes() == trained
    same(folder, whole)
    # A measurement by hand that is interrupted leaves the run as it was.
    rows = (folder / "rows.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(f"flowbench.{place}", stop)
        assert main(["test", *words]) == 143
    assert (progress(folder)["phase"], (folder / "rows.jsonl").read_bytes()) == ("done", rows)


class Foreign(Exception):
    pass


@pytest.mark.parametrize(
    ("hook", "make"),
    [
        ("setup", lambda: Foreign("of a library")),
        ("on_fit_start", lambda: KeyError("x")),
        slow("on_train_batch_start", lambda: ValueError("of a tensor")),
        slow("on_validation_start", lambda: MemoryError()),
        slow("on_train_end", lambda: RuntimeError("shapes")),
    ],
)
def test_an_error_anywhere_in_training_is_one_line_with_its_log_and_where_the_run_stood(
    file, tmp_path, capsys, monkeypatch, hook, make
):
    error = make()
    words, folder = file("run"), tmp_path / "run"

    def fail(module, *given):
        if hook in ("setup", "on_fit_start") or module.trainer.global_step in (8, 20):
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(FlowModule, hook, fail, raising=False)
        assert main(["fit", *words]) == (2 if isinstance(error, ValueError) else 1)
    said = line(capsys)
    assert f"details in {folder / 'error.log'}; at step " in said
    assert "Traceback (most recent call last)" in (folder / "error.log").read_text()
    noted = progress(folder)
    assert (noted["phase"], noted["trained"]) == ("failed", False)
    assert noted["reason"] in said
    assert main(["fit", *words]) == 0
    assert (progress(folder)["phase"], progress(folder)["reason"]) == ("done", None)


def test_a_mistake_that_is_found_before_the_first_step_is_its_message_alone(file, tmp_path, capsys, monkeypatch):
    def refuse(module, *given):
        raise ValueError("two choices exclude each other: take one")

    with monkeypatch.context() as patch:
        patch.setattr(FlowModule, "on_fit_start", refuse, raising=False)
        assert main(["fit", *file("run")]) == 2
    assert line(capsys) == "flowbench: error: two choices exclude each other: take one"
    assert not (tmp_path / "run" / "error.log").exists()
    assert progress(tmp_path / "run")["phase"] == "failed"


def test_an_interrupt_without_the_command_line_is_an_interrupt(experiment, monkeypatch):
    """As in a notebook: Lightning would end the process."""

    def interrupt():
        raise KeyboardInterrupt

    run = experiment(SMALL)
    patch = at_step(monkeypatch, 7, interrupt)
    with pytest.raises(KeyboardInterrupt):
        runs.fit(run)
    patch.__exit__(None, None, None)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it from then on
    assert (progress(run.run_dir)["phase"], progress(run.run_dir)["reason"]) == ("interrupted", "interrupted")
    runs.fit(run)
    assert progress(run.run_dir)["trained"]


def test_in_another_thread_a_run_needs_no_signals(experiment):
    run, failures = experiment(SMALL, "budget.steps=2"), []

    def work():
        try:
            runs.fit(run)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
    assert progress(run.run_dir)["phase"] == "done"


# ---- what is finished ----------------------------------------------------------------------------------


def test_early_stopping_finishes_a_training(file, tmp_path, capsys, monkeypatch):
    words, folder = [*file("run"), EARLY], tmp_path / "run"
    assert main(["fit", *words, "--test"]) == 0
    noted = progress(folder)
    assert (noted["phase"], noted["trained"]) == ("done", True)
    assert noted["step"] == read_checkpoint(last(folder))["global_step"] == 8  # the second validation
    with monkeypatch.context() as patch:
        patch.setattr("lightning.Trainer.fit", lambda *given, **options: pytest.fail("trained again"))
        assert main(["fit", *words, "--test"]) == 0
    # What ended it under one budget does not end it under a larger one.
    assert main(["fit", *words, "budget.steps=40"]) == 0
    assert progress(folder)["step"] > 8


def test_training_that_ends_early_and_nobody_asked_is_not_finished(file, tmp_path, capsys, monkeypatch):
    words, folder = file("run"), tmp_path / "run"
    monkeypatch.setattr(FlowDataModule, "train_dataloader", lambda data: [])
    assert main(["fit", *words]) == 2
    assert "training ended after 0 steps, at 0% of its budget, and no callback asked for it" in line(capsys)
    assert not is_trained(folder / "progress.json")


def test_a_trial_leaves_the_run_alone(file, tmp_path):
    words, folder = file("run"), tmp_path / "run"
    assert main(["fit", *words, "--test"]) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert main(["fit", *words, "trainer.fast_dev_run=true", "--test", "seed=9"]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert not is_trained(folder / "fast_dev_run" / "progress.json")
    assert not (folder / "fast_dev_run" / "checkpoints").exists()


# ---- what another run requires -------------------------------------------------------------------------


@pytest.fixture
def latent(tmp_path, monkeypatch):
    """Words of a latent flow's command; the required training runs in this process."""
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "cache"))
    file = latent_files(tmp_path, autoencoder_steps=8)

    def child(command, log, environment):
        assert command[:3] == [sys.executable, "-m", "flowbench.cli"]
        LISTENER.end()  # a process of its own listens for itself
        try:
            return main(command[3:])
        finally:
            LISTENER.start()

    monkeypatch.setattr("flowbench.commands.prerequisites.run_child", child)
    return ["-c", str(file), f"run.dir={tmp_path / 'run'}"]


@pytest.mark.slow
def test_a_required_training_that_was_ended_is_not_trained_on(latent, tmp_path, capsys, monkeypatch):
    from flowbench.families import Autoencoder

    patch = at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGTERM), cls=Autoencoder)
    assert main(["fit", *latent]) == 143
    patch.__exit__(None, None, None)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("flowbench: error: training the required autoencoder was ended by SIGTERM: see ")
    (folder,) = (tmp_path / "cache").glob("autoencoder-*/")
    assert read_checkpoint(last(folder))["global_step"] == 2
    assert not last(tmp_path / "run").exists()
    assert main(["fit", *latent]) == 0
    assert read_checkpoint(last(folder))["global_step"] == 8
    assert (progress(folder)["phase"], progress(folder)["trained"]) == ("done", True)


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        (0, 1, "ended before it was finished (25% of its budget)"),
        (-9, 137, "was ended by SIGKILL, perhaps for want of memory"),
        (143, 143, "was ended by SIGTERM"),
        (1, 1, "ended with exit status 1"),
        (2, 2, "ended with exit status 2"),
    ],
)
def test_an_exit_status_alone_proves_nothing(latent, tmp_path, capsys, monkeypatch, code, status, said):
    """A child that leaves a quarter of a training, however it ends."""

    def child(command, log, environment):
        folder = log.parent
        last(folder).parent.mkdir()
        last(folder).write_bytes(b"a quarter")
        (folder / "progress.json").write_text(json.dumps({"phase": "fit", "fraction": 0.25}))
        return code

    monkeypatch.setattr("flowbench.commands.prerequisites.run_child", child)
    for _ in range(2):  # what it left is not taken the next time either
        assert main(["fit", *latent]) == status
        line_ = capsys.readouterr().err.splitlines()[-1]
        assert f"training the required autoencoder {said}: see {tmp_path}" in line_
        for folder in (tmp_path / "cache").glob("autoencoder-*/checkpoints"):
            (folder / "last.ckpt").unlink()
            folder.rmdir()


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"phase": "done", "trained": True}, True),
        ({"phase": "interrupted", "trained": True}, True),  # while it was measured
        ({"phase": "fit", "trained": False}, False),
        ({"phase": "done", "trained": False}, False),
        ({"phase": "done"}, True),  # of an earlier version
        ({"phase": "test"}, False),
        ([], False),
        (None, False),
    ],
)
def test_only_a_finished_training_counts_as_one(tmp_path, record, expected):
    if record is not None:
        (tmp_path / "progress.json").write_text(json.dumps(record))
    assert is_trained(tmp_path / "progress.json") is expected


# ---- under a scheduler ---------------------------------------------------------------------------------


def test_the_warning_of_slurm_saves_and_puts_the_job_into_the_queue(file, tmp_path, capsys, monkeypatch, whole):
    queue = tmp_path / "bin" / "scontrol"
    queue.parent.mkdir()
    queue.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "asked"}\n')
    queue.chmod(0o755)
    words, folder = file("run"), tmp_path / "run"
    variables = {
        "PATH": f"{queue.parent}:/usr/bin:/bin", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "train",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_NODELIST": "a",
    }  # fmt: skip
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        inner = at_step(patch, 7, lambda: signal.raise_signal(signal.SIGUSR1))
        assert main(["fit", *words, "--test"]) == 128 + signal.SIGUSR1
        inner.__exit__(None, None, None)
        assert (tmp_path / "asked").read_text() == "requeue 17\n"
        assert "ended by SIGUSR1; at step 8 of 20; the same command continues" in capsys.readouterr().err
        assert not list(folder.glob("hpc_ckpt_*"))
        # In the queue's next turn.
        assert main(["fit", *words, "--test"]) == 0
    same(folder, whole)
