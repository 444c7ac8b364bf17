"""Every family on the GPU: the CPU's numbers, and steps that never wait."""

from __future__ import annotations

import copy
import dataclasses

import lightning as L
import pytest
import torch
from torch.overrides import TorchFunctionMode

from flowbench.data import FlowDataModule
from flowbench.training import NonFiniteLossError

from ..contract.builders import CASES, IDS, batch_of, build

every_family = pytest.mark.parametrize(("name", "spec"), CASES, ids=IDS)
# Families whose pairs are made on the host in each step.
ON_THE_HOST = {"ot_cfm", "cfm_bridge"}


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-3) -> None:
    """Equal up to a share of the expected values' size."""
    error = (found.cpu().double() - expected.double()).norm() / expected.double().norm()
    assert float(error) < tolerance


@every_family
@pytest.mark.parametrize("conditional", [False, True])
def test_samples_densities_and_codes_are_those_of_the_cpu(name, spec, conditional, device):
    module, batch = build(name, spec, conditional=conditional).eval(), batch_of(spec, 8)
    label = batch.label if conditional else None
    noise = module.draw_noise(torch.arange(8), 0)
    expected = [module.sample(noise, label).x, module.log_prob(batch.x, label), module.encode(batch.x, label)]
    module, x, noise = module.to(device), batch.x.to(device), noise.to(device)
    label = label if label is None else label.to(device)
    found = [module.sample(noise, label).x, module.log_prob(x, label), module.encode(x, label)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device.type == device.type
        close(ours, theirs)


class DrawnOnTheHost(TorchFunctionMode):
    """Random numbers come from the host's generator, so that all devices are given the same."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if kwargs.get("generator") is not None else None
        value = func(*args, **kwargs)
        return value if device is None else value.to(device)


def loss_gradients(module, batch) -> dict[str, torch.Tensor | None]:
    """Of the training loss, which is what is trained: densities of some families are computed without gradients."""
    with DrawnOnTheHost():
        module.train().training_loss(batch, torch.Generator().manual_seed(1)).total.backward()
    return {key: parameter.grad for key, parameter in module.named_parameters()}


@every_family
def test_gradients_are_those_of_the_cpu(name, spec, device):
    module, batch = build(name, spec, conditional=True), batch_of(spec, 16)
    moved = copy.deepcopy(module).to(device)
    # Indices key generators of the host and stay there, as the datamodule leaves them.
    placed = dataclasses.replace(batch, x=batch.x.to(device), label=batch.label.to(device))
    expected, found = loss_gradients(module, batch), loss_gradients(moved, placed)
    compared = [key for key, value in expected.items() if value is not None and value.norm() > 1e-6]
    assert len(compared) > 2
    for key in compared:
        assert found[key].device.type == device.type, key
        close(found[key], expected[key], 1e-2)


class NoWaiting(L.Callback):
    """Any wait for the device inside a step that logs nothing is an error."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        logs = (trainer.global_step + 1) % trainer.log_every_n_steps == 0
        if trainer.global_step >= 2 and not logs:  # the first steps make state and choose kernels
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, *_):
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, *_):
        torch.cuda.set_sync_debug_mode("default")


def digits_trainer(tmp_path, accelerator, **options) -> L.Trainer:
    settings = {
        "max_steps": 8,
        "max_epochs": -1,
        "accelerator": accelerator,
        "devices": 1,
        "logger": False,
        "log_every_n_steps": 5,
        "gradient_clip_val": 1.0,
        "limit_val_batches": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": tmp_path,
    }
    return L.Trainer(**{**settings, **options})


def digits_module(name: str):
    data = FlowDataModule("digits", batch_size=16)
    spec = dataclasses.replace(data.spec, shape=(1, 8, 8))
    return build(name, spec, conditional=True), data


IMAGE_FAMILIES = [name for name, spec in CASES if spec.modality == "image" and not name.startswith(("star", "latent"))]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", [name for name in IMAGE_FAMILIES if name not in ON_THE_HOST])
def test_a_step_of_the_trainer_never_waits_for_the_device(name, precision, tmp_path, accelerator, cuda):
    module, data = digits_module(name)
    before = copy.deepcopy(module.state_dict())
    digits_trainer(tmp_path, accelerator, precision=precision, callbacks=[NoWaiting()]).fit(module, data)
    moved = [not torch.equal(value.cpu(), before[key]) for key, value in module.state_dict().items()]
    assert any(moved)
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.parametrize("name", ["tarflow", "cfm"])
def test_a_loss_that_diverges_between_two_readings_leaves_the_weights_alone(name, tmp_path, accelerator, cuda):
    module, data = digits_module(name)
    inner, kept = module.loss, {}

    def poisoned(*given):
        loss = inner(*given)
        if module.trainer.global_step == 3:
            kept.update({key: value.clone() for key, value in module.state_dict().items()})
            return type(loss)(loss.total * float("nan"))
        return loss

    module.loss = poisoned
    with pytest.raises(NonFiniteLossError, match=r"became nan at step 3 \(samples \d+"):
        digits_trainer(tmp_path, accelerator, max_steps=12, log_every_n_steps=10).fit(module, data)
    for key, value in dict(module.named_parameters()).items():
        assert torch.equal(value.cpu(), kept[key].cpu()), key


@pytest.mark.parametrize("name", ["tarflow", "cfm"])
def test_a_compiled_network_takes_the_steps_of_a_plain_one(name, tmp_path, accelerator, cuda):
    plain, data = digits_module(name)
    compiled = copy.deepcopy(plain)
    compiled.compile_networks = True
    for module in (plain, compiled):
        digits_trainer(tmp_path, accelerator, max_steps=3).fit(module, data)
    for (key, ours), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-2, msg=key)


@pytest.mark.parametrize("name", ["tarflow", "cfm"])
def test_memory_does_not_grow_with_the_steps(name, tmp_path, accelerator, cuda):
    allocated = {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            allocated[trainer.global_step] = torch.cuda.memory_allocated()

    module, data = digits_module(name)
    digits_trainer(tmp_path, accelerator, max_steps=120, callbacks=[Watch()]).fit(module, data)
    assert allocated[120] <= allocated[20] + 2**16


@pytest.mark.parametrize("name", ["tarflow", "wcfm"])
def test_a_resumed_run_equals_the_uninterrupted_one(name, tmp_path, accelerator):
    """Weights, averages and running statistics, to the last bit, though the generators are the device's."""
    halves = {"enable_checkpointing": True, "deterministic": True}
    whole, data = digits_module(name)
    digits_trainer(tmp_path, accelerator, **halves).fit(whole, data)
    first, data = digits_module(name)
    # The schedule must see the whole length, so the first half is cut short by a limit on batches.
    cut = digits_trainer(tmp_path, accelerator, limit_train_batches=4, max_epochs=1, **halves)
    cut.fit(first, data)
    cut.save_checkpoint(tmp_path / "half.ckpt")
    second, data = digits_module(name)
    digits_trainer(tmp_path, accelerator, **halves).fit(
        second, data, ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
