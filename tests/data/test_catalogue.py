"""The catalogue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowbench.data import (
    DENSITIES,
    SPLITS,
    USER_FORMATS,
    DatasetEntry,
    DataSpec,
    Split,
    catalogue,
    get,
    list_datasets,
    register,
)


def test_lists_the_shipped_datasets() -> None:
    assert {entry.name for entry in list_datasets()} >= {"digits", "mnist", "fashion_mnist", "cifar10", *DENSITIES}


@pytest.mark.parametrize("entry", list_datasets(), ids=lambda entry: entry.name)
def test_every_entry_is_complete_and_as_its_spec_says(entry: DatasetEntry, full_set: Callable[[str], Path]) -> None:
    assert entry.version
    assert entry.description
    assert entry.licence
    assert entry.citation
    splits = entry.load(full_set(entry.name))
    assert entry.num_samples == {name: len(split) for name, split in splits.items()}
    assert tuple(splits) == SPLITS or set(splits) == set(SPLITS)
    for split in splits.values():
        assert tuple(split.values.shape[1:]) == entry.spec.shape
        assert split.values.dtype == (torch.uint8 if entry.spec.levels else torch.float32)
        assert (split.label is None) == (entry.spec.num_classes is None)
        if split.label is not None:
            assert 0 <= split.label.min() <= split.label.max() < entry.spec.num_classes


def test_density_splits_are_fixed_and_disjoint() -> None:
    first, second = get("moons").load(Path()), get("moons").load(Path())
    assert {name: len(split) for name, split in first.items()} == {
        "train": 50_000,
        "val": 4_096,
        "test": 10_000,
    }
    assert torch.equal(first["test"].values, second["test"].values)
    assert not torch.equal(first["val"].values, first["test"].values[:4_096])


def test_register_extends_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_entries", dict(catalogue._entries))
    split = Split(torch.zeros(12, 2))
    entry = DatasetEntry(DataSpec("mine", "1", (2,)), "mine", "mine", "me", lambda root: dict.fromkeys(SPLITS, split))
    register(entry)
    assert get("mine") is entry
    assert entry in list_datasets()
    with pytest.raises(ValueError, match="the name 'mine' is taken"):
        register(entry)
    with pytest.raises(ValueError, match="the name 'npz' is taken"):
        register(replace(entry, spec=DataSpec("npz", "1", (2,))))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("digit",), "dataset: unknown name 'digit'; did you mean 'digits'? known: checkerboard, chi_arcs, cifar10"),
        (("Fashion-MNIST",), "did you mean 'fashion_mnist'?"),
        (("mnist", None, None, True), "random_flip: a mirror image of 'mnist' is no sample of it; set it to False"),
        (("zzz",), "dataset: unknown name 'zzz'; known:"),
        (("digits", "x.npz"), "path: the dataset 'digits' takes none, got 'x.npz'; remove it"),
        (("npz",), "set path to your .npz file"),
        (("npz", "/no/such.npz"), "path: '/no/such.npz' does not exist"),
        (("digits", None, 8), "image_size: only 'image_folder' resizes, 'digits' does not"),
        (("image_folder", "/", 0), "image_size must be a whole number in [1, 65536] or None, got 0"),
    ],
)
def test_bad_requests(arguments: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        get(*arguments)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_user_formats_are_named() -> None:
    assert set(USER_FORMATS) == {"npz", "npy", "pt", "image_folder"}
