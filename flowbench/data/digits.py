"""Handwritten digits: 1,797 real 8x8 images that come with scikit-learn, so nothing is downloaded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flowbench.core.lazy import lazy_module
from flowbench.data.dataset_entry import DatasetEntry
from flowbench.data.spec import DataSpec
from flowbench.data.split import Split, make_splits

if TYPE_CHECKING:
    import torch
else:
    torch = lazy_module("torch")

__all__ = ["DIGITS", "load_digits"]

SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
NUM_VAL, NUM_TEST = 360, 360
_SPLIT_KEY = "flowbench/digits/1"


def load_digits(root: Path) -> dict[str, Split]:
    """The digits, cut into 1,077 training, 360 validation and 360 test images.

    The split is stratified by class and fixed: :func:`flowbench.data.split.stratified_order` with the key
    ``flowbench/digits/1``.

    Args:
        root: folder for downloads; the data come with scikit-learn, so nothing is written there.

    Returns:
        Splits of grey levels 0..16, uint8, shape (N, 1, 8, 8), with labels 0..9.

    Raises:
        ValueError: when scikit-learn ships other values than the ones this version of the dataset is defined
            by.
    """
    # Imported here: scikit-learn takes a second to import, and most runs on other data never need it.
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    images, labels = bunch.images.astype(np.uint8), bunch.target.astype(np.uint8)
    found = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"digits: sha256 of scikit-learn's copy is {found}, expected {SHA256}; reinstall scikit-learn")
    whole = Split(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long())
    return make_splits(whole, _SPLIT_KEY, NUM_VAL, NUM_TEST)


DIGITS = DatasetEntry(
    spec=DataSpec(name="digits", version="1", shape=(1, 8, 8), num_classes=10, levels=17),
    description="handwritten digits, 1,797 real 8x8 images of 17 grey levels, 10 classes (scikit-learn)",
    licence="CC BY 4.0 (UCI Machine Learning Repository)",
    citation="E. Alpaydin, C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI repository",
    load=load_digits,
    num_samples={"train": 1_797 - NUM_VAL - NUM_TEST, "val": NUM_VAL, "test": NUM_TEST},
)
