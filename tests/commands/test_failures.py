from __future__ import annotations

import errno
import fcntl
import os
import shutil

import numpy as np
import pytest
import torch

from flowbench.cli import main
from flowbench.commands import runs
from flowbench.families import FlowModule, TARFlow
from flowbench.training import read_checkpoint

from .conftest import DIGITS, POINTS


@pytest.fixture
def file(tmp_path):
    """The experiment as a file, and the words that put its run into tmp_path."""

    def make(text: str = DIGITS) -> tuple[list[str], object]:
        path, folder = tmp_path / "digits.yaml", tmp_path / "run"
        path.write_text(text)
        return ["-c", str(path), f"run.dir={folder}"], folder

    return make


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("flowbench: error: "), err
    assert err.count("\n") == 1, err
    return err


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


def test_another_configuration_in_the_same_folder_is_refused(file, capsys):
    words, folder = file()
    assert main(["fit", *words]) == 0
    before = last(folder).read_bytes()
    capsys.readouterr()
    assert main(["fit", *words, "model.init_args.training.optimizer.lr=0.1"]) == 2
    change = "model.init_args.training.optimizer.lr 0.01 -> 0.1"
    assert f"{folder} holds a run of another configuration ({change}): give another run.dir" in one_line(capsys)
    assert last(folder).read_bytes() == before
    # What changes no number is not another configuration.
    assert main(["fit", *words, "trainer.log_every_n_steps=3"]) == 0


