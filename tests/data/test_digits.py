"""The digits and the rule that splits them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits as sklearn_digits

from flowbench.data import Split, digits, get
from flowbench.data.split import make_splits, stratified_order

GOLDEN = {"test": "32e946f872569894", "val": "9de14f9950a76b50", "train": "6283d0314108d09e"}


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    return get("digits").load(Path("unused"))


def test_splits_cover_scikit_learns_digits_once(splits: dict[str, Split]) -> None:
    assert {name: len(split) for name, split in splits.items()} == {"train": 1077, "val": 360, "test": 360}
    bunch = sklearn_digits()
    whole = sorted((int(t), i.astype("uint8").tobytes()) for t, i in zip(bunch.target, bunch.images, strict=True))
    ours = sorted(
        (int(t), v.numpy().tobytes()) for s in splits.values() for v, t in zip(s.values, s.label, strict=True)
    )
    assert ours == whole


def test_splits_are_stratified(splits: dict[str, Split]) -> None:
    total = sum(split.label.bincount() for split in splits.values())
    for split in splits.values():
        assert (split.label.bincount() - total * len(split) / 1797).abs().max() <= 2


def test_splits_never_change(splits: dict[str, Split]) -> None:
    found = {n: hashlib.sha256(s.values.numpy().tobytes()).hexdigest()[:16] for n, s in splits.items()}
    assert found == GOLDEN


def test_spec_matches_the_values(splits: dict[str, Split]) -> None:
    spec = get("digits").spec
    for split in splits.values():
        assert split.values.dtype == torch.uint8
        assert tuple(split.values.shape[1:]) == spec.shape == (1, 8, 8)
        assert split.values.max() == spec.levels - 1 == 16
        assert split.label.dtype == torch.int64
        assert split.label.unique().tolist() == list(range(spec.num_classes))


def test_other_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"^digits: sha256 .* expected 0000"):
        digits.load_digits(Path())


@settings(max_examples=20, deadline=None)
@given(label=st.lists(st.integers(0, 4), min_size=1, max_size=80), key=st.text(max_size=5))
def test_every_prefix_of_the_order_is_stratified(label: list[int], key: str) -> None:
    classes = torch.tensor(label)
    order = stratified_order(len(label), key, classes)
    assert order.sort().values.tolist() == list(range(len(label)))
    for m in range(len(label) + 1):
        share = classes[order[:m]].bincount(minlength=5) - classes.bincount(minlength=5) * m / len(label)
        assert share.abs().max() <= 2.5


def test_cut_keeps_labels_with_their_samples() -> None:
    values = torch.arange(50.0)[:, None]
    parts = make_splits(Split(values, torch.arange(50) % 5), "key", 5, 5)
    assert [len(parts[name]) for name in ("train", "val", "test")] == [40, 5, 5]
    for part in parts.values():
        assert torch.equal(part.values[:, 0].long() % 5, part.label)
    assert not torch.equal(
        make_splits(Split(values), "other", 5, 5)["val"].values, make_splits(Split(values), "key", 5, 5)["val"].values
    )


def test_split_refuses_wrong_number_of_labels() -> None:
    with pytest.raises(ValueError, match="3 samples but 2 labels"):
        Split(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))
