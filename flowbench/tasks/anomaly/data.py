"""One-class digits: trained on one digit, tested on all of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flowbench.core.lazy import lazy_module
from flowbench.data.columns import Column
from flowbench.data.dataset_entry import DatasetEntry
from flowbench.data.digits import DIGITS
from flowbench.data.spec import DataSpec
from flowbench.data.split import Split

if TYPE_CHECKING:
    import torch
else:
    torch = lazy_module("torch")

__all__ = ["ANOMALY", "ONE_CLASS_DIGITS", "one_class_digits"]

ANOMALY = "anomaly"
"""The column that holds 1 for an anomaly and 0 for a normal sample, uint8."""

# Images of each digit in the splits train and val, which are stratified by class.
_TRAIN = (107, 109, 106, 110, 108, 109, 109, 107, 104, 108)
_VAL = (35, 37, 36, 36, 37, 36, 36, 36, 35, 36)


def one_class_digits(normal: int, root: Path) -> dict[str, Split]:
    """The digits with one class taken for normal.

    Args:
        normal: the class, 0 to 9.
        root: see :func:`flowbench.data.digits.load_digits`.

    Returns:
        The normal images of the splits train and val, and all 360 images of the split test, without labels; the column
        ``anomaly`` is 0 for images of the normal class and 1 for the others.
    """
    found = {}
    for name, split in DIGITS.load(root).items():
        assert split.label is not None, "the digits are labelled"
        rows = torch.arange(len(split)) if name == "test" else (split.label == normal).nonzero()[:, 0]
        column = (split.label[rows] != normal).to(torch.uint8)
        found[name] = Split(split.values[rows], columns={ANOMALY: column})
    return found


def _entry(normal: int) -> DatasetEntry:
    return DatasetEntry(
        spec=DataSpec(name=f"one_class_digits_{normal}", version="1", shape=DIGITS.spec.shape, levels=17),
        description=f"the digit {normal} alone for training, all digits for testing (scikit-learn)",
        licence=DIGITS.licence,
        citation=DIGITS.citation,
        load=partial(one_class_digits, normal),
        num_samples={"train": _TRAIN[normal], "val": _VAL[normal], "test": DIGITS.num_samples["test"]},
        columns={ANOMALY: Column()},
    )


ONE_CLASS_DIGITS = tuple(_entry(normal) for normal in range(10))
"""One data set for each digit, as entry points name them."""
