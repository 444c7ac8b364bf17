"""The datamodule, alone, under stand-in processes, and in a real trainer."""

from __future__ import annotations

import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from flowbench.data import Batch, FlowDataModule
from tests.stand_ins import trainer_on


def on_process(rank: int, world: int, step: int = 0, **options: Any) -> FlowDataModule:
    data = FlowDataModule(**options)
    data.trainer = trainer_on(rank, world, step)
    data.setup("fit")
    return data


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.x, b.x) and torch.equal(a.label, b.label) and torch.equal(a.index, b.index)


def take(loader: DataLoader[Batch], num: int) -> list[Batch]:
    return list(islice(loader, num))


def test_spec_is_known_before_setup() -> None:
    data = FlowDataModule("digits")
    assert data.spec.shape == (1, 8, 8)
    assert "_splits" not in vars(data)


def test_training_batches_are_in_model_space() -> None:
    batch = next(iter(FlowDataModule(batch_size=32).train_dataloader()))
    assert (batch.x.shape, batch.x.dtype) == ((32, 1, 8, 8), torch.float32)
    assert batch.x.abs().max() < 1
    assert len(batch) == 32
    assert batch.position == 0
    data = FlowDataModule()
    assert torch.equal(data.spec.quantize(batch.x), data.split("train").values[batch.index])
    assert torch.equal(batch.label, data.split("train").label[batch.index])


def test_same_seed_same_batches_and_other_seed_others() -> None:
    first, again, other, default = (take(FlowDataModule(seed=s).train_dataloader(), 20) for s in (0, 0, 1, None))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert all(same(a, b) for a, b in zip(first, default, strict=True))
    assert not any(same(a, b) for a, b in zip(first, other, strict=True))


def test_a_sample_gets_new_noise_in_every_epoch() -> None:
    data = FlowDataModule(batch_size=1077)
    first, second = take(data.train_dataloader(), 2)
    a, b = first.x[first.index.argsort()], second.x[second.index.argsort()]
    assert torch.equal(data.spec.quantize(a), data.spec.quantize(b))
    assert (a != b).float().mean() > 0.99


def test_batch_at_is_the_streams_batch() -> None:
    data = FlowDataModule(batch_size=100)
    for number, batch in enumerate(take(data.train_dataloader(), 15)):
        assert same(batch, data.train_batch_at(100 * number))


def test_resume_continues_the_stream() -> None:
    run = take(on_process(0, 1).train_dataloader(), 12)
    resumed = take(on_process(0, 1, step=9).train_dataloader(), 3)
    assert all(same(a, b) for a, b in zip(run[9:], resumed, strict=True))
    accumulated = FlowDataModule()
    accumulated.trainer = trainer_on(step=3, accumulate=3)
    assert same(next(iter(accumulated.train_dataloader())), run[9])


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_global_batch(world: int) -> None:
    whole = take(FlowDataModule(batch_size=32).train_dataloader(), 3)
    parts = [take(on_process(r, world, batch_size=32).train_dataloader(), 3) for r in range(world)]
    for number, batch in enumerate(whole):
        assert torch.equal(batch.x, torch.cat([part[number].x for part in parts]))
        assert torch.equal(batch.label, torch.cat([part[number].label for part in parts]))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_covers_once_with_the_same_noise(world: int) -> None:
    expected = FlowDataModule().model_values("test")
    loaders = [on_process(r, world, batch_size=6, eval_batch_size=50).test_dataloader() for r in range(world)]
    assert len({len(loader) for loader in loaders}) == 1
    batches = [batch for loader in loaders for batch in loader]
    index = torch.cat([batch.index for batch in batches])
    assert index.sort().values.tolist() == list(range(360))
    assert torch.equal(torch.cat([batch.x for batch in batches]), expected[index])
    assert all(batch.position is None for batch in batches)


def test_noise_of_splits_is_independent_and_keyed_by_seed() -> None:
    zero, one = FlowDataModule(seed=0), FlowDataModule(seed=1)
    spec = zero.spec
    offset = (zero.model_values("val") - spec.to_model(zero.split("val").values)) / spec.bin_width
    assert offset.abs().max() < 0.5
    assert abs(offset.var() - 1 / 12) < 0.002
    other = (zero.model_values("test") - spec.to_model(zero.split("test").values)) / spec.bin_width
    assert abs(torch.corrcoef(torch.stack([offset.flatten(), other.flatten()]))[0, 1]) < 0.03
    assert not torch.equal(zero.model_values("val"), one.model_values("val"))


def test_without_dequantisation_values_are_bin_centres() -> None:
    data = FlowDataModule(dequantize="none")
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch.x, data.spec.to_model(data.split("train").values[batch.index]))


def test_continuous_data_are_not_changed() -> None:
    data = FlowDataModule("moons")
    assert torch.equal(data.model_values("val"), data.split("val").values)
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch.x, data.split("train").values[batch.index])
    assert batch.label.unique().tolist() == [0, 1]
    assert next(iter(FlowDataModule("s_curve").train_dataloader())).label is None


