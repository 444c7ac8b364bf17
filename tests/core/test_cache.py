"""What is computed once per machine."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
import torch

from flowbench.core.cache import ensure, identity_key, read_tensors, write_tensors
from flowbench.core.places import locked

IDENTITY = {"dataset": "digits", "count": 3}


def test_what_is_missing_is_made_and_what_is_there_needs_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.txt"
    assert ensure(path, lambda: path.write_text("made"))
    assert path.read_text() == "made"
    lock = path.with_name("a.txt.lock")
    lock.unlink(missing_ok=True)
    assert ensure(path, lambda: path.write_text("made again"))
    assert path.read_text() == "made"
    assert not lock.exists()


def test_what_failed_is_made_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"

    def fail() -> None:
        raise RuntimeError("no network")

    with pytest.raises(RuntimeError, match="no network"):
        ensure(path, fail)
    assert ensure(path, lambda: path.write_text("made"))


def test_one_makes_it_while_the_others_wait(tmp_path: Path) -> None:
    path, made, begun, go = tmp_path / "a.txt", [], threading.Event(), threading.Event()

    def make() -> None:
        made.append(threading.get_ident())
        begun.set()
        go.wait(30)
        path.write_text("made")

    threads = [threading.Thread(target=ensure, args=(path, make)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    assert not ensure(path, make, wait=False), "another one is at it"
    go.set()
    for thread in threads:
        thread.join(30)
    assert len(made) == 1
    assert ensure(path, make, wait=False)


def test_a_folder_is_there_when_its_maker_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def make() -> None:
        folder.mkdir(exist_ok=True)
        (folder / "done").touch()

    folder.mkdir()
    assert ensure(folder, make, (folder / "done").is_file)
    assert (folder / "done").is_file()


def test_a_held_lock_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with locked(path):
        assert not ensure(path, path.touch, wait=False)
    assert ensure(path, path.touch, wait=False)


def test_tensors_come_back_as_they_went(tmp_path: Path) -> None:
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    write_tensors(tmp_path / "a.pt", IDENTITY, {"x": x, "rows": {"y": x.half()}})
    found = read_tensors(tmp_path / "a.pt", dict(reversed(IDENTITY.items())), "the tests")
    assert found.keys() == {"x", "rows"}
    assert torch.equal(found["x"], x)
    assert torch.equal(found["rows"]["y"], x.half())


@pytest.mark.parametrize("content", [b"", b"half a file", b"PK\x03\x04"])
def test_a_damaged_file_is_to_be_deleted(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^cannot read the tests .*a\.pt \(\w+\): delete the file$"):
        read_tensors(path, IDENTITY, "the tests")


def test_a_file_of_something_else_is_to_be_deleted(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_tensors(path, {**IDENTITY, "count": 4}, {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"are those of .*'count': 4.*, expected .*'count': 3.*: delete the file$"):
        read_tensors(path, IDENTITY, "the tests")
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"cannot read the tests .*\(KeyError\): delete the file"):
        read_tensors(path, IDENTITY, "the tests")


def test_the_key_depends_on_every_value_and_on_no_order() -> None:
    expected = hashlib.sha256(b'{"count": 3, "dataset": "digits"}').hexdigest()
    assert identity_key(IDENTITY, 8) == identity_key(dict(reversed(IDENTITY.items())), 8) == expected[:8]
    assert identity_key({**IDENTITY, "count": 4}, 64) != expected
