from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger

from flowbench.data import Batch, FlowDataModule
from flowbench.families import Autoencoder
from flowbench.networks import KLAutoencoder
from flowbench.training import (
    SGD,
    SWAN,
    AdamW,
    EMAConfig,
    FullyShardedStrategy,
    NonFiniteLossError,
    OptimizerConfig,
    SinkGD,
    TrainingConfig,
    load_checkpoint,
    read_checkpoint,
)

from ..contract.builders import IMAGES, build


def trainer(tmp_path: Path, **options) -> L.Trainer:
    settings = {
        "max_steps": 4,
        "max_epochs": -1,
        "val_check_interval": 100,
        "check_val_every_n_epoch": None,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**{**settings, **options})


def digits(seed: int = 0) -> FlowDataModule:
    return FlowDataModule("digits", batch_size=16, seed=seed)


def model(name: str = "tarflow", **options):
    return build(name, digits().spec, **options)


OPTIMIZERS = [AdamW(lr=1e-2), SinkGD(), SWAN(), SGD()]


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("tarflow", OPTIMIZERS[0]), *(("wcfm", optimizer) for optimizer in OPTIMIZERS)],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_resumed_run_equals_the_uninterrupted_one(name, optimizer, tmp_path):
    """Weights, averaged weights, running statistics and the optimiser, to the last bit."""
    whole = model(name, training=TrainingConfig(optimizer))
    run = trainer(tmp_path, max_steps=6)
    run.fit(whole, digits())
    run.save_checkpoint(tmp_path / "whole.ckpt")
    first = model(name, training=TrainingConfig(optimizer))
    # The schedule must know the whole length, so the first half is cut short by a limit on batches.
    run = trainer(tmp_path, max_steps=6, limit_train_batches=3, max_epochs=1)
    run.fit(first, digits())
    assert run.global_step == 3
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = model(name, seed=9, training=TrainingConfig(optimizer))
    run = trainer(tmp_path, max_steps=6)
    run.fit(second, digits(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert run.global_step == 6
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    with whole.evaluating("ema"), second.evaluating("ema"):
        for key, value in whole.state_dict().items():
            assert torch.equal(value, second.state_dict()[key]), key


def test_losses_of_validations_in_training_are_kept_and_resumed(tmp_path):
    steps = {"max_steps": 4, "limit_val_batches": 2, "val_check_interval": 2, "check_val_every_n_epoch": None}
    module = model()
    run = trainer(tmp_path, **steps)
    run.fit(module, digits())
    assert list(module.validation_losses) == [2, 4]
    run.save_checkpoint(tmp_path / "a.ckpt")
    (measured,) = trainer(tmp_path, limit_val_batches=2).validate(module, digits(), verbose=False)
    assert module.validation_losses[4] == measured["val/loss"]
    assert list(module.validation_losses) == [2, 4], "a validation by itself is no point of the training"
    other = model(seed=9)
    trainer(tmp_path, **{**steps, "max_steps": 6}).fit(
        other, digits(), ckpt_path=tmp_path / "a.ckpt", weights_only=True
    )
    assert list(other.validation_losses) == [2, 4, 6]
    assert {step: other.validation_losses[step] for step in (2, 4)} == module.validation_losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda value: type(value).__name__)
def test_a_nan_loss_stops_before_the_step_with_one_line(optimizer, tmp_path):
    module = model(training=TrainingConfig(optimizer))
    inner = module.loss

    def poisoned(*given):
        loss = inner(*given)
        return type(loss)(loss.total * float("nan")) if module.trainer.global_step == 2 else loss

    module.loss = poisoned
    weights = None

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            nonlocal weights
            weights = {k: v.clone() for k, v in module.state_dict().items()}

    with pytest.raises(NonFiniteLossError, match=r"became nan at step 2 \(samples \d+") as caught:
        trainer(tmp_path, callbacks=[Watch()]).fit(module, digits())
    assert "\n" not in str(caught.value)
    arguments = "" if isinstance(optimizer, AdamW) else "init_args."
    assert f"lower model.init_args.training.optimizer.{arguments}lr" in str(caught.value)
    assert "last good checkpoint" in str(caught.value)
    for key, value in module.state_dict().items():
        assert torch.equal(value, weights[key]), key


@pytest.mark.parametrize("optimizer", [SinkGD(), SWAN(), SGD()], ids=lambda value: type(value).__name__)
def test_weights_that_are_shared_out_are_refused_before_the_training(optimizer, tmp_path):
    sharded = L.Trainer(strategy=FullyShardedStrategy(), accelerator="cpu", devices=1, logger=False)
    with pytest.raises(ValueError, match=rf"^{type(optimizer).__name__} needs whole matrices"):
        model(training=TrainingConfig(optimizer)).check_training(digits(), sharded)
    model(training=TrainingConfig(optimizer)).check_training(digits(), trainer(tmp_path))
    model().check_training(digits(), sharded)


def test_validation_uses_the_averaged_weights_and_fixed_noise(tmp_path):
    module = model("cfm")
    run = trainer(tmp_path)
    run.fit(module, digits())
    first = trainer(tmp_path).validate(module, digits(), verbose=False)
    second = trainer(tmp_path).validate(module, digits(), verbose=False)
    assert first == second
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)  # live weights only
    assert trainer(tmp_path).validate(module, digits(), verbose=False) == first


def test_gradient_accumulation_draws_fresh_noise_per_micro_batch(tmp_path):
    module = model("cfm")
    draws = []
    inner = module.training_loss

    def spy(batch, rng):
        draws.append(torch.rand(1, generator=rng).item())
        return inner(batch, rng)

    module.training_loss = spy
    trainer(tmp_path, max_steps=2, accumulate_grad_batches=2).fit(module, digits())
    assert len(draws) == len(set(draws)) == 4