def test_workers_do_not_change_batches() -> None:
    alone = take(FlowDataModule().train_dataloader(), 4)
    helped = take(FlowDataModule(num_workers=1).train_dataloader(), 4)
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_user_data_through_the_datamodule(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    np.savez(
        path,
        x=np.random.default_rng(0).integers(0, 256, (30, 4, 4), dtype=np.uint8),
        label=np.arange(30) % 3,
    )
    data = FlowDataModule("npz", path=str(path), batch_size=8)
    assert data.spec.num_classes == 3
    batch = next(iter(data.train_dataloader()))
    assert batch.x.shape == (8, 1, 4, 4)


def test_global_random_state_is_untouched() -> None:
    before = torch.get_rng_state()
    data = FlowDataModule("moons")
    take(data.train_dataloader(), 2)
    list(FlowDataModule().val_dataloader())
    # DataLoader itself draws a base seed for its workers from the global generator; nothing else may.
    torch.set_rng_state(before)
    data.train_batch_at(0)
    data.model_values("test")
    assert torch.equal(before, torch.get_rng_state())


def test_batch_survives_pickling() -> None:
    batch = FlowDataModule().train_batch_at(128)
    assert same(pickle.loads(pickle.dumps(batch)), batch)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dataset": "digit"}, "did you mean 'digits'"),
        ({"batch_size": 0}, "batch_size must be a whole number in [1, 1e+09], got 0"),
        ({"eval_batch_size": -1}, "eval_batch_size must be a whole number in [1, 1e+09], got -1"),
        ({"num_workers": -1}, "num_workers must be a whole number in [0, 1000], got -1"),
        ({"dequantize": "variational"}, "dequantize: must be 'uniform' or 'none', got 'variational'"),
        ({"dataset": "npz"}, "set path"),
    ],
)
def test_bad_options(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        FlowDataModule(**options)
    assert expected in str(caught.value)


def test_bad_split_name() -> None:
    with pytest.raises(ValueError, match="must be one of train, val, test, got 'dev'"):
        FlowDataModule().split("dev")


def test_batch_must_be_shared_evenly() -> None:
    with pytest.raises(ValueError, match=r"batch_size: 128 .* multiple of the 3 processes"):
        on_process(0, 3)


def test_lightnings_padding_sampler_is_refused() -> None:
    data = FlowDataModule()
    data.trainer = trainer_on(0, 2, injects=True)
    with pytest.raises(ValueError, match=r"use_distributed_sampler: .* set it to False"):
        data.setup("fit")


# --- a real trainer


class Recorder(LightningModule):
    """Learns one number and remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Batch] = []
        self.validated: list[Batch] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch)
        return (batch.x - self.mean).square().mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(max_steps: int, ckpt_path: Path | None = None, **options: Any) -> tuple[Recorder, Trainer]:
    options = {"val_check_interval": 4, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0, **options}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    module = Recorder()
    trainer.fit(module, FlowDataModule(batch_size=256), ckpt_path=ckpt_path)
    return module, trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_resumes_in_the_middle_of_an_epoch(tmp_path: Path, accumulate: int) -> None:
    options = {"accumulate_grad_batches": accumulate}
    whole, _ = fit(10, **options)
    half, trainer = fit(6, **options)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest, _ = fit(10, tmp_path / "half.ckpt", **options)
    assert len(whole.seen) == 10 * accumulate
    assert all(same(a, b) for a, b in zip(whole.seen, half.seen + rest.seen, strict=True))
    assert torch.equal(whole.mean, rest.mean)


def test_epochs_made_by_a_limit_do_not_repeat_batches() -> None:
    module, _ = fit(10, limit_train_batches=4, val_check_interval=1.0, check_val_every_n_epoch=1)
    assert [batch.position for batch in module.seen] == [256 * i for i in range(10)]


def test_validation_sees_every_sample_once() -> None:
    module, _ = fit(4)
    assert torch.cat([batch.index for batch in module.validated]).tolist() == list(range(360))


def test_overfit_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="overfit_batches: 2 does not fit"):
        fit(4, overfit_batches=2)


def test_declared_data_are_checked_when_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 4, 4), dtype=np.uint8)
    np.savez(path, x=images, label=np.arange(20) % 2)
    options: dict[str, Any] = {"dataset": "npz", "path": str(path)}
    assert FlowDataModule(**options, shape=(1, 4, 4), num_classes=2).spec.num_classes == 2
    for wrong in ({"shape": (3, 4, 4), "num_classes": 2}, {"shape": (1, 4, 4)}):
        with pytest.raises(ValueError, match=r"data\.shape and data\.num_classes declare .*; make them agree"):
            _ = FlowDataModule(**options, **wrong).spec
    with pytest.raises(ValueError, match="the catalogue knows shape and classes of 'digits'"):
        FlowDataModule("digits", shape=(1, 8, 8))
    with pytest.raises(ValueError, match="num_classes: declared as 2 without shape"):
        FlowDataModule(**options, num_classes=2)
