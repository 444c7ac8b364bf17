"""Mirroring, training on the validation split too, and chunks of a split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.data import DataSpec, FlowDataModule, Split
from tests.stand_ins import trainer_on

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 3, 4, 6), dtype=np.uint8)


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Any]:
    np.savez(tmp_path / "mine.npz", x=PIXELS, label=np.arange(64) % 4)
    return {"dataset": "npz", "path": str(tmp_path / "mine.npz"), "batch_size": 16}


def batches(data: FlowDataModule, num: int = 12, rank: int = 0, world: int = 1, step: int = 0) -> list:
    data.trainer = trainer_on(rank, world, step)
    loader = iter(data.train_dataloader())
    return [next(loader) for _ in range(num)]


def mirrored(data: FlowDataModule, batch: Any) -> list[bool]:
    """Which images of a batch are mirrored; each must be its original or its mirror image."""
    found = data.spec.quantize(batch.x)
    original = data.split("train").values[batch.index]
    plain, mirror = (found == original).flatten(1).all(1), (found == original.flip(-1)).flatten(1).all(1)
    assert (plain ^ mirror).all()
    return mirror.tolist()


def test_half_of_the_training_images_are_mirrored_and_never_the_same_half(pictures: dict[str, Any]) -> None:
    data = FlowDataModule(random_flip=True, **pictures)
    seen = [mirrored(data, batch) for batch in batches(data, 60)]
    total = sum(map(sum, seen))
    assert abs(total - 480) < 4 * np.sqrt(960 / 4)  # binomial, four standard deviations
    assert len({tuple(flips) for flips in seen}) > 50


def test_flips_are_keyed_and_change_neither_order_nor_labels_nor_noise(pictures: dict[str, Any]) -> None:
    plain, first, again = (batches(FlowDataModule(random_flip=flip, **pictures)) for flip in (False, True, True))
    other = batches(FlowDataModule(random_flip=True, seed=1, **pictures))
    for a, b, c in zip(plain, first, again, strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.label, b.label)
        assert torch.equal(b.x, c.x)
        same = torch.tensor(mirrored(FlowDataModule(**pictures), b)).logical_not()
        assert torch.equal(a.x[same], b.x[same])
    assert not any(torch.equal(a.x, b.x) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_flips(pictures: dict[str, Any], world: int) -> None:
    whole = batches(FlowDataModule(random_flip=True, **pictures))
    parts = [batches(FlowDataModule(random_flip=True, **pictures), rank=r, world=world) for r in range(world)]
    for number, batch in enumerate(whole):
        assert torch.equal(batch.x, torch.cat([part[number].x for part in parts]))


def test_a_resumed_run_sees_the_same_flips(pictures: dict[str, Any]) -> None:
    run = batches(FlowDataModule(random_flip=True, **pictures))
    rest = batches(FlowDataModule(random_flip=True, **pictures), num=3, step=9)
    assert all(torch.equal(a.x, b.x) for a, b in zip(run[9:], rest, strict=True))


def test_evaluation_is_never_mirrored(pictures: dict[str, Any]) -> None:
    plain, flipped = FlowDataModule(**pictures), FlowDataModule(random_flip=True, **pictures)
    for name in ("train", "val", "test"):
        assert torch.equal(plain.model_values(name), flipped.model_values(name))
    for loader in ("val_dataloader", "test_dataloader"):
        for a, b in zip(getattr(plain, loader)(), getattr(flipped, loader)(), strict=True):
            assert torch.equal(a.x, b.x)


@pytest.mark.parametrize("dataset", ["digits", "mnist", "fashion_mnist", "fashion_mnist_mini"])
def test_flips_are_refused_where_a_mirror_image_is_no_sample(dataset: str) -> None:
    with pytest.raises(ValueError, match=f"^random_flip: a mirror image of '{dataset}' is no sample of it; set it to"):
        FlowDataModule(dataset, random_flip=True)


def test_flips_of_vectors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="random_flip: 'moons' holds vectors"):
        FlowDataModule("moons", random_flip=True)
    np.savez(tmp_path / "v.npz", x=np.random.default_rng(0).normal(size=(20, 3)))
    with pytest.raises(ValueError, match="random_flip: 'npz:v' holds vectors"):
        _ = FlowDataModule("npz", path=str(tmp_path / "v.npz"), random_flip=True).entry


def test_cifar_may_be_mirrored(full_set: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWBENCH_DATA", str(full_set("cifar10")))
    data = FlowDataModule("cifar10", random_flip=True)
    assert 0 < sum(mirrored(data, batches(data, 1)[0])) < 128


# --- train_on_val


@pytest.mark.parametrize("dataset", ["digits", "moons", "fashion_mnist_mini"])
def test_training_on_both_splits(dataset: str) -> None:
    apart, both = FlowDataModule(dataset), FlowDataModule(dataset, train_on_val=True, batch_size=100)
    expected = torch.cat([apart.split("train").values, apart.split("val").values])
    assert torch.equal(both.split("train").values, expected)
    assert torch.equal(both.split("val").values, apart.split("val").values)
    assert torch.equal(both.split("test").values, apart.split("test").values)
    seen = torch.cat([batch.index for batch in batches(both, len(expected) // 100)])
    assert seen.max() >= len(apart.split("train"))


def test_joining_copies_only_what_does_not_lie_together() -> None:
    whole = Split(torch.arange(24.0).reshape(12, 2), torch.arange(12))
    first, second, last = whole.part(slice(0, 5)), whole.part(slice(5, 9)), whole.part(slice(9, 12))
    assert first.join(second).values.data_ptr() == whole.values.data_ptr()
    assert torch.equal(first.join(second).values, whole.values[:9])
    assert torch.equal(second.join(last).label, torch.arange(5, 12))
    for one, two in ((first, last), (second, first), (first, Split(second.values.clone()))):
        assert torch.equal(one.join(two).values, torch.cat([one.values, two.values]))
    assert first.join(Split(second.values)).label is None


# --- chunks


CHUNKS = [slice(0, 7), slice(7, None), slice(None, None, 3), torch.tensor([5, 0, 5, 33])]


@pytest.mark.parametrize("rows", CHUNKS, ids=str)
@pytest.mark.parametrize("dequantize", ["uniform", "none"])
def test_chunks_are_chunks_of_the_whole(dequantize: Any, rows: slice | torch.Tensor) -> None:
    data = FlowDataModule("digits", dequantize=dequantize)
    whole = data.model_values("test")
    assert torch.equal(data.model_values("test", rows), whole[rows])
    assert torch.equal(data.uint8_images("test", rows), data.spec.to_uint8(whole[rows]))


@pytest.mark.parametrize("dataset", ["digits", "fashion_mnist_mini"])
def test_pictures_need_no_dequantisation(dataset: str) -> None:
    data = FlowDataModule(dataset)
    pictures = data.uint8_images("val")
    assert torch.equal(pictures, data.spec.to_uint8(data.model_values("val")))
    pictures.zero_()
    assert data.uint8_images("val").any(), "a copy"


def test_pictures_of_continuous_images_and_of_vectors(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", x=np.random.default_rng(0).uniform(-1, 1, (20, 1, 4, 4)))
    data = FlowDataModule("npz", path=str(tmp_path / "c.npz"))
    assert torch.equal(data.uint8_images("train"), data.spec.to_uint8(data.model_values("train")))
    with pytest.raises(ValueError, match="only images have a picture"):
        FlowDataModule("moons").uint8_images("train", slice(0, 3))


@settings(max_examples=60, deadline=None)
@given(levels=st.integers(2, 256), seed=st.integers(0, 1000))
def test_the_grid_alone_decides_the_picture(levels: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    spec = DataSpec("grid", "1", (1, 8, 8), levels=levels)
    k = torch.randint(0, levels, (6, 1, 8, 8), generator=rng, dtype=torch.uint8)
    assert torch.equal(spec.grid_to_uint8(k), spec.to_uint8(spec.dequantize(k, rng)))


@settings(max_examples=60, deadline=None)
@given(levels=st.sampled_from([2, 4, 16, 17, 64, 100, 128, 255, 256]), seed=st.integers(0, 1000))
def test_the_fast_map_to_model_space_is_the_exact_one_rounded_once(levels: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    k = torch.randint(0, levels, (4, 1, 8, 8), generator=rng, dtype=torch.uint8)
    u = torch.rand((4, 1, 8, 8), generator=rng)
    u[0, 0, 0], u[1, 0, 0] = 0.0, 1.0
    found = DataSpec("grid", "1", (1, 8, 8), levels=levels).to_model(k, u)
    inside = u.double().clamp(2.0**-17, 1 - 2.0**-17)
    assert torch.equal(found, (2.0 * (k.double() + inside) / levels - 1.0).float())
