"""Feature statistics in files: our own, with sums and metadata, and the moments that other tools store."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.core.places import expand
from flowbench.core.storage import write_atomic
from flowbench.metrics.frechet import FeatureStatistics, GaussianStatistics

__all__ = ["load_moments", "load_statistics", "save_statistics"]

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, pickle.UnpicklingError)
# What pickled arrays of floats are made of. Older NumPy called the module numpy.core.
_ARRAY = np.zeros(0).__reduce__()[0]
_NUMPY_ONLY: list[Any] = [
    (_ARRAY, "numpy._core.multiarray._reconstruct"),
    (_ARRAY, "numpy.core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    type(np.dtype("float32")),
    type(np.dtype("float64")),
]


def save_statistics(path: str | Path, statistics: FeatureStatistics, metadata: Mapping[str, Any]) -> None:
    """Write statistics and their description to an ``.npz`` file, atomically.

    Args:
        path: the file.
        statistics: the sums to store.
        metadata: JSON values that describe the statistics: data set, split, transform, extractor and its
            checksum, resize, N.

    Raises:
        ValueError: ``metadata`` does not survive JSON.
        OSError: the folder cannot be written or the disk is full.
    """
    try:
        text = json.dumps(dict(metadata), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must hold JSON values, got {dict(metadata)!r}: {error}") from None

    def write(file: IO[bytes]) -> None:
        np.savez(
            file,
            count=np.int64(statistics.count),
            sum=statistics.sum.cpu().numpy(),
            outer=statistics.outer.cpu().numpy(),
            metadata=np.str_(text),
        )

    write_atomic(path, write)


def load_statistics(
    path: str | Path, expected: Mapping[str, Any] | None = None
) -> tuple[FeatureStatistics, dict[str, Any]]:
    """Read what :func:`save_statistics` wrote; no pickle is ever loaded.

    Args:
        path: the file.
        expected: metadata that must agree; keys of the file that are absent here are not compared.

    Returns:
        The statistics (on the CPU) and their metadata.

    Raises:
        ValueError: the file is missing or damaged, or its metadata is not the expected; one line.
    """
    path = expand(path)
    _must_exist(path, "make them with save_statistics")
    try:
        with np.load(path, allow_pickle=False) as file:
            metadata = json.loads(str(file["metadata"]))
            total, outer = torch.from_numpy(file["sum"]), torch.from_numpy(file["outer"])
            statistics = FeatureStatistics.from_sums(int(file["count"]), total, outer)
        if not (torch.isfinite(total).all() and torch.isfinite(outer).all()):
            raise ValueError("the sums hold NaN or infinity")
    except (*_UNREADABLE, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read feature statistics {path} ({_line(error)}); delete and remake it") from None
    for key, value in (expected or {}).items():
        if metadata.get(key) != value:
            raise ValueError(f"statistics {path} have {key}={metadata.get(key)!r}, expected {value!r}; remake them")
    return statistics, metadata


def load_moments(
    path: str | Path, dimension: int | None = None, expected: Mapping[str, Any] | None = None
) -> GaussianStatistics:
    """Read mean and covariance of features from our files and from those of other tools.

    - ``.npz`` with ``mu`` and ``sigma``: clean-fid, pytorch-fid, EDM, guided-diffusion.
    - ``.pt`` of torch-fidelity's cache: a dictionary of ``mu`` and ``sigma``, or features (N, D).
    - our own ``.npz``.

    Args:
        path: the file; its content decides, not its name.
        dimension: the D >= 1 that is expected, if any.
        expected: metadata that must agree, in files of our own; others' hold none to compare with.

    Returns:
        The moments; ``count`` is None where the file does not hold the number of samples.

    Raises:
        ValueError: a file that is missing, damaged, of another kind or dimension, or whose numbers cannot be
            moments, or metadata that are not the expected; one line.
    """
    check_count("dimension", dimension, or_none=True)
    path = expand(path)
    _must_exist(path, "give the path of an .npz with mu and sigma, or of a torch-fidelity .pt")
    try:
        with open(path, "rb") as file:
            ours = zipfile.is_zipfile(file) and "metadata.npy" in zipfile.ZipFile(file).namelist()
            found = None if ours else _from_npz(file) or _from_torch(file)
    except (*_UNREADABLE, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read statistics {path}: {_line(error)}") from None
    if found is None:
        found = _as_moments(load_statistics(path, expected)[0])
    if dimension is not None and found.dimension != dimension:
        raise ValueError(
            f"statistics {path} have {found.dimension} dimensions, expected {dimension}; use one feature network"
        )
    return found


def _from_npz(file: IO[bytes]) -> GaussianStatistics | None:
    """Moments of an .npz; None where the file is another zip archive, as torch's are."""
    if not zipfile.is_zipfile(file):
        return None
    file.seek(0)
    arrays = np.load(file, allow_pickle=False)
    names = set(arrays.files)
    if {"mu", "sigma"} <= names:
        return GaussianStatistics(_floats(arrays["mu"], "mu"), _floats(arrays["sigma"], "sigma"))
    if any(name.endswith("data.pkl") for name in names):
        return None
    raise ValueError(f"it holds {sorted(names)[:6]}, expected mu and sigma")


def _from_torch(file: IO[bytes]) -> GaussianStatistics:
    file.seek(0)
    with torch.serialization.safe_globals(_NUMPY_ONLY):
        content = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(content, Tensor) and content.ndim == 2:
        return _as_moments(FeatureStatistics.from_features(content))
    if isinstance(content, dict) and {"mu", "sigma"} <= content.keys():
        return GaussianStatistics(_floats(content["mu"], "mu"), _floats(content["sigma"], "sigma"))
    raise ValueError(f"it holds a {type(content).__name__}, expected mu and sigma, or features (N, D)")


def _as_moments(statistics: FeatureStatistics) -> GaussianStatistics:
    return GaussianStatistics(statistics.mean, statistics.covariance, statistics.count)


def _floats(values: Any, name: str) -> Tensor:
    array = np.asarray(values)
    if array.dtype.kind != "f":
        raise ValueError(f"{name} has type {array.dtype}, expected floating point")
    return torch.from_numpy(array.astype(np.float64))


def _must_exist(path: str | Path, remedy: str) -> None:
    if not Path(path).is_file():
        raise ValueError(f"no feature statistics at {path}; {remedy}")


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
