"""A user's own data at the door: what is accepted, and one clear line for what is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowbench.data import DatasetEntry, Split, get

N = 40
GREY = np.random.default_rng(0).integers(0, 256, (N, 6, 5), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (N, 3, 6, 5), dtype=np.uint8)
VECTORS = np.random.default_rng(2).normal(size=(N, 3))
LABEL = np.arange(N) % 4


def opened(entry: DatasetEntry) -> dict[str, Split]:
    return entry.load(Path())


def everything(entry: DatasetEntry, field: str = "values") -> torch.Tensor:
    return torch.cat([getattr(split, field) for split in opened(entry).values()])


def rows(values: Any) -> list[tuple[float, ...]]:
    return sorted(tuple(row) for row in np.asarray(values, dtype=np.float32).reshape(len(values), -1).tolist())


def save_npz(tmp_path: Path, **arrays: Any) -> Path:
    np.savez(tmp_path / "mine.npz", **arrays)
    return tmp_path / "mine.npz"


def save_image(path: Path, size: tuple[int, int] = (5, 6), mode: str = "RGB", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode=mode).save(path)
    return path


def message(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- accepted


def test_npz_images_with_labels(tmp_path: Path) -> None:
    entry = get("npz", save_npz(tmp_path, x=COLOUR, label=LABEL))
    assert entry.spec.shape == (3, 6, 5)
    assert (entry.spec.num_classes, entry.spec.levels, entry.name) == (4, 256, "npz:mine")
    assert {n: len(s) for n, s in opened(entry).items()} == {"train": 32, "val": 4, "test": 4}
    assert rows(everything(entry)) == rows(COLOUR)
    by_image = {image.tobytes(): int(label) for image, label in zip(COLOUR, LABEL, strict=True)}
    for split in opened(entry).values():
        assert [by_image[v.numpy().tobytes()] for v in split.values] == split.label.tolist()
        assert split.label.bincount().unique().numel() == 1  # stratified


def test_grey_images_get_a_channel_and_y_is_label(tmp_path: Path) -> None:
    entry = get("npz", save_npz(tmp_path, x=GREY, y=LABEL.astype(np.uint8)))
    assert entry.spec.shape == (1, 6, 5)
    assert everything(entry, "label").bincount().tolist() == [10] * 4


@pytest.mark.parametrize("dtype", ["<f4", "<f8", ">f8"])
def test_npy_vectors(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "v.npy", VECTORS.astype(dtype))
    entry = get("npy", tmp_path / "v.npy")
    assert (entry.spec.shape, entry.spec.levels, entry.spec.num_classes) == ((3,), None, None)
    assert entry.spec.units is None
    assert everything(entry).dtype == torch.float32
    assert rows(everything(entry)) == rows(VECTORS)


def test_a_single_array_may_have_any_name(tmp_path: Path) -> None:
    assert rows(everything(get("npz", save_npz(tmp_path, points=VECTORS)))) == rows(VECTORS)


def test_pt_tensor_and_dict(tmp_path: Path) -> None:
    images = torch.from_numpy(COLOUR).float() / 127.5 - 1
    torch.save(images, tmp_path / "a.pt")
    torch.save({"x": images, "label": torch.from_numpy(LABEL)}, tmp_path / "b.pt")
    plain, labelled = get("pt", tmp_path / "a.pt"), get("pt", tmp_path / "b.pt")
    assert (plain.spec.shape, plain.spec.levels, plain.spec.num_classes) == ((3, 6, 5), None, None)
    assert labelled.spec.num_classes == 4
    assert rows(everything(plain)) == rows(images)


def test_given_splits_are_kept(tmp_path: Path) -> None:
    arrays = {"train": VECTORS[:30], "val": VECTORS[30:34], "test": VECTORS[34:]}
    entry = get("npz", save_npz(tmp_path, **arrays))
    for name, array in arrays.items():
        assert rows(opened(entry)[name].values) == rows(array)
    labels = {"train_label": LABEL[:30], "val_label": LABEL[30:34], "test_label": LABEL[34:]}
    entry = get("npz", save_npz(tmp_path, **arrays, **labels))
    test = opened(entry)["test"]
    own = {tuple(row): label for row, label in zip(VECTORS.astype(np.float32).tolist(), LABEL.tolist(), strict=True)}
    assert test.label.tolist() == [own[tuple(row)] for row in test.values.tolist()], "labels stay with their samples"
    assert entry.spec.num_classes == 4


def test_declared_classes_may_be_unused(tmp_path: Path) -> None:
    assert get("npz", save_npz(tmp_path, x=VECTORS, label=LABEL * 2, num_classes=9)).spec.num_classes == 9


def test_version_is_the_content(tmp_path: Path) -> None:
    first = get("npz", save_npz(tmp_path, x=VECTORS)).version
    assert get("npz", save_npz(tmp_path, x=VECTORS)).version == first
    assert get("npz", save_npz(tmp_path, x=VECTORS + 1)).version != first
    assert get("npz", save_npz(tmp_path, x=VECTORS, label=LABEL)).version != first


def test_image_folder_with_classes(tmp_path: Path) -> None:
    for i in range(20):
        save_image(tmp_path / "faces" / ("cat" if i % 2 else "ant") / f"{i:02}.png", seed=i)
    (tmp_path / "faces" / "cat" / ".hidden.png").write_text("not looked at")
    (tmp_path / "faces" / "cat" / "notes.txt").write_text("not looked at")
    entry = get("image_folder", tmp_path / "faces")
    assert (entry.spec.shape, entry.spec.num_classes, entry.spec.levels) == ((3, 6, 5), 2, 256)
    expected = {}
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 5, 3), dtype=np.uint8).transpose(2, 0, 1)
        expected[np.ascontiguousarray(pixels).tobytes()] = i % 2  # ant = 0, cat = 1
    for split in opened(entry).values():
        for image, label in zip(split.values, split.label, strict=True):
            assert expected.pop(image.numpy().tobytes()) == label
    assert not expected


def test_flat_folder_of_grey_images_is_unlabelled(tmp_path: Path) -> None:
    for i in range(10):
        save_image(tmp_path / f"{i}.png", mode="L", seed=i)
    spec = get("image_folder", tmp_path).spec
    assert (spec.shape, spec.num_classes) == ((1, 6, 5), None)


def test_one_colour_image_makes_all_colour(tmp_path: Path) -> None:
    for i in range(9):
        save_image(tmp_path / f"{i}.png", mode="L", seed=i)
    save_image(tmp_path / "9.png", mode="RGBA")
    assert get("image_folder", tmp_path).spec.shape == (3, 6, 5)


def test_image_size_scales_and_crops_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((20, 60), dtype=np.uint8)
    wide[:, 20:40] = 200
    for i in range(10):
        Image.fromarray(wide if i % 2 else wide[:, 20:40]).save(tmp_path / f"{i}.png")
    with pytest.warns(UserWarning, match="holds only 2 different images"):
        entry = get("image_folder", tmp_path, image_size=4)
    assert entry.spec.shape == (1, 4, 4)
    values = everything(entry).int()
    # Only the bright square is left (the dark sides are 0); the bicubic kernel blends a little at its border.
    assert (values - 200).abs().max() <= 20
    assert (values[..., 1:3] - 200).abs().max() <= 5


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(10):
        Image.new("L", (8, 4), 20 * i).save(tmp_path / f"{i}.jpg", exif=exif)
    assert get("image_folder", tmp_path).spec.shape == (1, 8, 4)


# --- refused

BAD_ARRAYS: list[tuple[dict[str, Any], str]] = [
    ({"x": np.full((N, 2), np.nan)}, "80 values are NaN or infinite"),
    ({"x": np.full((N, 2), np.inf)}, "NaN or infinite"),
    ({"x": COLOUR.reshape(N, -1)}, "save vectors as float32"),
    ({"x": GREY.astype(np.float32) / 255}, "floats must be vectors (N, d) or images (N, C, H, W)"),
    ({"x": COLOUR.transpose(0, 2, 3, 1)}, "channels seem to come last; transpose to (N, C, H, W)"),
    ({"x": VECTORS[:9]}, "'x' holds 9 samples; at least 10 are needed"),
    ({"x": VECTORS[:, :0]}, "a dimension is empty"),
    ({"x": np.float32(3)}, "floats must be vectors"),
    ({"x": np.array(["a"] * N)}, "'x' is text, no plain numbers"),
    ({"x": VECTORS, "label": LABEL[:-1]}, "must have shape (40,), got (39,)"),
    ({"x": VECTORS, "label": LABEL * 1.0}, "must be integers, got float64"),
    ({"x": VECTORS, "label": LABEL - 1}, "labels out of range: found -1 to 2, expected 0 to 2"),
    (
        {"x": VECTORS, "label": LABEL + 1},
        "labels out of range: 4 different values from 1 to 4, expected 0 to 3",
    ),
    ({"x": VECTORS, "label": LABEL, "num_classes": 3}, "labels out of range: found 0 to 3, expected 0 to 2"),
    ({"x": VECTORS, "num_classes": 3}, "there are no labels"),
    ({"x": VECTORS, "label": LABEL, "num_classes": 0}, "must be one positive integer"),
    ({"x": VECTORS, "label": LABEL, "y": LABEL}, "both 'label' and 'y'"),
    ({"x": VECTORS, "labels": LABEL}, "key 'labels' is not used; known: label, num_classes, x, y"),
    ({"a": VECTORS, "b": VECTORS}, "key 'x' is missing; found: a, b"),
    ({"label": LABEL}, "key 'x' is missing; found: label"),
    ({}, "key 'x' is missing; found: none"),
    ({"train": VECTORS, "val": VECTORS}, "key 'test' is missing"),
    ({"train": VECTORS, "val": VECTORS, "test": VECTORS[:0]}, "'test' holds 0 samples; at least 1"),
    (
        {"train": VECTORS, "val": VECTORS, "test": VECTORS[:, :2]},
        "'test' holds float64 samples of shape (2,), 'train'",
    ),
    (
        {"train": VECTORS, "val": VECTORS, "test": VECTORS, "train_label": LABEL},
        "give 'val_label' and 'train_label'",
    ),
]


@pytest.mark.parametrize(("arrays", "expected"), BAD_ARRAYS, ids=[text for _, text in BAD_ARRAYS])
def test_bad_arrays(tmp_path: Path, arrays: dict[str, Any], expected: str) -> None:
    path = save_npz(tmp_path, **arrays)
    text = message(lambda: get("npz", path))
    assert text.startswith(str(path))
    assert expected in text


@pytest.mark.parametrize("kind", ["npz", "npy", "pt"])
@pytest.mark.parametrize("content", [b"", b"no such format", b"PK\x03\x04broken", b"\x93NUMPY\x01\x00"])
def test_broken_files(tmp_path: Path, kind: str, content: bytes) -> None:
    path = tmp_path / f"broken.{kind}"
    path.write_bytes(content)
    assert message(lambda: get(kind, path)).startswith(f"{path}: cannot be read as {kind}")


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([print] * 20, dtype=object))
    assert "cannot be read as npy" in message(lambda: get("npy", tmp_path / "objects.npy"))
    torch.save({"x": Path("/")}, tmp_path / "objects.pt")
    assert "cannot be read as pt" in message(lambda: get("pt", tmp_path / "objects.pt"))


def test_folder_instead_of_file_and_back(tmp_path: Path) -> None:
    assert "expected a .npz file, got a folder" in message(lambda: get("npz", tmp_path))
    path = save_npz(tmp_path, x=VECTORS)
    assert "expected a folder of images, got a file" in message(lambda: get("image_folder", path))


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDRbroken"])
def test_unreadable_image(tmp_path: Path, content: bytes) -> None:
    for i in range(10):
        save_image(tmp_path / "a" / f"{i}.png")
    bad = tmp_path / "a" / "5.png"
    bad.write_bytes(content)
    assert message(lambda: get("image_folder", tmp_path)).startswith(f"{bad}: image cannot be read")


def test_truncated_image(tmp_path: Path) -> None:
    for i in range(10):
        save_image(tmp_path / f"{i}.png", size=(64, 64))
    bad = tmp_path / "7.png"
    bad.write_bytes(bad.read_bytes()[:2000])
    assert message(lambda: get("image_folder", tmp_path)).startswith(f"{bad}: image cannot be read")


def test_empty_folders(tmp_path: Path) -> None:
    assert message(lambda: get("image_folder", tmp_path)).startswith(f"{tmp_path}: holds no images")
    (tmp_path / "class").mkdir()
    assert f"{tmp_path / 'class'}: class folder holds no images" in message(lambda: get("image_folder", tmp_path))


def test_images_beside_classes(tmp_path: Path) -> None:
    save_image(tmp_path / "class" / "a.png")
    save_image(tmp_path / "b.png")
    assert "holds both images (b.png) and subfolders (class)" in message(lambda: get("image_folder", tmp_path))


def test_several_sizes(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", size=(5, 6))
    save_image(tmp_path / "b.png", size=(7, 6))
    text = message(lambda: get("image_folder", tmp_path))
    assert "b.png: is 7x6 pixels, but a.png is 5x6; set image_size" in text


def test_sixteen_bits(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(tmp_path / "deep.png")
    assert "more than 8 bits per channel" in message(lambda: get("image_folder", tmp_path))


def test_too_few_images(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    assert "holds 1 samples; at least 10" in message(lambda: get("image_folder", tmp_path))


@pytest.mark.parametrize("given", [False, True])
def test_every_prefix_of_a_split_holds_all_classes_though_the_file_is_sorted_by_class(tmp_path, given):
    values = np.random.default_rng(0).normal(size=(400, 16))
    label = np.sort(np.arange(400) % 4)
    arrays = {"x": values, "label": label}
    if given:
        arrays = {name: values for name in ("train", "val", "test")}
        arrays |= {f"{name}_label": label for name in ("train", "val", "test")}
    for split in opened(get("npz", save_npz(tmp_path, **arrays))).values():
        assert torch.equal(split.label[:20].bincount(minlength=4), torch.full((4,), 5))