def test_a_step_that_breaks_off_is_not_written_by_the_next_fit(tmp_path):
    class Break(L.Callback):
        def on_after_backward(self, trainer, module):
            raise KeyError("broken off")

    flow = model("cfm")
    with pytest.raises(KeyError):
        trainer(tmp_path, max_steps=3, log_every_n_steps=1, callbacks=[Break()]).fit(flow, digits())
    logger = CSVLogger(tmp_path, "next")
    trainer(tmp_path, max_steps=3, log_every_n_steps=3, logger=logger).fit(flow, digits())
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2"]


@pytest.mark.filterwarnings("ignore:the Gibbs weight keeps")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_logging_step_is_one_row_with_the_loss_and_every_diagnostic(accumulate, tmp_path):
    logger = CSVLogger(tmp_path)
    run = trainer(
        tmp_path,
        max_steps=7,
        log_every_n_steps=3,
        accumulate_grad_batches=accumulate,
        logger=[logger, CSVLogger(tmp_path, "other")],
    )
    run.fit(model("wcfm"), digits())
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["epoch"]) for row in rows] == [("2", "0"), ("5", "0")]
    of_weight = {"ess", "max_share", "weighted_cost", "unweighted_cost", "tilt_source", "tilt_target"}
    assert {f"train/{name}" for name in {"loss", "unweighted_loss", "coupling_cost"} | of_weight} <= set(rows[0])
    for seen in (run.callback_metrics, run.logged_metrics):
        written = {name: float(value) for name, value in rows[1].items() if name.startswith("train/")}
        assert {name: value.item() for name, value in seen.items()} == pytest.approx(written)


def test_unreadable_checkpoints_get_one_line(tmp_path):
    good = model()
    checkpoint = {"state_dict": good.state_dict()}
    good.on_save_checkpoint(checkpoint)
    path = tmp_path / "a.ckpt"
    torch.save(checkpoint, path)
    data = path.read_bytes()
    cases = {"cut": data[: len(data) // 2], "text": b"hello", "empty": b""}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read, it is cut short or corrupt") as caught:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "missing.ckpt")
    torch.save({"a": 1}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no state_dict"):
        read_checkpoint(tmp_path / "other.ckpt")
    torch.save({"state_dict": {}, "object": Path("x")}, tmp_path / "pickle.ckpt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(tmp_path / "pickle.ckpt")
    checkpoint["state_dict"].pop(next(iter(checkpoint["state_dict"])))
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="does not fit the configured model") as caught:
        load_checkpoint(model(), path)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60))
def test_any_bytes_are_refused_in_one_line(tmp_path, content):
    (tmp_path / "bytes").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read, it is cut short or corrupt|no state_dict") as caught:
        read_checkpoint(tmp_path / "bytes")
    assert "\n" not in str(caught.value)


def test_compile_switch_keeps_the_names_in_the_checkpoint(monkeypatch):
    called = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: called.append(self))
    module = build("cfm", IMAGES, training=TrainingConfig(compile=True))
    names = list(module.state_dict())
    module.setup("fit")
    assert called
    assert list(module.state_dict()) == names


def test_accumulated_gradients_equal_one_large_batch(tmp_path):
    """The stream's order is one, so two batches of 16 hold what one of 32 holds; without dequantisation noise."""

    def weights(batch_size: int, accumulate: int) -> dict[str, torch.Tensor]:
        # A large eps: where a gradient is exactly zero Adam would blow its rounding up to whole steps.
        module = model("tarflow", training=TrainingConfig(OptimizerConfig(lr=1e-2, eps=1e-4)))
        data = FlowDataModule("digits", batch_size=batch_size, dequantize="none")
        trainer(tmp_path, max_steps=3, accumulate_grad_batches=accumulate).fit(module, data)
        return module.state_dict()

    large, small = weights(32, 1), weights(16, 2)
    for key, value in large.items():
        torch.testing.assert_close(small[key], value, atol=1e-5, rtol=1e-4, msg=key)


def test_compile_reaches_the_autoencoder(monkeypatch):
    """Its network is never called as a whole: compiling that would change nothing."""
    called = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: called.append(self))
    module = Autoencoder(
        IMAGES, partial(KLAutoencoder, latent_channels=2, width=8), training=TrainingConfig(compile=True)
    )
    module.setup("fit")
    reached = []
    for child in called:
        child.register_forward_hook(lambda child, *_: reached.append(child))
    module.training_loss(Batch(torch.zeros(2, 1, 4, 4)), torch.Generator())
    assert called
    assert reached == called


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_the_autoencoder_trains_under_autocast(tmp_path, precision):
    data = digits()
    module = Autoencoder(data.spec, partial(KLAutoencoder, latent_channels=2, width=8))
    before = module.latent_std.clone()
    trainer(tmp_path, max_steps=2, precision=precision).fit(module, data)
    assert module.latent_std.isfinite()
    assert module.latent_std != before
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(("saved", "built"), [(0.0, 0.9), (0.9, 0.0)])
def test_an_average_that_only_one_side_knows_is_refused(tmp_path, saved, built):
    """An average that no file fills would be the initialisation, and would be measured as the model."""
    run = trainer(tmp_path, max_steps=1)
    run.fit(model(training=TrainingConfig(ema=EMAConfig(saved))), digits())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=f"averaged weights, but the configuration has training.ema.decay={built:g}"):
        load_checkpoint(model(training=TrainingConfig(ema=EMAConfig(built))), tmp_path / "a.ckpt")
    load_checkpoint(model(training=TrainingConfig(ema=EMAConfig(saved))), tmp_path / "a.ckpt")
