"""Where caches, data sets and the paths that people write lie."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest

from flowbench.core import places
from flowbench.core.places import cache_dir, cached, data_root, data_roots, expand, locked, writable

FETCHED = "metadata.json"


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without settings, in an empty working directory, with a package outside any checkout."""
    for name in ("FLOWBENCH_CACHE", "FLOWBENCH_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / ".cache"))
    monkeypatch.setattr(places, "_CHECKOUT", tmp_path / "checkout")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    return path


def message(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_cache_is_the_users_and_not_the_working_directorys(nowhere: Path) -> None:
    assert cache_dir() == nowhere / "home" / ".cache" / "flowbench"
    assert data_root("mnist") == data_root() == cache_dir() / "data"
    assert not list(Path.cwd().iterdir())


def test_the_environment_names_other_places_and_its_tilde_is_the_home(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWBENCH_CACHE", "~/there")
    assert cache_dir() == cached("x.pt").parent == nowhere / "home" / "there"
    assert data_root() == nowhere / "home" / "there" / "data", "downloads follow the cache"
    monkeypatch.setenv("FLOWBENCH_DATA", "~/sets")
    assert data_roots() == [nowhere / "home" / "sets"]
    monkeypatch.setenv("FLOWBENCH_CACHE", "")
    assert cache_dir() == nowhere / "home" / ".cache" / "flowbench", "empty is not set"


def test_a_data_set_that_lies_here_or_in_the_checkout_is_found(nowhere: Path) -> None:
    put(nowhere / "checkout" / "data" / "cifar10" / FETCHED)
    put(Path("data") / "mnist" / FETCHED)
    put(Path("data") / "fashion_mnist" / "0.png")  # somebody's own folder of that name
    assert data_root("mnist") == Path("data")
    assert data_root("cifar10") == nowhere / "checkout" / "data"
    assert data_root("fashion_mnist") == cache_dir() / "data"


def test_data_are_looked_for_in_one_place_where_the_environment_names_it(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(Path("data") / "mnist" / FETCHED)
    monkeypatch.setenv("FLOWBENCH_DATA", str(nowhere / "sets"))
    assert data_root("mnist") == nowhere / "sets"


def test_what_an_earlier_version_kept_in_data_cache_is_used_up(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = put(Path("data") / "cache" / "weights" / "a.pth")
    features = put(nowhere / "checkout" / "data" / "cache" / "features" / "b.npz")
    assert cached("weights", "a.pth") == weights
    assert cached("features", "b.npz") == features
    assert cached("c.pt") == cache_dir() / "c.pt"
    put(cache_dir() / "weights" / "a.pth")
    assert cached("weights", "a.pth") == cache_dir() / "weights" / "a.pth"
    monkeypatch.setenv("FLOWBENCH_CACHE", str(nowhere / "other"))
    assert cached("features", "b.npz") == nowhere / "other" / "features" / "b.npz"


def test_paths_of_people(nowhere: Path) -> None:
    assert expand("~/photos") == nowhere / "home" / "photos"
    assert expand("photos") == Path("photos")
    assert "write the whole path" in message(lambda: expand("~no-such-user/photos"))
    assert expand("a" * 255 + "/b") == Path("a" * 255, "b")
    assert "has 256 bytes of at most 255" in message(lambda: expand("\u00e4" * 128))
    assert "the whole 4999 of at most 4095" in message(lambda: expand("/".join(["a" * 99] * 50)))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR])
def test_a_cache_that_cannot_be_written_says_so_with_the_remedy(tmp_path: Path, number: int) -> None:
    def make() -> None:
        with locked(tmp_path / "cache" / "a.pt"):
            raise OSError(number, os.strerror(number))

    text = message(make)
    assert text == (
        f"{tmp_path / 'cache'}: cannot be written ({os.strerror(number)}); make room or set FLOWBENCH_CACHE to a "
        "folder you can write"
    )


def test_faults_that_are_not_the_folders_pass(tmp_path: Path) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "gone", "x"), PermissionError(errno.EACCES, "no", "/user/photo.png")):
        with pytest.raises(OSError) as caught, writable(tmp_path, "FLOWBENCH_CACHE"):  # noqa: PT011
            raise error
        assert caught.value is error


def _count(folder: str) -> None:
    path = Path(folder) / "cache" / "number"
    for _ in range(50):
        with locked(path):
            path.write_text(str(int(path.read_text() or 0) + 1 if path.exists() else 1))


def test_two_processes_take_turns(tmp_path: Path) -> None:
    context = get_context("fork")
    both = [context.Process(target=_count, args=(str(tmp_path),)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert (tmp_path / "cache" / "number").read_text() == "100"
