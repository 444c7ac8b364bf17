"""Columns: what a data set holds beside values and labels stays with its samples on every way to a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device

from flowbench.data import Batch, Column, DatasetEntry, DataSpec, FlowDataModule, Split, catalogue, get
from tests.stand_ins import trainer_on

N = 60
SIZES = {"train": 40, "val": 8, "test": 12}
PIXELS = np.random.default_rng(0).integers(64, 256, (N, 1, 4, 6), dtype=np.uint8)
# Everything about a sample follows from its pixels, so a test can tell whether a column stayed with its sample.
MASK = (PIXELS[:, 0] > 150).astype(np.uint8)
RATERS = np.stack([PIXELS[:, 0] > level for level in (100, 150, 200)], axis=1)
SCORE = PIXELS.reshape(N, -1).mean(1)
COLUMNS = {"mask": MASK, "raters": RATERS, "score": SCORE}


def parts(array: np.ndarray) -> dict[str, np.ndarray]:
    ends = np.cumsum([0, *SIZES.values()])
    return {name: array[first:last] for name, first, last in zip(SIZES, ends, ends[1:], strict=False)}


def save(path: Path, **columns: np.ndarray) -> str:
    arrays = parts(PIXELS)
    for column, values in columns.items():
        arrays |= {f"{split}_{column}": part for split, part in parts(values).items()}
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture
def mine(tmp_path: Path) -> dict[str, Any]:
    return {"dataset": "npz", "path": save(tmp_path / "mine.npz", **COLUMNS), "batch_size": 8, "eval_batch_size": 5}


def belong(data: FlowDataModule, batch: Batch) -> bool:
    """Whether the columns of a batch are those of its pixels."""
    k = data.spec.quantize(batch.x)
    raters = torch.stack([k[:, 0] > level for level in (100, 150, 200)], dim=1)
    return (
        torch.equal(batch.columns["mask"], (k[:, 0] > 150).to(torch.uint8))
        and torch.equal(batch.columns["raters"], raters)
        and torch.allclose(batch.columns["score"], k.flatten(1).float().mean(1))
    )


def training(data: FlowDataModule, num: int = 10, rank: int = 0, world: int = 1) -> list[Batch]:
    data.trainer = trainer_on(rank, world)
    loader = iter(data.train_dataloader())
    return [next(loader) for _ in range(num)]


# --- through the datamodule


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_columns_stay_with_their_samples_in_training(mine: dict[str, Any], flip: bool, workers: int) -> None:
    batches = training(FlowDataModule(random_flip=flip, num_workers=workers, **mine))
    data = FlowDataModule(**mine)
    assert all(belong(data, batch) for batch in batches)
    assert belong(data, FlowDataModule(random_flip=flip, **mine).train_batch_at(80))
    masks = data.split("train").columns["mask"]
    mirrored = [torch.equal(batch.columns["mask"], masks[batch.index]) for batch in batches]
    assert all(mirrored) != flip


def test_processes_share_columns_as_they_share_samples(mine: dict[str, Any]) -> None:
    whole = training(FlowDataModule(random_flip=True, **mine))
    shares = [training(FlowDataModule(random_flip=True, **mine), rank=rank, world=2) for rank in range(2)]
    for number, batch in enumerate(whole):
        for name, column in batch.columns.items():
            assert torch.equal(column, torch.cat([share[number].columns[name] for share in shares]))


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_covers_the_columns_of_a_split_once(mine: dict[str, Any], split: str, world: int) -> None:
    data = FlowDataModule(random_flip=True, condition="mask", **mine)
    found = []
    for rank in range(world):
        data.trainer = trainer_on(rank, world)
        found += list(getattr(data, f"{split}_dataloader")())
    assert all(belong(data, batch) for batch in found)
    order = torch.cat([batch.index for batch in found])
    assert order.sort().values.tolist() == list(range(SIZES[split]))
    for name in COLUMNS:
        assert torch.equal(torch.cat([b.columns[name] for b in found]), data.columns(split)[name][order])
    assert torch.equal(torch.cat([b.condition for b in found]), data.split(split).columns["mask"][order])


@pytest.mark.parametrize("rows", [slice(0, 7), slice(7, None), torch.tensor([5, 0, 5, 11])], ids=str)
def test_chunks_of_columns_are_those_of_the_values(mine: dict[str, Any], rows: slice | torch.Tensor) -> None:
    data = FlowDataModule(condition="raters", **mine)
    item = torch.arange(SIZES["test"])[rows]
    batch = Batch(data.model_values("test", rows), index=item, columns=data.columns("test", rows))
    assert belong(data, batch)
    assert torch.equal(data.conditions("test", rows), batch.columns["raters"])
    assert FlowDataModule(**mine).conditions("test", rows) is None


def test_train_on_val_joins_the_columns(mine: dict[str, Any]) -> None:
    data = FlowDataModule(train_on_val=True, **mine)
    whole = data.split("train")
    assert len(whole) == len(whole.columns["mask"]) == 48
    assert belong(data, Batch(data.model_values("train"), columns=data.columns("train")))


def test_noisy_labels_leave_columns_alone(tmp_path: Path) -> None:
    label = np.arange(N) % 3
    np.savez(tmp_path / "mine.npz", x=PIXELS, label=label, **{f"x_{name}": column for name, column in COLUMNS.items()})
    data = FlowDataModule("npz", path=str(tmp_path / "mine.npz"), batch_size=8, label_noise=1.0)
    assert all(belong(data, batch) for batch in training(data))


def test_data_without_columns_have_none() -> None:
    data = FlowDataModule("digits", batch_size=4)
    batch = data.train_batch_at(0)
    assert batch.columns == {}
    assert batch.condition is None
    assert data.columns("val") == {}


def test_columns_go_to_the_device_with_the_batch(mine: dict[str, Any]) -> None:
    batch = FlowDataModule(condition="mask", **mine).train_batch_at(0)
    moved = move_data_to_device(batch, torch.device("meta"))
    tensors = [moved.x, moved.condition, *moved.columns.values()]
    assert all(tensor.is_meta for tensor in tensors)
    assert set(moved.columns) == set(COLUMNS)
    assert not batch.columns["mask"].is_meta, "the original stays"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
def test_columns_are_pinned_with_the_batch(mine: dict[str, Any]) -> None:
    batch = FlowDataModule(condition="mask", **mine).train_batch_at(0).pin_memory()
    assert all(tensor.is_pinned() for tensor in (batch.x, batch.condition, *batch.columns.values()))


# --- a user's own


def test_columns_of_data_that_are_cut_here_follow_their_samples_and_copies(tmp_path: Path) -> None:
    twice = np.concatenate([PIXELS, PIXELS[:20]])
    columns = {f"x_{name}": np.concatenate([column, column[:20]]) for name, column in COLUMNS.items()}
    np.savez(tmp_path / "mine.npz", x=twice, **columns)
    data = FlowDataModule("npz", path=str(tmp_path / "mine.npz"))
    with pytest.warns(UserWarning, match="20 images are copies of others"):
        _ = data.entry
    assert sum(len(data.split(name)) for name in SIZES) == 80
    for name in SIZES:
        assert belong(data, Batch(data.model_values(name), columns=data.columns(name)))


def test_what_lies_on_the_grid_of_the_images_is_spatial_and_said(mine: dict[str, Any], capsys: Any) -> None:
    entry = FlowDataModule(**mine).entry
    assert entry.columns == {"mask": Column((4, 6), True), "raters": Column((3, 4, 6), True), "score": Column()}
    assert entry.understood.endswith(
        "unlabelled, column mask (uint8 4x6, on the images' grid), column raters (bool 3x4x6, on the images' grid), "
        "column score (float32)"
    )


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("float64", torch.float32),
        ("float16", torch.float32),
        ("uint16", torch.int64),
        ("int32", torch.int32),
        ("bool", torch.bool),
    ],
)
def test_types_of_columns(tmp_path: Path, stored: str, expected: torch.dtype) -> None:
    path = save(tmp_path / "mine.npz", mask=MASK.astype(stored))
    column = FlowDataModule("npz", path=path).columns("train")["mask"]
    assert column.dtype == expected
    assert column.sum() == MASK[:40].sum()


def test_a_file_of_torch_may_hold_columns(tmp_path: Path) -> None:
    tensors = {"x": torch.from_numpy(PIXELS), "x_mask": torch.from_numpy(MASK).bfloat16()}
    torch.save(tensors, tmp_path / "mine.pt")
    data = FlowDataModule("pt", path=str(tmp_path / "mine.pt"), condition="x_mask"[2:])
    assert data.conditions("train").dtype == torch.float32


def test_columns_are_a_part_of_the_version_and_data_without_them_keep_theirs(tmp_path: Path) -> None:
    def version(**columns: np.ndarray) -> str:
        return get("npz", save(tmp_path / "mine.npz", **columns)).version

    found = {version(), version(mask=MASK), version(mask=1 - MASK), version(mask=MASK.astype(bool)), version(m=MASK)}
    assert len(found) == 5
    # Computed before there were columns.
    assert version() == "sha256:9af2d35d5c60966c"


BAD: list[tuple[str, Callable[[], dict[str, Any]], str]] = [
    ("one is missing", lambda: {"val_mask": None}, "give 'val_mask' and 'train_mask' both or neither"),
    ("too few", lambda: {"val_mask": MASK[:3]}, "'val_mask' must have 8 entries, one per sample, got shape (3, 4, 6)"),
    ("a number", lambda: {"val_mask": np.float32(3)}, "'val_mask' must have 8 entries, one per sample, got shape ()"),
    ("another shape", lambda: {"val_mask": MASK[:8, :2]}, "column 'mask' of 'val' has entries of shape (2, 6)"),
    (
        "another type",
        lambda: {"val_mask": MASK[:8].astype(bool)},
        "is uint8 in 'train', bool in 'val', uint8 in 'test'",
    ),
    ("NaN", lambda: {"val_mask": np.full((8, 4, 6), np.nan)}, "'val_mask': 192 values are NaN, infinite or beyond"),
    ("huge", lambda: {"val_mask": np.full((8, 4, 6), 1e300)}, "beyond float32"),
    ("complex", lambda: {"val_mask": MASK[:8] * 1j}, "holds complex numbers"),
    ("text", lambda: {"val_mask": np.array(["a"] * 8)}, "is text, no plain numbers"),
    ("too large", lambda: {"val_mask": np.full(8, 2**63, np.uint64)}, "holds integers beyond int64"),
    ("empty", lambda: {"val_mask": np.zeros((8, 0))}, "'val_mask' of shape (8, 0): a dimension is empty"),
    ("labels", lambda: {"train_labels": SCORE[:40]}, "'train_labels' is not used; labels are 'train_label'"),
    ("y", lambda: {"val_y": SCORE[:8]}, "key 'val_y' is not used; labels are 'val_label'"),
    ("no name", lambda: {"val_": SCORE[:8]}, "the name of a column consists of letters, digits and _"),
    ("no split", lambda: {"mask": MASK}, "key 'mask' is not used; known: num_classes, test, test_label"),
]


@pytest.mark.parametrize(("arrays", "expected"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_columns_cost_one_line(tmp_path: Path, arrays: Callable[[], dict[str, Any]], expected: str) -> None:
    whole = {**parts(PIXELS), **{f"{split}_mask": part for split, part in parts(MASK).items()}, **arrays()}
    np.savez(tmp_path / "mine.npz", **{key: value for key, value in whole.items() if value is not None})
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        FlowDataModule("npz", path=str(tmp_path / "mine.npz")).split("train")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


# --- the catalogue's


def entry_with(columns: dict[str, Column], load: Callable[[Path], dict[str, Split]] | None = None) -> DatasetEntry:
    def split(num: int) -> Split:
        return Split(torch.zeros(num, 1, 4, 6), columns={"mask": torch.ones(num, 4, 6, dtype=torch.bool)})

    spec = DataSpec("with_masks", "1", (1, 4, 6))
    load = load or (lambda root: {name: split(num) for name, num in SIZES.items()})
    return DatasetEntry(spec, "mine", "mine", "me", load, SIZES, flips=True, columns=columns)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[[DatasetEntry], FlowDataModule]:
    def make(entry: DatasetEntry, **options: Any) -> FlowDataModule:
        catalogue.list_datasets()
        monkeypatch.setitem(catalogue._entries, entry.name, entry)
        return FlowDataModule(entry.name, **options)

    return make


def test_the_entry_declares_its_columns(registered: Any) -> None:
    data = registered(entry_with({"mask": Column((4, 6), spatial=True)}), condition="mask", batch_size=4)
    assert data.train_batch_at(0).condition.shape == (4, 4, 6)


def masks(values: torch.Tensor) -> Callable[[Path], dict[str, Split]]:
    return lambda root: {n: Split(torch.zeros(k, 1, 4, 6), columns={"mask": values[:k]}) for n, k in SIZES.items()}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (
            entry_with({}),
            "with_masks: column 'mask' of 'train' is not declared in the entry's columns; make them agree",
        ),
        (entry_with({"mask": Column((4, 6)), "rater": Column()}), "column 'rater' of 'train' is missing"),
        (entry_with({"mask": Column((6, 4))}), "has entries of shape (4, 6), declared are (6, 4)"),
        (
            entry_with({"mask": Column()}, masks(torch.zeros(40).double())),
            "is of type float64; save one of bool, uint8",
        ),
        (entry_with({"mask": Column()}, masks(torch.full((40,), torch.inf))), "holds 40 values that are NaN or inf"),
    ],
)
def test_loaded_columns_must_be_as_declared(registered: Any, entry: DatasetEntry, expected: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        registered(entry).split("train")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_columns_are_checked_once(registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = registered(entry_with({"mask": Column()}, masks(torch.zeros(40))), batch_size=4)
    data.split("train")
    data.split("train").columns["mask"].fill_(torch.nan)
    assert data.train_batch_at(0).columns["mask"].isnan().all()


def test_columns_that_cannot_be() -> None:
    base = entry_with({"mask": Column((4, 6), spatial=True)})
    for columns, expected in [
        ({"mask": Column((6, 4), True)}, r"column 'mask' of shape \(6, 4\) does not lie on the grid \(4, 6\)"),
        ({"a mask": Column()}, "a column's name consists of letters, digits and _, got 'a mask'"),
    ]:
        with pytest.raises(ValueError, match=expected):
            replace(base, columns=columns)
    with pytest.raises(ValueError, match="does not lie on the grid"):
        replace(base, spec=DataSpec("v", "1", (3,)))
    with pytest.raises(ValueError, match=r"column.spatial: a column of shape \(4,\) has no rows and columns"):
        Column((4,), spatial=True)
    with pytest.raises(ValueError, match="3 samples but 2 entries of column 'mask'; give one per sample"):
        Split(torch.zeros(3, 2), columns={"mask": torch.zeros(2)})
    with pytest.raises(ValueError, match="3 samples but a single entries of column"):
        Split(torch.zeros(3, 2), columns={"mask": torch.tensor(1)})


def test_splits_keep_columns_when_they_are_taken_cut_and_joined() -> None:
    whole = Split(torch.arange(12.0)[:, None], columns={"twice": 2 * torch.arange(12)})
    first, second = whole.part(slice(0, 5)), whole.part(slice(5, 12))
    assert first.join(second).columns["twice"].data_ptr() == whole.columns["twice"].data_ptr(), "a view stays a view"
    assert second.join(first).columns["twice"].tolist() == [2 * value for value in second.join(first).values[:, 0]]
    assert first.join(Split(second.values)).columns == {}
    assert whole.take(torch.tensor([3, 1])).columns["twice"].tolist() == [6, 2]


# --- the condition


def test_an_unknown_condition_names_the_columns(mine: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^data.condition: 'npz:mine' has no column 'masks'; did you mean 'mask'\? "):
        _ = FlowDataModule(condition="masks", **mine).spec
    with pytest.raises(ValueError, match=r"^data.condition: 'digits' has no column 'mask'; columns: none$"):
        FlowDataModule("digits", condition="mask")
