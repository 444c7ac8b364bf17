"""Odd images at the door: what becomes of each, and one line for what is refused."""

from __future__ import annotations

import os
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowbench.data import get
from flowbench.data.duplicates import first_duplicates, leaks
from flowbench.data.image_folder import read_image_folder as find_images

RNG = np.random.default_rng(0)


def pixels(mode: str, seed: int = 0, size: tuple[int, int] = (6, 5)) -> np.ndarray:
    shape = size if mode in ("L", "P") else (*size, len(mode))
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, mode: str = "RGB", seed: int = 0, **options: Any) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = pixels(mode, seed)
    Image.fromarray(array, mode=mode).save(path, **options)
    return array


def fill(folder: Path, num: int = 12, mode: str = "RGB") -> list[np.ndarray]:
    return [save(folder / f"{i:02}.png", mode, seed=100 + i) for i in range(num)]


def read_image_folder(path: Path) -> tuple[torch.Tensor, torch.Tensor | None]:
    found = find_images(path)
    return torch.from_numpy(found.values), None if found.label is None else torch.from_numpy(found.label)


def message(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    a = alpha[..., None] / 255.0
    return colour * a + 255.0 * (1.0 - a)


# --- accepted


def test_grey_among_colour_becomes_colour(tmp_path: Path) -> None:
    grey, colour = save(tmp_path / "a.png", "L"), save(tmp_path / "b.png", "RGB")
    values, label = read_image_folder(tmp_path)
    assert label is None
    assert np.array_equal(values[0].numpy(), np.stack([grey] * 3))
    assert np.array_equal(values[1].numpy(), colour.transpose(2, 0, 1))


@pytest.mark.parametrize(("mode", "channels"), [("RGBA", 3), ("LA", 1)])
def test_transparency_is_laid_over_white(tmp_path: Path, mode: str, channels: int) -> None:
    array = save(tmp_path / "a.png", mode)
    values, _ = read_image_folder(tmp_path)
    expected = over_white(array[..., :-1], array[..., -1]).transpose(2, 0, 1)
    assert values.shape == (1, channels, 6, 5)
    assert np.abs(values[0].numpy() - expected).max() <= 1  # Pillow composites in integers


def test_a_transparent_colour_of_a_palette_is_white(tmp_path: Path) -> None:
    image = Image.fromarray(pixels("P") % 4)
    palette = [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120]
    image.putpalette(palette)
    image.save(tmp_path / "a.png", transparency=2)
    colours = np.array(palette, dtype=np.uint8).reshape(4, 3)
    colours[2] = 255
    values, _ = read_image_folder(tmp_path)
    assert np.array_equal(values[0].numpy(), colours[pixels("P") % 4].transpose(2, 0, 1))


def test_one_bit_images_are_grey(tmp_path: Path) -> None:
    bits = pixels("L") > 127
    Image.fromarray(bits).save(tmp_path / "a.png")
    values, _ = read_image_folder(tmp_path)
    assert np.array_equal(values[0, 0].numpy(), bits * np.uint8(255))


def test_cmyk_is_converted_by_the_plain_formula(tmp_path: Path) -> None:
    array = save(tmp_path / "a.tif", "CMYK").astype(int)
    values, _ = read_image_folder(tmp_path)
    cmy, k = array[..., :3], array[..., 3:]
    assert np.abs(values[0].numpy() - ((255 - cmy) * (255 - k) / 255).transpose(2, 0, 1)).max() <= 1


def test_five_six_five_bits_are_not_deep(tmp_path: Path) -> None:
    header = struct.pack("<2sIHHI", b"BM", 66 + 16 * 4, 0, 0, 66)
    header += struct.pack("<IiiHHIIiiII", 40, 8, 4, 1, 16, 3, 64, 0, 0, 0, 0) + struct.pack("<3I", 0xF800, 0x7E0, 0x1F)
    (tmp_path / "a.bmp").write_bytes(header + RNG.integers(0, 256, 64, dtype=np.uint8).tobytes())
    assert read_image_folder(tmp_path)[0].shape == (1, 3, 4, 8)


def test_the_first_frame_of_a_film_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (5, 6), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image_folder(tmp_path)[0][0, :, 0, 0].tolist() == [255, 0, 0]


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    fill(tmp_path / "cat", 3)
    fill(tmp_path / ".checkpoints", 2)
    (tmp_path / "cat" / "._00.png").write_bytes(b"not looked at")
    (tmp_path / "cat" / ".nested").mkdir()
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"not looked at")
    values, label = read_image_folder(tmp_path)
    assert (len(values), label.tolist()) == (3, [0, 0, 0])


