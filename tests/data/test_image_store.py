"""The cache of an image data set: whole or absent, cheap to open, and honest about damage."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from flowbench.data.image_store import Arrays, ImageStore, Part, array_sha256
from flowbench.data.real_images import canonical_splits
from flowbench.data.sources import Source, obtain


def random_arrays(seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    sizes = {"train": 12, "test": 5}
    return {
        p: (rng.integers(0, 256, (n, 2, 3, 4), np.uint8), rng.integers(0, 9, n, np.uint8)) for p, n in sizes.items()
    }


def store_of(arrays: Arrays, version: str = "1") -> ImageStore:
    parts = {p: Part(len(x), array_sha256(x), array_sha256(y)) for p, (x, y) in arrays.items()}
    return ImageStore("toy", version, (2, 3, 4), parts, "none needed")


ARRAYS = random_arrays()
STORE = store_of(ARRAYS)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    STORE.write(tmp_path, ARRAYS, "a test")
    return tmp_path


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))


def message(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_round_trip(root: Path) -> None:
    assert visible(root) == ["toy"]
    assert visible(root / "toy") == [
        "metadata.json",
        "test-images.npy",
        "test-labels.npy",
        "train-images.npy",
        "train-labels.npy",
    ]
    assert STORE.is_present(root)
    for part, split in STORE.open(root).items():
        assert np.array_equal(split.values.numpy(), ARRAYS[part][0])
        assert split.label.dtype == torch.int64
        assert split.label.tolist() == ARRAYS[part][1].tolist()
        assert np.array_equal(np.load(root / "toy" / f"{part}-images.npy"), ARRAYS[part][0]), "plain .npy files"


def test_metadata_say_what_it_is_and_not_when(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = (root / "toy" / "metadata.json").read_text()
    found = json.loads(text)
    assert (found["name"], found["version"], found["licence"], found["source"]) == ("toy", "1", "none needed", "a test")
    assert found["arrays"]["test-images"] == {
        "shape": [5, 2, 3, 4],
        "dtype": "uint8",
        "sha256": array_sha256(ARRAYS["test"][0]),
    }
    other = tmp_path_factory.mktemp("other")
    STORE.write(other, ARRAYS, "a test")
    assert (other / "toy" / "metadata.json").read_text() == text


def test_splits_are_views_of_a_map_that_never_reaches_the_file(root: Path) -> None:
    splits = canonical_splits(STORE.open(root), num_val=4)
    assert {name: len(split) for name, split in splits.items()} == {"train": 8, "val": 4, "test": 5}
    whole = splits["train"].join(splits["val"])
    assert whole.values.data_ptr() == splits["train"].values.data_ptr(), "joined without a copy"
    assert np.array_equal(whole.values.numpy(), ARRAYS["train"][0])
    assert np.array_equal(splits["val"].values.numpy(), ARRAYS["train"][0][-4:])
    assert whole.label.tolist() == ARRAYS["train"][1].tolist()
    splits["train"].values.zero_()
    assert np.array_equal(STORE.open(root)["train"].values.numpy(), ARRAYS["train"][0])


@pytest.mark.parametrize("file", ["train-images.npy", "test-labels.npy", "metadata.json"])
@pytest.mark.parametrize("harm", ["cut", "lengthen", "empty", "remove"])
def test_a_damaged_store_is_one_line_and_get_makes_it_again(root: Path, file: str, harm: str) -> None:
    path = root / "toy" / file
    content = path.read_bytes()
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:-2], "lengthen": content + b"{", "empty": b""}[harm])
    text = message(lambda: STORE.open(root))
    assert text.startswith(f"{root / 'toy'}: the store is damaged ({file} ")
    assert text.endswith("; run `flowbench data get toy` to make it again")
    assert not STORE.is_present(root)
    obtain(STORE, [source("packages")], root, print)
    assert STORE.is_present(root)
    assert visible(root) == ["fetched", "toy"]


def test_a_changed_byte_is_found_by_get_and_not_by_opening(root: Path) -> None:
    path = root / "toy" / "train-images.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert STORE.damage(root) is None
    assert "train-images.npy has sha256" in STORE.damage(root, hashes=True)
    obtain(STORE, [source("packages")], root, print)
    assert STORE.damage(root, hashes=True) is None


def test_another_version_or_other_data_are_not_taken(root: Path) -> None:
    assert "describes other data than toy version 2" in message(lambda: store_of(ARRAYS, "2").open(root))
    assert "describes other data" in message(lambda: store_of(random_arrays(1)).open(root))


def test_an_absent_store(tmp_path: Path) -> None:
    assert message(lambda: STORE.open(tmp_path)).startswith(
        f"{tmp_path / 'toy'}: is not there; run `flowbench data get"
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x, y: (x[:-1], y), r"train images are uint8 (11, 2, 3, 4), expected uint8 (12, 2, 3, 4)"),
        (lambda x, y: (x.astype(np.int16), y), "train images are int16"),
        (lambda x, y: (x[::-1], y), "the decoded train images have sha256"),
        (lambda x, y: (x, y[::-1]), "the decoded train labels have sha256"),
        (lambda x, y: (x, np.zeros_like(y)), "the decoded train labels have sha256"),
    ],
)
def test_other_arrays_are_refused_and_nothing_is_written(tmp_path: Path, change: Callable, expected: str) -> None:
    wrong = {**ARRAYS, "train": change(*ARRAYS["train"])}
    assert expected in message(lambda: STORE.write(tmp_path, wrong, "a test"))
    assert visible(tmp_path) == []


# --- several processes, full and read-only disks


def source(name: str, arrays: Arrays = ARRAYS, seconds: float = 0.0) -> Source:
    def fetch(root: Path, scratch: Path) -> Arrays:
        time.sleep(seconds)
        with (root / "fetched").open("a") as file:
            file.write("x")
        return arrays

    return Source(name, f"a test of {name}", fetch)


def test_concurrent_gets_fetch_once(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    lines = fork.SimpleQueue()
    slow = source("packages", seconds=0.3)
    processes = [fork.Process(target=obtain, args=(STORE, [slow], tmp_path, lines.put)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "fetched").read_text() == "x"
    assert STORE.damage(tmp_path, hashes=True) is None
    said = []
    while not lines.empty():
        said.append(lines.get())
    assert "toy: another process is fetching it; waiting" in said
    assert sum("verified" in line for line in said) == 3


def test_a_folder_of_somebodys_own_is_not_replaced(tmp_path: Path) -> None:
    """It may have the data set's name."""
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "holiday.png").write_bytes(b"mine")
    source = Source("packages", "a test", lambda root, scratch: ARRAYS)
    text = message(lambda: obtain(STORE, [source], tmp_path, lambda line: None))
    assert "toy: holds files that are not of the data set (holiday.png); move them, or set FLOWBENCH_DATA" in text
    assert visible(tmp_path / "toy") == ["holiday.png"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".toy-killed").mkdir()
    (tmp_path / ".toy-killed" / "half").write_text("half a file")
    obtain(STORE, [source("packages")], tmp_path, print)
    assert visible(tmp_path) == ["fetched", "toy"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("writes", [0, 1, 4])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int, number: int) -> None:
    real, left = os.fsync, [writes]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    text = message(lambda: STORE.write(tmp_path, ARRAYS, "a test"))
    assert f"cannot be written ({os.strerror(number)}); make room or set FLOWBENCH_DATA" in text
    assert [".npy", ".npy", ".jso"][[0, 1, 4].index(writes)] in text, "the file is named"
    assert visible(tmp_path) == []


