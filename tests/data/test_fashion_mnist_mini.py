"""The slice that ships: whole, balanced, and a part of the full set where that can be had."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from flowbench.data import FlowDataModule, fashion_mnist_mini, get
from flowbench.data.fashion_mnist_mini import FILE, draw, load_mini

SHIPPED = Path(__file__).resolve().parents[2] / "data" / FILE


def message(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_it_ships_and_is_small() -> None:
    assert SHIPPED.stat().st_size < 1.5e6


def test_splits_are_balanced_and_share_no_image(tmp_path: Path) -> None:
    splits = get("fashion_mnist_mini").load(tmp_path)
    assert {name: len(split) for name, split in splits.items()} == {"train": 1_750, "val": 250, "test": 500}
    assert {name: len(split) for name, split in splits.items()} == get("fashion_mnist_mini").num_samples
    for split in splits.values():
        assert split.label.bincount().tolist() == [len(split) // 10] * 10
    whole = torch.cat([split.values for split in splits.values()])
    assert len(np.unique(whole.flatten(1).numpy(), axis=0)) == 2_500


def test_every_prefix_holds_all_classes(tmp_path: Path) -> None:
    for split in load_mini(tmp_path).values():
        assert (split.label[:50].bincount(minlength=10) - 5).abs().max() <= 2


def test_the_data_folder_comes_before_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FILE).write_bytes(b"broken")
    assert message(lambda: load_mini(tmp_path)).startswith(f"{tmp_path / FILE}: cannot be read (")
    with np.load(SHIPPED) as file:
        arrays = dict(file)
    arrays["test"][7, 0, 14, 14] ^= 1
    np.savez(tmp_path / FILE, **arrays)
    assert message(lambda: load_mini(tmp_path)).startswith(f"{tmp_path / FILE}: 'test' has sha256 ")
    shutil.copy(SHIPPED, tmp_path / FILE)
    monkeypatch.setattr(fashion_mnist_mini, "resource", lambda name: tmp_path / "nowhere" / name)
    assert len(load_mini(tmp_path)["test"]) == 500


def test_nowhere_to_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist_mini, "resource", lambda name: tmp_path / "nowhere" / name)
    text = message(lambda: load_mini(tmp_path))
    assert text.startswith(f"{tmp_path / FILE}: is not there; copy it from data/ of the repository")
    assert not get("fashion_mnist_mini").is_present(tmp_path)
    monkeypatch.setenv("FLOWBENCH_OFFLINE", "1")
    assert "FLOWBENCH_OFFLINE is set" in message(lambda: get("fashion_mnist_mini").fetch(tmp_path, print))


def test_drawn_anew_from_the_full_set_it_is_the_same(full_set: Callable[[str], Path]) -> None:
    splits = get("fashion_mnist").load(full_set("fashion_mnist"))
    with np.load(SHIPPED) as file:
        shipped = dict(file)
    drawn = draw(splits)
    assert set(drawn) == set(shipped)
    assert all(np.array_equal(drawn[key], shipped[key]) for key in drawn)
    whole = splits["train"].join(splits["val"])
    assert np.array_equal(whole.values[torch.from_numpy(shipped["train_index"]).long()].numpy(), shipped["train"])
    assert np.array_equal(splits["test"].label[torch.from_numpy(shipped["test_index"]).long()], shipped["test_label"])


def test_get_draws_it_where_it_is_missing(
    full_set: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist_mini, "resource", lambda name: tmp_path / "nowhere" / name)
    (tmp_path / "fashion_mnist").symlink_to((full_set("fashion_mnist") / "fashion_mnist").resolve())
    get("fashion_mnist_mini").fetch(tmp_path, print)
    assert len(load_mini(tmp_path)["train"]) == 1_750


def test_through_the_datamodule() -> None:
    data = FlowDataModule("fashion_mnist_mini", batch_size=50, train_on_val=True)
    batch = next(iter(data.train_dataloader()))
    assert batch.x.shape == (50, 1, 28, 28)
    assert len(data.split("train")) == 2_000
