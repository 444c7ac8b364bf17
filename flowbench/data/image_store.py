"""The cache of an image dataset: one memory-mapped uint8 array per canonical part, with what it must be."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.lib import format as npy_format

from flowbench.core.lazy import lazy_module
from flowbench.core.places import writable
from flowbench.core.storage import write_atomic, write_text
from flowbench.data.dataset_entry import Report
from flowbench.data.split import Split

if TYPE_CHECKING:
    import torch
else:
    torch = lazy_module("torch")

__all__ = ["Arrays", "ImageStore", "Part", "array_sha256"]

Arrays = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Per part: images uint8 (N, C, H, W) and labels uint8 (N,), in the canonical order."""

_FORMAT = 1
_METADATA = "metadata.json"


def array_sha256(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes in C order, lower-case hex."""
    return hashlib.sha256(np.ascontiguousarray(array).data.cast("B")).hexdigest()


@dataclass(frozen=True)
class Part:
    """One canonical part of a dataset.

    Attributes:
        num: number of samples N.
        images_sha256: of the images as uint8 bytes, (N, C, H, W) in C order.
        labels_sha256: of the labels as uint8 bytes.
    """

    num: int
    images_sha256: str
    labels_sha256: str


@dataclass(frozen=True)
class ImageStore:
    """A dataset's arrays under ``<root>/<name>/``, written whole or not at all.

    A folder holds ``{train,test}-images.npy``, ``{train,test}-labels.npy`` and ``metadata.json``. Opening it compares
    sizes and metadata, which is cheap; :meth:`damage` with ``hashes`` reads every byte.

    Attributes:
        name: the dataset.
        version: of its values.
        shape: of one image, (C, H, W).
        parts: the canonical parts by name.
        licence: terms of use, for the metadata.
    """

    name: str
    version: str
    shape: tuple[int, int, int]
    parts: Mapping[str, Part]
    licence: str

    def folder(self, root: Path) -> Path:
        """Where the arrays lie."""
        return root / self.name

    def is_present(self, root: Path) -> bool:
        """Whether :meth:`open` would succeed."""
        return self.damage(root) is None

    def open(self, root: Path) -> dict[str, Split]:
        """The canonical parts: views of memory maps, read from disk as they are indexed.

        The maps are copy-on-write: a tensor written to by mistake never reaches the file.

        Raises:
            ValueError: the store is absent or damaged.
        """
        fault = self.damage(root)
        if fault is not None:
            raise ValueError(f"{self.folder(root)}: {fault}; run `flowbench data get {self.name}` to make it again")
        return {part: self._split(root, part) for part in self.parts}

    def _split(self, root: Path, part: str) -> Split:
        images = np.load(self._file(root, part, "images"), mmap_mode="c")
        labels = np.load(self._file(root, part, "labels"))
        return Split(torch.from_numpy(images), torch.from_numpy(labels).long())

    def damage(self, root: Path, hashes: bool = False) -> str | None:
        """The fault of the store.

        Args:
            root: folder of all datasets.
            hashes: also compare the SHA-256 of every array, which reads everything.

        Returns:
            A few words, or None when all is well.
        """
        folder = self.folder(root)
        if not folder.exists():
            return "is not there"
        try:
            found = json.loads((folder / _METADATA).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"the store is damaged ({_METADATA} cannot be read: {_reason(error)})"
        if not isinstance(found, dict) or {key: found.get(key) for key in self._expected()} != self._expected():
            return f"the store is damaged ({_METADATA} describes other data than {self.name} version {self.version})"
        return next((fault for part in self.parts if (fault := self._part_damage(root, part, hashes))), None)

    def _part_damage(self, root: Path, part: str, hashes: bool) -> str | None:
        for kind, shape, digest in self._layout(part):
            file = self._file(root, part, kind)
            try:
                array = np.load(file, mmap_mode="r", allow_pickle=False)
                size = file.stat().st_size
            except (OSError, ValueError, EOFError) as error:
                return f"the store is damaged ({file.name} cannot be read: {_reason(error)})"
            if array.shape != shape or array.dtype != np.uint8 or size != len(_header(array)) + array.nbytes:
                return f"the store is damaged ({file.name} has {size} bytes of {array.dtype} {array.shape})"
            if hashes and (found := array_sha256(array)) != digest:
                return f"the store is damaged ({file.name} has sha256 {found[:16]}, expected {digest[:16]})"
        return None

    def check(self, arrays: Arrays) -> None:
        """Compare decoded arrays with the canonical ones.

        Raises:
            ValueError: a part is missing, or a shape or a SHA-256 differs.
        """
        for part in self.parts:
            if part not in arrays:
                raise ValueError(f"holds no {part} part")
            for array, (kind, shape, digest) in zip(arrays[part], self._layout(part), strict=True):
                if array.shape != shape or array.dtype != np.uint8:
                    raise ValueError(f"{part} {kind} are {array.dtype} {array.shape}, expected uint8 {shape}")
                found = array_sha256(array)
                if found != digest:
                    raise ValueError(
                        f"the decoded {part} {kind} have sha256 {found[:16]}..., expected {digest[:16]}..."
                    )

    def refuse_others_files(self, root: Path) -> None:
        """Somebody's own folder may have the data set's name; :meth:`write` would replace it.

        Raises:
            ValueError: names what lies there.
        """
        folder = self.folder(root)
        own = {_METADATA, *(self._file(root, part, kind).name for part in self.parts for kind in ("images", "labels"))}
        others = sorted(path.name for path in folder.iterdir() if path.name not in own) if folder.is_dir() else []
        if others:
            raise ValueError(
                f"{folder}: holds files that are not of the data set ({', '.join(others[:3])}); move them, or set "
                "FLOWBENCH_DATA to another folder"
            )

    def write(self, root: Path, arrays: Arrays, source: str) -> None:
        """Write checked arrays, in place of what lies there; call it under :meth:`locked`.

        Args:
            root: folder of all datasets.
            arrays: see :meth:`check`.
            source: where they came from, for the metadata.

        Raises:
            ValueError: see :meth:`check`; or the disk is full or read-only, and then nothing is left behind.
        """
        self.check(arrays)
        folder = self.folder(root)
        with self.scratch(root) as scratch:
            fresh = scratch / self.name
            for part, pair in arrays.items():
                for kind, array in zip(("images", "labels"), pair, strict=True):
                    _write_npy(self._file(scratch, part, kind), array)
            metadata = {**self._expected(), "licence": self.licence, "source": source}
            write_text(fresh / _METADATA, json.dumps(metadata, indent=2) + "\n")
            if folder.exists():
                folder.rename(scratch / "replaced")
            fresh.rename(folder)

    @contextmanager
    def scratch(self, root: Path) -> Iterator[Path]:
        """A folder in the same file system that is gone afterwards; a full or read-only disk becomes one line."""
        with writable(root, "FLOWBENCH_DATA"):
            root.mkdir(parents=True, exist_ok=True)
            path = Path(tempfile.mkdtemp(dir=root, prefix=f".{self.name}-"))
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def locked(self, root: Path, report: Report) -> Iterator[None]:
        """One process at a time; the others print a line and wait."""
        with writable(root, "FLOWBENCH_DATA"):
            root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(root / f".{self.name}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                report(f"{self.name}: another process is fetching it; waiting")
                lock.acquire()
        try:
            for abandoned in root.glob(f".{self.name}-*"):  # by a process that was killed
                shutil.rmtree(abandoned, ignore_errors=True)
            yield
        finally:
            lock.release()

    def _file(self, root: Path, part: str, kind: str) -> Path:
        return self.folder(root) / f"{part}-{kind}.npy"

    def _layout(self, part: str) -> list[tuple[str, tuple[int, ...], str]]:
        """Kind, shape and SHA-256 of a part's arrays."""
        expected = self.parts[part]
        return [
            ("images", (expected.num, *self.shape), expected.images_sha256),
            ("labels", (expected.num,), expected.labels_sha256),
        ]

    def _expected(self) -> dict[str, Any]:
        """The metadata by which a store of this dataset is recognised."""
        arrays = {
            f"{part}-{kind}": {"shape": list(shape), "dtype": "uint8", "sha256": digest}
            for part in self.parts
            for kind, shape, digest in self._layout(part)
        }
        return {"format": _FORMAT, "name": self.name, "version": self.version, "arrays": arrays}


def _header(array: np.ndarray) -> bytes:
    """The header of an ``.npy`` file, format 1.0."""
    buffer = BytesIO()
    npy_format.write_array_header_1_0(buffer, npy_format.header_data_from_array_1_0(array))
    return buffer.getvalue()


def _write_npy(path: Path, array: np.ndarray) -> None:
    """Like ``np.save``, whose own writing hides the number of the error when the disk is full."""
    contiguous = np.ascontiguousarray(array)

    def write(file: IO[bytes]) -> None:
        file.write(_header(contiguous))
        file.write(contiguous.data.cast("B"))

    write_atomic(path, write)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