def test_a_full_disk_leaves_the_old_store_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    other = random_arrays(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        message(lambda: store_of(other).write(root, other, "a test"))
    assert STORE.damage(root, hashes=True) is None
    assert visible(root) == ["toy"]


def test_a_disk_full_while_fetching_is_not_taken_for_a_fault_of_the_source(tmp_path: Path) -> None:
    def fetch(root: Path, scratch: Path) -> Arrays:
        raise OSError(errno.ENOSPC, "No space left on device", str(scratch / "archive"))

    tried: list[str] = []
    call = lambda: obtain(STORE, [Source("torchvision", "x", fetch), source("packages")], tmp_path, tried.append)  # noqa: E731
    text = message(call)
    assert "archive: cannot be written (No space left on device); make room" in text
    assert not any("packages" in line for line in tried)
    assert visible(tmp_path) == []


def test_a_read_only_folder(unprivileged: Path) -> None:
    text = message(lambda: obtain(STORE, [source("packages")], unprivileged, print))
    assert text.startswith(f"{unprivileged}/")
    assert "cannot be written (Permission denied); make room or set FLOWBENCH_DATA to a folder you can write" in text
    assert list(unprivileged.iterdir()) == []


def test_a_store_in_a_read_only_folder_is_read(tmp_path: Path, unprivileged: Path) -> None:
    if os.getuid() == 0:
        os.seteuid(0)
    unprivileged.chmod(0o755)
    STORE.write(unprivileged, ARRAYS, "a test")
    unprivileged.chmod(0o555)
    if os.getuid() == 0:
        os.seteuid(65534)
    lines: list[str] = []
    obtain(STORE, [], unprivileged, lines.append)
    assert lines == [f"toy: verified in {unprivileged / 'toy'}"]
    assert len(STORE.open(unprivileged)["train"]) == 12