def test_pixels_lie_where_torch_expects_them(tmp_path: Path) -> None:
    arrays = fill(tmp_path, 4)
    values, _ = read_image_folder(tmp_path)
    assert values.is_contiguous()
    assert np.array_equal(values.numpy(), np.stack(arrays).transpose(0, 3, 1, 2))


def test_a_large_folder_is_not_held_twice(tmp_path: Path) -> None:
    one = Image.fromarray(RNG.integers(0, 256, (128, 128, 3), dtype=np.uint8))
    one.save(tmp_path / "0000.png", compress_level=0)
    for i in range(1, 120):
        os.link(tmp_path / "0000.png", tmp_path / f"{i:04}.png")
    read_image_folder(tmp_path)
    tracemalloc.start()
    values, _ = read_image_folder(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # NumPy's arrays are traced; Pillow's own buffers are not, but each becomes an array on its way.
    assert peak < 1.2 * values.numel()


# --- refused


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif", "webp"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    fill(tmp_path)
    bad = tmp_path / f"bad.{suffix}"
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(bad)
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    text = message(lambda: get("image_folder", tmp_path, image_size=5))
    assert text.startswith(f"{bad}: image cannot be read (")
    assert text.endswith("; repair or remove it")


def png16(colour_type: int, channels: int) -> bytes:
    lines = b"".join(b"\0" + RNG.integers(0, 256, 5 * channels * 2, dtype=np.uint8).tobytes() for _ in range(6))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 5, 6, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_png(tmp_path: Path, colour_type: int, channels: int) -> None:
    fill(tmp_path)
    (tmp_path / "deep.png").write_bytes(png16(colour_type, channels))
    text = message(lambda: get("image_folder", tmp_path))
    assert text.startswith(f"{tmp_path / 'deep.png'}: has more than 8 bits per channel (mode ")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_deep_tiff(tmp_path: Path, dtype: type, compression: str | None) -> None:
    fill(tmp_path)
    Image.fromarray(RNG.integers(0, 200, (6, 5)).astype(dtype)).save(tmp_path / "deep.tif", compression=compression)
    assert "deep.tif: has more than 8 bits per channel" in message(lambda: get("image_folder", tmp_path))


def test_several_sizes_are_refused_unless_scaled(tmp_path: Path) -> None:
    fill(tmp_path)
    Image.new("RGB", (9, 6)).save(tmp_path / "wide.png")
    text = message(lambda: get("image_folder", tmp_path))
    assert text == f"{tmp_path / 'wide.png'}: is 9x6 pixels, but 00.png is 5x6; set image_size"
    assert get("image_folder", tmp_path, image_size=5).spec.shape == (3, 5, 5)


def test_an_empty_class_and_a_nested_one(tmp_path: Path) -> None:
    fill(tmp_path / "ant")
    (tmp_path / "bee").mkdir()
    assert message(lambda: get("image_folder", tmp_path)).startswith(
        f"{tmp_path / 'bee'}: class folder holds no images"
    )
    fill(tmp_path / "bee")
    fill(tmp_path / "bee" / "more")
    text = message(lambda: get("image_folder", tmp_path))
    assert text == f"{tmp_path / 'bee'}: class folder holds a folder (more); move its images up"


def test_files_and_folders_without_permission(tmp_path: Path, unprivileged: Path) -> None:
    if os.getuid() == 0:
        os.seteuid(0)
    unprivileged.chmod(0o755)
    fill(unprivileged / "ant")
    shut = unprivileged / "ant" / "03.png"
    shut.chmod(0)
    if os.getuid() == 0:
        os.seteuid(65534)
    assert message(lambda: get("image_folder", unprivileged)) == (
        f"{shut}: image cannot be read (Permission denied); change its permissions"
    )
    if os.getuid() == 0:
        os.seteuid(0)
    (unprivileged / "ant").chmod(0)
    if os.getuid() == 0:
        os.seteuid(65534)
    assert message(lambda: get("image_folder", unprivileged)) == (
        f"{unprivileged / 'ant'}: folder cannot be read (Permission denied); change its permissions"
    )
    if os.getuid() == 0:
        os.seteuid(0)
    (unprivileged / "ant").chmod(0o755)


# --- copies


def warned(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(warning.message) for warning in caught]


def test_first_copies() -> None:
    values = torch.tensor([[3, 3], [1, 2], [3, 3], [0, 0], [1, 2], [3, 3]], dtype=torch.uint8)
    assert first_duplicates(values).tolist() == [0, 1, 0, 3, 1, 0]
    assert first_duplicates(values.float()).tolist() == list(range(6))
    shared = leaks({"train": values[:2], "val": values[2:4], "test": values[4:]})
    assert shared == {("train", "val"): 1, ("train", "test"): 2, ("val", "test"): 1}
    assert leaks({"train": values[1:2], "test": values[3:4]}) == {}


def test_copies_of_a_file_never_straddle_splits(tmp_path: Path) -> None:
    originals = fill(tmp_path / "ant", 60)
    for i in range(0, 60, 2):
        save(tmp_path / "bee" / f"copy{i:02}.bmp", seed=100 + i)  # another format, the same pixels
    entry, lines = warned(lambda: get("image_folder", tmp_path))
    assert lines == [f"{tmp_path}: 30 images are copies of others; copies were put into the split of the first"]
    splits = entry.load(Path())
    assert leaks({name: split.values for name, split in splits.items()}) == {}
    assert sum(len(split) for split in splits.values()) == 90
    found = np.unique(torch.cat([split.values for split in splits.values()]).flatten(1).numpy(), axis=0)
    assert len(found) == len(originals)
    for split in splits.values():
        bees = {image.numpy().tobytes() for image, k in zip(split.values, split.label, strict=True) if k == 1}
        ants = {image.numpy().tobytes() for image, k in zip(split.values, split.label, strict=True) if k == 0}
        assert bees <= ants, "a copy lies beside its original, under its own label"


def test_without_copies_there_is_no_warning_and_the_old_order(tmp_path: Path) -> None:
    fill(tmp_path, 30)
    entry, lines = warned(lambda: get("image_folder", tmp_path))
    assert lines == []
    assert {name: len(split) for name, split in entry.load(Path()).items()} == {"train": 24, "val": 3, "test": 3}


def test_one_image_again_and_again_is_said(tmp_path: Path) -> None:
    for i in range(20):
        save(tmp_path / f"{i:02}.png", seed=1)
    entry, lines = warned(lambda: get("image_folder", tmp_path))
    assert lines == [f"{tmp_path}: holds only 1 different images; every split repeats them, so scores mean nothing"]
    assert {name: len(split) for name, split in entry.load(Path()).items()} == {"train": 16, "val": 2, "test": 2}


def test_given_splits_that_share_images_are_kept_and_said(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (20, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", train=images[:15], val=images[14:17], test=images[16:])
    entry, lines = warned(lambda: get("npz", tmp_path / "a.npz"))
    assert lines == [
        f"{tmp_path / 'a.npz'}: images lie in two splits (1 of val in train, 1 of test in val); scores will flatter a "
        "memoriser"
    ]
    assert [len(entry.load(Path())[name]) for name in ("train", "val", "test")] == [15, 3, 4]
