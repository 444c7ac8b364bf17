"""Files are known by what they hold; reading them once is enough."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest

from flowbench.core import contents
from flowbench.core.contents import content_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "contents"


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the files that were read."""
    names: list[str] = []
    real = contents._hash
    monkeypatch.setattr(contents, "_hash", lambda file: names.append(file.path.name) or real(file))
    return names


@pytest.fixture
def old(monkeypatch) -> None:
    """Files count as settled however new they are."""
    monkeypatch.setattr(contents, "SETTLED_NS", -1)


def make(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_a_file_is_the_beginning_of_its_sha256(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"values")
    assert content_of(path) == f"sha256:{hashlib.sha256(b'values').hexdigest()[:16]}"


def test_names_dates_and_places_play_no_part_for_a_file(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"values")
    before = content_of(path)
    os.utime(path, (1, 1))
    assert content_of(path) == before
    shutil.copy(path, tmp_path / "b.npz")
    assert content_of(tmp_path / "b.npz") == before


def test_a_change_is_noticed_though_size_and_date_stay(tmp_path, old):
    path = tmp_path / "a"
    path.write_bytes(b"values")
    os.utime(path, ns=(10**18, 10**18))
    before = content_of(path)
    time.sleep(0.02)
    path.write_bytes(b"VALUES")
    os.utime(path, ns=(10**18, 10**18))
    assert content_of(path) != before


def test_a_change_within_the_clocks_resolution_is_noticed(tmp_path):
    path = tmp_path / "a"
    for number in range(50):
        path.write_bytes(b"%06d" % number)
        assert content_of(path) == f"sha256:{hashlib.sha256(b'%06d' % number).hexdigest()[:16]}"


def test_a_settled_file_is_read_once(tmp_path, old, reads):
    path = tmp_path / "a"
    path.write_bytes(b"values")
    assert content_of(path) == content_of(path)
    assert reads == ["a"]


def test_a_file_that_was_just_changed_is_read_again(tmp_path, reads):
    path = tmp_path / "a"
    path.write_bytes(b"values")
    assert content_of(path) == content_of(path)
    assert reads == ["a", "a"]


def test_of_a_folder_only_what_changed_is_read(tmp_path, old, reads):
    folder = make(tmp_path / "photos", a=b"1", b=b"2", c__d=b"3")
    before = content_of(folder)
    assert sorted(reads) == ["a", "b", "d"]
    reads.clear()
    make(folder, b=b"4")
    assert content_of(folder) != before
    assert reads == ["b"]


CHANGES = {
    "a file's content": lambda folder: make(folder, a=b"other"),
    "a new file": lambda folder: make(folder, e=b"5"),
    "a file less": lambda folder: (folder / "b").unlink(),
    "a file's name": lambda folder: (folder / "b").rename(folder / "e"),
    "a class's name": lambda folder: (folder / "c").rename(folder / "z"),
    "two files swapped": lambda folder: make(folder, a=b"2", b=b"1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_folder_is_another_content(tmp_path, change):
    folder = make(tmp_path / "photos", a=b"1", b=b"2", c__d=b"3")
    before = content_of(folder)
    CHANGES[change](folder)
    assert content_of(folder) != before


def test_what_is_left_out_of_a_folder_of_images_plays_no_part(tmp_path):
    folder = make(tmp_path / "photos", **{"a.png": b"1", "ant__b.PNG": b"2"})
    before = content_of(folder, {".png"}, 2)
    make(folder, **{".DS_Store": b"", "notes.txt": b"", "ant__deep__c.png": b"3"})
    assert content_of(folder, {".png"}, 2) == before
    assert content_of(folder) != before
    make(folder, **{"d.Png": b"4"})
    assert content_of(folder, {".png"}, 2) != before


def test_a_folder_that_was_moved_holds_the_same(tmp_path):
    folder = make(tmp_path / "photos", a=b"1", c__d=b"3")
    before = content_of(folder)
    folder.rename(tmp_path / "elsewhere")
    assert content_of(tmp_path / "elsewhere") == before


@pytest.mark.parametrize("damage", [b"", b"{", b'{"format": 1, "files": {"": [1]}}', b'{"format": 9}', b"\xff"])
def test_a_damaged_cache_costs_time_alone(tmp_path, cache, old, reads, damage):
    path = tmp_path / "a"
    path.write_bytes(b"values")
    before = content_of(path)
    (file,) = cache.iterdir()
    file.write_bytes(damage)
    assert content_of(path) == before
    assert reads == ["a", "a"]


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path, monkeypatch, reads):
    (tmp_path / "blocked").write_text("a file where the cache should be")
    monkeypatch.setenv("FLOWBENCH_CACHE", str(tmp_path / "blocked"))
    (tmp_path / "a").write_bytes(b"values")
    assert content_of(tmp_path / "a") == content_of(tmp_path / "a")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"values")
    real = hashlib.file_digest

    def grow(handle, name):
        digest = real(handle, name)
        path.write_bytes(b"more values")
        return digest

    monkeypatch.setattr(hashlib, "file_digest", grow)
    with pytest.raises(ValueError, match="changes while it is read; wait until it is written"):
        content_of(path)


def test_reading_much_is_announced(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contents, "ANNOUNCED_BYTES", 3)
    (tmp_path / "a").write_bytes(b"values")
    content_of(tmp_path / "a")
    assert capsys.readouterr().err == f"reading the 0.0 GB of {tmp_path / 'a'} once, to identify them\n"