@pytest.mark.parametrize("command", ["fit", "test", "reference"])
def test_a_folder_in_use_is_refused(file, capsys, command):
    words, folder = file()
    folder.mkdir()
    with (folder / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert main([command, *words]) == 2
    assert f"another process works in {folder}" in one_line(capsys)
    assert sorted(p.name for p in folder.iterdir()) == ["lock"]


def test_the_lock_is_held_while_a_run_works_and_given_back(file, capsys, monkeypatch):
    words, folder = file()

    def locked() -> bool:
        with (folder / "lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    seen = []
    monkeypatch.setattr(FlowModule, "on_train_start", lambda module: seen.append(locked()), raising=False)
    assert main(["fit", *words]) == 0
    assert seen == [True]
    assert not locked()


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_a_missing_checkpoint(file, capsys, tmp_path, command):
    words, folder = file()
    extra = ["--num-samples", "2", "--output", str(tmp_path / "o")] if command == "predict" else []
    missing = tmp_path / "none.ckpt"
    assert main([command, *words, "--ckpt", str(missing), *extra]) == 2
    assert f"there is no checkpoint at {missing}" in one_line(capsys)
    if command != "predict":
        assert main([command, *words]) == 2
        assert f"there is no checkpoint at {last(folder)}" in one_line(capsys)


def test_a_corrupt_checkpoint(file, capsys):
    words, folder = file()
    assert main(["fit", *words]) == 0
    whole = last(folder).read_bytes()
    torch.save({"state_dict": {}, "evil": os.system}, last(folder))
    pickled = last(folder).read_bytes()
    capsys.readouterr()
    for command, damaged in zip(
        ("fit", "test", "validate", "fit"),
        (whole[: len(whole) // 2], b"", b"no checkpoint at all", pickled),
        strict=True,
    ):
        last(folder).write_bytes(damaged)
        assert main([command, *words]) == 2
        line = one_line(capsys)
        assert "cannot be read, it is cut short or corrupt" in line
        assert str(last(folder)) in line
    assert main(["fit", *words, "--resume", "never"]) == 0


def test_checkpoints_of_another_family_shape_or_size(file, capsys, tmp_path):
    words, folder = file()
    assert main(["fit", *words]) == 0
    capsys.readouterr()
    other = tmp_path / "points.yaml"
    other.write_text(POINTS)
    # Away from the configuration beside it, which would have told them apart.
    alone = tmp_path / "alone" / "some.ckpt"
    alone.parent.mkdir()
    shutil.copy(last(folder), alone)
    given = ["--ckpt", str(alone)]
    assert main(["validate", "-c", str(other), f"run.dir={tmp_path / 'p'}", *given]) == 2
    assert "the checkpoint's family is TARFlow, but the configuration builds FlowMatching" in one_line(capsys)
    assert main(["validate", *words, *given, "model.init_args.width=24"]) == 2
    assert "does not fit the configured model: size mismatch" in one_line(capsys)
    moons = ["data.dataset=moons", "model.init_args.patch_size=1", "model.init_args.conditional=false"]
    assert main(["validate", *words, *given, *moons]) == 2
    assert "the checkpoint's shape is [1, 8, 8], but the configuration builds [2]" in one_line(capsys)
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    assert main(["validate", *words, "--ckpt", str(foreign)]) == 2
    assert "does not say which family wrote it" in one_line(capsys)


def poison(monkeypatch, step: int) -> None:
    inner = TARFlow.loss

    def poisoned(module, *given):
        loss = inner(module, *given)
        trainer = module._trainer  # the copy that counts operations has none
        bad = trainer is not None and trainer.training and trainer.global_step == step
        return type(loss)(loss.total * float("nan")) if bad else loss

    monkeypatch.setattr(TARFlow, "loss", poisoned)


def test_a_nan_loss_is_one_line_and_the_earlier_checkpoint_is_kept(file, capsys, monkeypatch):
    words, folder = file()
    with monkeypatch.context() as patch:
        poison(patch, 4)
        assert main(["fit", *words, "--test"]) == 1
    line = one_line(capsys)
    assert "the loss became nan at step 4 (samples " in line
    assert f"last good checkpoint: {last(folder)}" in line
    state = read_checkpoint(last(folder))
    assert state["global_step"] == 4
    assert all(value.isfinite().all() for value in state["state_dict"].values())
    assert not (folder / "rows.jsonl").exists()
    # Nothing is lost: without the poison the same command goes on.
    assert main(["fit", *words, "--test"]) == 0
    assert read_checkpoint(last(folder))["global_step"] == 6


def test_a_full_disk_is_one_line_and_the_previous_checkpoint_still_loads(file, capsys, monkeypatch):
    """The disk fills up in the middle of the third checkpoint."""
    words, folder = file()
    written = []
    inner = os.fsync

    def fsync(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        written.append(name)
        if sum("last.ckpt" in entry for entry in written) == 3 and "last.ckpt" in name:
            os.ftruncate(descriptor, 1000)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        inner(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert main(["fit", *words]) == 1
    assert f"No space left on device: '{last(folder)}'" in one_line(capsys)
    assert read_checkpoint(last(folder))["global_step"] == 2
    assert [p.name for p in last(folder).parent.iterdir()] == ["last.ckpt"]
    assert main(["fit", *words]) == 0


def test_a_disk_that_is_really_full(file, capsys):
    """The operating system refuses to make any file longer than a checkpoint."""
    resource = pytest.importorskip("resource")
    words, folder = file()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        assert main(["fit", *words]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"File too large: '{last(folder)}'" in one_line(capsys)
    assert not last(folder).exists()
    assert main(["fit", *words]) == 0


def test_measuring_needs_an_evaluator_and_says_so_before_training(file, capsys):
    words, folder = file()
    for command in (["fit", "--test"], ["test"], ["reference"]):
        assert main([*command, *words, "evaluator=null"]) == 2
        assert "the configuration has no section evaluator" in one_line(capsys)
    assert not (folder / "checkpoints").exists()
    assert main(["fit", *words, "evaluator=null"]) == 0


def test_sampling_from_an_autoencoder_is_refused(file, capsys, tmp_path):
    words, folder = file("""
data: {dataset: digits, batch_size: 16}
model:
  class_path: flowbench.families.Autoencoder
  init_args: {network: {class_path: flowbench.networks.KLAutoencoder, init_args: {width: 8}}}
trainer: {accelerator: cpu, devices: 1}
budget: {steps: 1}
""")
    assert main(["fit", *words]) == 0
    capsys.readouterr()
    words += ["--ckpt", str(last(folder)), "--num-samples", "2", "--output", str(tmp_path / "out")]
    assert main(["predict", *words]) == 2
    assert "predict draws samples from a flow, but the configuration builds Autoencoder" in one_line(capsys)


def test_a_diverged_sampler_costs_its_own_rows_and_no_others(experiment, monkeypatch):
    from flowbench.core.rows import read_rows

    inner = TARFlow.flow_sample

    def diverged(module, noise, *given):
        drawn = inner(module, noise, *given)
        drawn.x[0] = float("nan")
        return drawn

    monkeypatch.setattr(TARFlow, "flow_sample", diverged)
    run = experiment(DIGITS)
    runs.fit(run, test=True)
    rows = {row.metric: row for row in read_rows(run.run_dir / "rows.jsonl")}
    assert (rows["fd[identity]"].value, rows["fd[identity]"].status) == (None, "nonfinite")
    assert rows["nll"].status == "ok"
    assert np.load(run.run_dir / "samples.npz")["x"].shape == (40, 1, 8, 8)
