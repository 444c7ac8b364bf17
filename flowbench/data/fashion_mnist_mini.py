"""A slice of Fashion-MNIST that ships: 2,000 training and 500 test images, so the 28x28 path works offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flowbench.core.lazy import lazy_module
from flowbench.core.resources import resource
from flowbench.core.storage import write_atomic
from flowbench.data.dataset_entry import DatasetEntry, Report
from flowbench.data.image_store import array_sha256
from flowbench.data.real_images import FASHION_MNIST, canonical_splits
from flowbench.data.spec import DataSpec
from flowbench.data.split import Split, stratified_order

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

__all__ = ["FASHION_MNIST_MINI", "FILE", "KEY", "draw", "load_mini"]

FILE = "fashion_mnist_mini.npz"
KEY = "flowbench/fashion_mnist_mini/1"
SIZES = {"train": 2_000, "test": 500}
NUM_VAL = 250
# Of the images and the labels, in the order of the file.
SHA256 = {
    "train": "139475a62362c6af7794eb7557b0b9f03ec62f5b36fe3c93522e6c935794fcb0",
    "train_label": "02b48f1d080bc9b96494e0fcb05c062a94c93ea7b4f85f3ae40e9fa73efac9d2",
    "test": "e0a972ef5ff8619d7f708311c20cd34766041f81ae90dab81d0e032023da08a2",
    "test_label": "dc70ea9aa4f230c98825a5ef4a4c7dd55818eecd14be0a54fd774a7e493124e0",
}


def draw(whole: dict[str, Split]) -> dict[str, np.ndarray]:
    """Draw the slice from the full set.

    The first 2,000 of :func:`flowbench.data.split.stratified_order` of the 60,000 canonical training images under the
    key ``flowbench/fashion_mnist_mini/1/train``, and the first 500 of the 10,000 test images under ``.../test``; so
    each class has 200 and 50, and so has every prefix its share.

    Args:
        whole: the splits of ``fashion_mnist``.

    Returns:
        ``train``, ``test`` uint8 (N, 1, 28, 28), ``train_label``, ``test_label`` uint8 (N,), and ``train_index``,
        ``test_index`` int32 (N,): positions in the canonical parts.
    """
    arrays = {}
    for part, canonical in (("train", whole["train"].join(whole["val"])), ("test", whole["test"])):
        index = stratified_order(len(canonical), f"{KEY}/{part}", canonical.label)[: SIZES[part]]
        chosen = canonical.take(index)
        assert chosen.label is not None, "Fashion-MNIST is labelled"
        arrays[part] = chosen.values.numpy()
        arrays[f"{part}_label"] = chosen.label.numpy().astype(np.uint8)
        arrays[f"{part}_index"] = index.numpy().astype(np.int32)
    return arrays


def load_mini(root: Path) -> dict[str, Split]:
    """The slice, cut into 1,750 training, 250 validation and 500 test images, each with classes in equal shares.

    Args:
        root: folder of datasets; the file is looked for there, then where it ships.

    Returns:
        Splits of grey levels 0..255, uint8, shape (N, 1, 28, 28), with labels 0..9.

    Raises:
        ValueError: the file is in neither place, or holds other values.
    """
    path = _find(root)
    if path is None:
        raise ValueError(
            f"{root / FILE}: is not there; copy it from data/ of the repository, or run `flowbench data get "
            "fashion_mnist_mini`, which draws it from the full set"
        )
    arrays = _read(path)
    parts = {part: Split(_tensor(arrays[part]), _tensor(arrays[f"{part}_label"]).long()) for part in SIZES}
    return canonical_splits(parts, NUM_VAL)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in SHA256}
    except Exception as error:  # Broken files make NumPy and zipfile raise nearly anything.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: cannot be read ({reason}); restore it from data/ of the repository") from error
    for key, array in arrays.items():
        found = array_sha256(array)
        if found != SHA256[key]:
            raise ValueError(
                f"{path}: {key!r} has sha256 {found[:16]}..., expected {SHA256[key][:16]}...; restore the file from "
                "data/ of the repository"
            )
    return arrays


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)


def _find(root: Path) -> Path | None:
    return next((path for path in (root / FILE, resource(f"data/{FILE}")) if path.is_file()), None)


def _fetch(root: Path, report: Report) -> None:
    """Verify the file, or draw it anew from the full set."""
    path = _find(root)
    if path is None:
        arrays = draw(FASHION_MNIST.load(root))
        path = root / FILE
        write_atomic(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))
    _read(path)
    report(f"fashion_mnist_mini: verified in {path}")


FASHION_MNIST_MINI = DatasetEntry(
    spec=DataSpec(name="fashion_mnist_mini", version="1", shape=(1, 28, 28), num_classes=10, levels=256),
    description="a slice of Fashion-MNIST that ships, 2,500 articles of clothing, 28x28 grey, 10 classes",
    licence=FASHION_MNIST.licence,
    citation=FASHION_MNIST.citation,
    load=load_mini,
    num_samples={"train": SIZES["train"] - NUM_VAL, "val": NUM_VAL, "test": SIZES["test"]},
    is_present=lambda root: _find(root) is not None,
    fetch=_fetch,
)
