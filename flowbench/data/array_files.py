"""Named arrays in .npz, .npy and .pt files, read without pickle; one clear line for what holds no plain numbers."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowbench.core.folders import printable

__all__ = ["ArrayFile", "type_name"]

# Torch's types that NumPy has too: the others widen to float32 without loss, or are refused.
_WIDENED = (torch.bfloat16,)
_PLAIN = (Tensor, nn.Parameter)


@dataclass(frozen=True)
class ArrayFile:
    """An open file of named arrays; an array is read and checked at the first access.

    Attributes:
        path: the file.
        names: of its arrays, in the order of the file; a file of one unnamed array calls it ``""``.
    """

    path: Path
    names: tuple[str, ...]
    _read: Callable[[str], Any]

    @classmethod
    def open(cls, kind: str, path: Path, *, mapped: bool = False) -> ArrayFile:
        """Open a file; nothing in it is executed.

        Args:
            kind: ``npz``, ``npy`` or ``pt``. NumPy's two kinds stand for each other: the content decides.
            path: the file.
            mapped: leave a single NumPy array on disk, mapped into memory.

        Raises:
            ValueError: one line: a folder, or a file that cannot be read as such.
        """
        if not path.is_file():
            raise ValueError(f"{printable(path)}: expected a .{kind} file, got a folder")
        try:
            loaded = _load_torch(path) if kind == "pt" else _load_numpy(path, mapped)
        except Exception as error:  # Broken files make NumPy, zipfile and pickle raise nearly anything.
            raise ValueError(f"{printable(path)}: cannot be read as {kind} ({_reason(error)})") from error
        if isinstance(loaded, ArrayFile):
            return loaded
        if not isinstance(loaded, Mapping):
            return cls(path, ("",), lambda name: loaded)
        values = {str(key): value for key, value in loaded.items()}
        return cls(path, tuple(values), values.__getitem__)

    def array(self, name: str, remedy: str = "save float32 or uint8 arrays") -> np.ndarray:
        """An array by its name, in native byte order.

        Args:
            name: one of ``names``.
            remedy: what to do about values that are no numbers, for the message.

        Raises:
            ValueError: one line: it cannot be read, or holds something else than plain numbers.
        """
        where = f"{printable(self.path)}: {name!r}" if name else f"{printable(self.path)}:"
        try:
            value = self._read(name)
        except Exception as error:
            raise ValueError(f"{where} cannot be read ({_reason(error)})") from error
        return _from_tensor(value, where) if isinstance(value, Tensor) else _from_value(value, where, remedy)


def type_name(array: np.ndarray) -> str:
    """Name of an array's type for messages, as NumPy writes it."""
    return str(array.dtype)


def _load_numpy(path: Path, mapped: bool) -> Any:
    mode: Any = "r" if mapped and not zipfile.is_zipfile(path) else None
    loaded = np.load(path, allow_pickle=False, mmap_mode=mode)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        names = tuple(loaded.files)

    def read(name: str) -> np.ndarray:
        with np.load(path, allow_pickle=False) as archive:
            found: np.ndarray = archive[name]
            return found

    return ArrayFile(path, names, read)


def _load_torch(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on archives and sparse tensors, which are refused with our own
        return torch.load(path, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    """Why a file cannot be read, in a few words."""
    text = str(error)
    if "allow_pickle" in text or "Python objects" in text:
        return "it holds Python objects, which reading would execute; save plain arrays"
    if isinstance(error, pickle.UnpicklingError) or "TorchScript" in text:
        named = re.search(r"GLOBAL ([\w.]+\w)", text)
        what = f"an object of {named.group(1)}" if named else "more than tensors"
        return f"it holds {what}, which reading would execute; save tensors alone"
    first = re.split(r"[.:]?\s*(?:\n|$)|\.\s", text)[0]
    return f"{type(error).__name__}: {first}"


def _from_tensor(value: Tensor, where: str) -> np.ndarray:
    if value.is_nested:
        raise ValueError(f"{where} is a nested tensor, samples of several shapes; make them one shape and stack them")
    if value.layout != torch.strided:
        layout = str(value.layout).removeprefix("torch.")
        raise ValueError(f"{where} is a sparse tensor ({layout}); save x.to_dense()")
    if value.is_quantized:
        raise ValueError(f"{where} is a quantized tensor; save x.dequantize(), or x.int_repr() and declare data.levels")
    if value.is_meta:
        raise ValueError(f"{where} lies on the meta device and has no values; save a tensor with data")
    if type(value) not in _PLAIN:
        raise ValueError(f"{where} is a {type(value).__name__}; save x.as_subclass(torch.Tensor)")
    plain = value.detach().resolve_conj().resolve_neg()
    try:
        return (plain.float() if plain.dtype in _WIDENED else plain).contiguous().numpy()
    except (TypeError, RuntimeError) as error:
        found = str(value.dtype).removeprefix("torch.")
        raise ValueError(f"{where} is of type {found}; save float32, uint8 or another type that NumPy has") from error


def _from_value(value: Any, where: str, remedy: str) -> np.ndarray:
    """An array of whatever else one name holds: an array, a number, or a list of numbers."""
    if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
        raise ValueError(f"{where} is a {type(value).__name__} of {len(value)}; save one tensor, or a dict of them")
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{where} is a {type(value).__name__} of unequal lengths; save one array") from error
    if array.dtype.kind not in "biufc" or array.dtype.itemsize > 16 or array.dtype in (np.longdouble, np.clongdouble):
        raise ValueError(f"{where} is {_kind_of(array, value)}, no plain numbers; {remedy}")
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return np.ascontiguousarray(native).reshape(array.shape)


def _kind_of(array: np.ndarray, value: Any) -> str:
    kinds = {"U": "text", "S": "text", "V": "a structured array", "M": "dates", "m": "durations"}
    if array.dtype.kind in kinds:
        return kinds[array.dtype.kind]
    return f"a {type(value).__name__}" if array.dtype.kind == "O" else f"of type {array.dtype}"
