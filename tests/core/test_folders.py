"""The one walk through folders: what it finds, what it counts, what it refuses, for data and samples alike."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowbench.core.folders import list_folder, printable
from flowbench.data import DataSpec, get
from flowbench.data.image_folder import read_image_folder
from flowbench.evaluation.external import ExternalImages

SPEC = DataSpec("any", "1", (3, 4, 4), levels=256)


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="png")
    return path


def pictures(folder: Path, num: int, first: int = 0) -> Path:
    for number in range(first, first + num):
        picture(folder / f"{number:02}.png", number)
    return folder


def message(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def pixels(values: torch.Tensor) -> list[bytes]:
    return sorted(image.numpy().tobytes() for image in values)


def data(folder: Path) -> tuple[list[bytes], str]:
    """The images of a folder of data, and its line."""
    entry = get("image_folder", folder)
    return pixels(torch.cat([split.values for split in entry.load(Path()).values()])), entry.understood


def samples(folder: Path) -> tuple[list[bytes], str]:
    """The images of a folder of samples, and its line."""
    images = ExternalImages(folder, SPEC)
    return pixels(torch.cat([part for _, part in images.batches()])), images.remark


READERS = {"data": data, "samples": samples}


@pytest.fixture(params=READERS)
def read(request) -> Callable[[Path], tuple[list[bytes], str]]:
    return READERS[request.param]


def expected(num: int, first: int = 0) -> list[bytes]:
    every = range(first, first + num)
    images = [np.random.default_rng(n).integers(0, 256, (4, 4, 3), dtype=np.uint8).transpose(2, 0, 1) for n in every]
    return sorted(np.ascontiguousarray(image).tobytes() for image in images)


# ---- links ------------------------------------------------------------------------------------------------


def test_linked_files_are_read(tmp_path, read):
    pictures(tmp_path / "elsewhere", 12)
    (tmp_path / "mine").mkdir()
    for file in (tmp_path / "elsewhere").iterdir():
        (tmp_path / "mine" / file.name).symlink_to(file)
    assert read(tmp_path / "mine")[0] == expected(12)


@pytest.mark.parametrize("relative", [False, True])
def test_linked_folders_are_entered(tmp_path, read, relative):
    pictures(tmp_path / "elsewhere", 12)
    pictures(tmp_path / "mine" / "ant", 10, first=12)
    (tmp_path / "mine" / "bee").symlink_to(Path("../elsewhere") if relative else tmp_path / "elsewhere")
    found, line = read(tmp_path / "mine")
    assert found == expected(22)
    assert "left out" not in line


def test_a_folder_that_is_itself_a_link_is_read(tmp_path, read):
    pictures(tmp_path / "elsewhere", 12)
    (tmp_path / "mine").symlink_to(tmp_path / "elsewhere")
    assert read(tmp_path / "mine")[0] == expected(12)


def test_links_that_lead_to_the_same_image_twice_are_counted(tmp_path, read):
    pictures(tmp_path / "mine" / "ant", 12)
    (tmp_path / "mine" / "bee").symlink_to("ant")
    with pytest.warns(UserWarning, match="12 images are copies") if read is data else nullcontext():
        found, line = read(tmp_path / "mine")
    assert len(found) == 24
    assert line.endswith("; 12 found again through links")


@pytest.mark.parametrize("name", ["13.png", "class", "v1.0"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path, read, name):
    pictures(tmp_path / "mine" / "ant", 12)
    folder = tmp_path / "mine" / "ant" if name == "13.png" else tmp_path / "mine"
    (folder / name).symlink_to("gone")
    text = message(lambda: read(tmp_path / "mine"))
    assert text == f"{folder / name}: is a link that leads nowhere (gone); restore what it stands for, or remove it"


def test_a_link_to_itself_is_refused(tmp_path, read):
    pictures(tmp_path / "mine" / "ant", 12)
    (tmp_path / "mine" / "loop").symlink_to("loop")
    assert "loop: is a link that leads nowhere (loop)" in message(lambda: read(tmp_path / "mine"))


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_link_back_is_refused_and_does_not_hang(tmp_path, target):
    pictures(tmp_path / "mine" / "ant", 12)
    (tmp_path / "mine" / "ant" / "back").symlink_to(target)
    text = message(lambda: samples(tmp_path / "mine"))
    assert text.endswith("is a link back to a folder that it lies in; remove it")
    assert "class folder holds a folder (back)" in message(lambda: data(tmp_path / "mine"))


# ---- what cannot be read ----------------------------------------------------------------------------------


def test_an_unreadable_subfolder_is_refused(tmp_path, read, monkeypatch):
    pictures(tmp_path / "ant", 12)
    shut = pictures(tmp_path / "bee", 12)
    real = os.listdir

    def listdir(path):
        if Path(path) == shut:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)  # root may read everything, so the right cannot be taken from it
    assert message(lambda: read(tmp_path)) == (
        f"{shut}: folder cannot be read (Permission denied); change its permissions"
    )


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"not an image"])
def test_an_image_without_an_image_is_refused(tmp_path, read, content):
    pictures(tmp_path, 12)
    (tmp_path / "12.png").write_bytes(content)
    text = message(lambda: read(tmp_path))
    assert text.startswith(f"{tmp_path / '12.png'}: image cannot be read (")


# ---- what is left out is counted --------------------------------------------------------------------------


def test_what_is_left_out_is_counted_in_one_line(tmp_path, read):
    pictures(tmp_path, 12)
    for name in (".DS_Store", "._00.png", "Thumbs.db", "notes.txt", "more.txt", "photo.heic", "README"):
        (tmp_path / name).write_bytes(b"")
    pictures(tmp_path / ".ipynb_checkpoints", 3)
    (tmp_path / "__MACOSX").mkdir()
    found, line = read(tmp_path)
    assert found == expected(12)
    assert line.endswith("; left out: 4 hidden, 5 of other kinds (.txt, no suffix, .db, .heic)")


def test_a_pipe_named_like_an_image_is_left_out_and_does_not_hang(tmp_path, read):
    pictures(tmp_path, 12)
    os.mkfifo(tmp_path / "12.png")
    found, line = read(tmp_path)
    assert found == expected(12)
    assert line.endswith("left out: 1 of other kinds (pipe or device)")


def test_nothing_left_out_is_not_mentioned(tmp_path, read):
    assert "left out" not in read(pictures(tmp_path, 12))[1]


def test_too_few_samples_say_what_was_left_out(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"")
    assert message(lambda: samples(tmp_path)) == (
        f"{tmp_path}: holds 0 images (left out: 1 of other kinds (.heic)); at least 2 are needed for a distance"
    )


# ---- names ------------------------------------------------------------------------------------------------


def test_suffixes_in_any_case_are_images(tmp_path, read):
    for number, suffix in enumerate([".png", ".PNG", ".Png"] * 4):
        picture(tmp_path / f"{number:02}{suffix}", number)
    assert read(tmp_path)[0] == expected(12)


def test_files_whose_names_differ_in_case_are_two(tmp_path, read):
    for number in range(6):
        picture(tmp_path / f"img{number}.png", 2 * number)
        picture(tmp_path / f"IMG{number}.PNG", 2 * number + 1)
    assert read(tmp_path)[0] == expected(12)


@pytest.mark.parametrize(
    ("one", "other"), [("cat", "Cat"), (unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é"))]
)
def test_classes_that_are_one_folder_elsewhere_are_refused(tmp_path, one, other):
    pictures(tmp_path / one, 12)
    pictures(tmp_path / other, 12, first=12)
    assert "differ only in how they are written; rename or merge one" in message(lambda: data(tmp_path))


def test_a_folder_may_be_named_like_an_image(tmp_path, read):
    pictures(tmp_path / "ant.png", 12)
    assert read(tmp_path)[0] == expected(12)


@pytest.mark.parametrize("bad", [b"\xff\xfe.png", b"caf\xe9.png"])
def test_names_that_are_no_text_are_read_and_named(tmp_path, read, bad):
    pictures(tmp_path, 11)
    odd = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), bad)))
    picture(odd, 11)
    assert read(tmp_path)[0] == expected(12)
    odd.write_bytes(b"broken")
    text = message(lambda: read(tmp_path))
    assert text.startswith(printable(odd))
    text.encode("utf-8")


def test_classes_are_numbered_by_name_and_files_in_the_order_of_their_names(tmp_path):
    for label, name in enumerate(["B", "a", "c"]):
        pictures(tmp_path / name, 4, first=4 * label)
    found = read_image_folder(tmp_path)
    assert found.label.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [image.tobytes() for image in found.values] == [
        np.ascontiguousarray(
            np.random.default_rng(n).integers(0, 256, (4, 4, 3), dtype=np.uint8).transpose(2, 0, 1)
        ).tobytes()
        for n in range(12)
    ]


def test_the_order_is_that_of_the_paths_part_by_part(tmp_path):
    names = ["a.png", "a/z.png", "a b/c.png", "b.png", "a/b/c.png", "Z.png"]
    for name in names:
        picture(tmp_path / name)
    found = [file.relative_to(tmp_path).as_posix() for file in list_folder(tmp_path).files]
    assert found == ["Z.png", "a/b/c.png", "a/z.png", "a b/c.png", "a.png", "b.png"]
    assert found == [p.as_posix() for p in sorted(map(Path, names), key=lambda p: p.parts)]


def test_a_level_that_is_not_entered_is_listed(tmp_path):
    picture(tmp_path / "a" / "b" / "c" / "d.png")
    found = list_folder(tmp_path, depth=2)
    assert [folder.name for folder in found.folders] == ["a", "b"]
    assert found.files == []
    assert len(list_folder(tmp_path, depth=None).files) == 1
    assert len(list_folder(tmp_path, suffixes=None).files) == 1
