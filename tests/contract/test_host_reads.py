"""What the host reads in a training step, counted on the CPU through a dispatch mode: nothing, but on logging steps.

On a GPU each read is a wait for all work that was queued before it. The CPU's own shortcuts are turned off here, so
that the steps are those of an accelerator.
"""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from flowbench.training import NonFiniteLossError

from .builders import CASES, IMAGES, POINTS, batch_of, build

aten = torch.ops.aten
# Operators whose result the host needs: a number, or the size of a tensor.
READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}
LOG_EVERY = 4

# What is read in every step, and why.
EXCEPTIONS = {
    "ot_cfm": "an assignment is solved on the host; StreamPairing solves it ahead of the step",
    "cfm_bridge": "entropic transport iterates until its marginals are right",
}
NAMES = [name for name, spec in CASES if spec.modality == "image"] + ["cfm_bridge"]


class HostReads(TorchDispatchMode):
    """Counts operators whose result the host needs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class CountReads(L.Callback):
    """Reads of each optimiser step, from the batch's arrival to the end of its hooks."""

    def __init__(self) -> None:
        self.reads: dict[int, list[str]] = {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.mode = HostReads()
        self.mode.__enter__()

    def on_train_batch_end(self, trainer, *_):
        self.mode.__exit__(None, None, None)
        self.reads[trainer.global_step - 1] = self.mode.names


@pytest.fixture
def accelerated(monkeypatch):
    """Code as it runs where reading a value means to wait."""
    for module in ("training.loss_guard", "flows.weight.normalization"):
        monkeypatch.setattr(f"flowbench.{module}.reading_waits", lambda device: True)


def fit(module, data, tmp_path, steps: int = 6, **options) -> L.Trainer:
    settings = {
        "max_steps": steps,
        "max_epochs": -1,
        "accelerator": "cpu",
        "log_every_n_steps": LOG_EVERY,
        "logger": False,
        "limit_val_batches": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    trainer = L.Trainer(**{**settings, **options})
    trainer.fit(module, data)
    return trainer


def small(name: str):
    spec = POINTS if name == "cfm_bridge" else IMAGES
    batches = [batch_of(spec, 16, seed=seed) for seed in range(8)]
    return build(name, spec, conditional=name != "cfm_bridge"), DataLoader(batches, batch_size=None)


@pytest.mark.parametrize("clip", [pytest.param(None, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_reads_nothing_but_on_logging_steps(name, clip, tmp_path, accelerated):
    module, data = small(name)
    count = CountReads()
    fit(module, data, tmp_path, callbacks=[count], gradient_clip_val=clip)
    silent = {step: reads for step, reads in count.reads.items() if (step + 1) % LOG_EVERY}
    assert len(silent) >= 4
    if name in EXCEPTIONS:
        assert any(silent.values()), f"{name} reads nothing any more: take it off the exceptions"
    else:
        assert not any(silent.values()), silent


def test_the_count_sees_a_read(tmp_path, accelerated):
    module, data = small("cfm")
    inner = module.loss

    def reading(*given):
        loss = inner(*given)
        assert loss.total.item() == loss.total
        return loss

    module.loss = reading
    count = CountReads()
    fit(module, data, tmp_path, callbacks=[count])
    assert all(reads for reads in count.reads.values())


@pytest.mark.parametrize("name", ["tarflow", "cfm", "wcfm"])
def test_a_loss_that_diverges_between_two_readings_leaves_the_weights_alone(name, tmp_path, accelerated):
    module, data = small(name)
    inner, kept = module.loss, {}

    def poisoned(*given):
        loss = inner(*given)
        if module.trainer.global_step == 1:
            kept.update({key: value.detach().clone() for key, value in module.named_parameters()})
            return type(loss)(loss.total * float("inf"))
        return loss

    module.loss = poisoned
    with pytest.raises(NonFiniteLossError, match=r"became -?(inf|nan) at step 1 \(samples \d+") as caught:
        fit(module, data, tmp_path)
    assert "\n" not in str(caught.value)
    assert module.trainer.global_step == LOG_EVERY - 1, "it is read on the logging step"
    for key, value in module.named_parameters():
        assert torch.equal(value, kept[key]), key


def test_a_diverged_training_is_neither_kept_nor_measured(tmp_path, accelerated):
    module, data = small("cfm")
    inner = module.loss
    module.loss = lambda *given: type(inner(*given))(inner(*given).total * float("nan"))
    trainer = None

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "diverged.ckpt")

    with pytest.raises(NonFiniteLossError, match="at step 0"):
        trainer = fit(module, data, tmp_path, callbacks=[Keep()])
    assert trainer is None
    assert not (tmp_path / "diverged.ckpt").exists()


def test_the_next_training_of_a_module_starts_afresh(tmp_path, accelerated):
    module, data = small("cfm")
    inner = module.loss
    module.loss = lambda *given: type(inner(*given))(inner(*given).total * float("nan"))
    with pytest.raises(NonFiniteLossError):
        fit(module, data, tmp_path)
    module.loss = inner
    before = {key: value.detach().clone() for key, value in module.named_parameters()}
    fit(module, data, tmp_path)
    assert any(not torch.equal(value, before[key]) for key, value in module.named_parameters())
