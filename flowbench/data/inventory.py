"""The list of datasets with those that are present, and fetching one by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flowbench.core.places import data_root
from flowbench.data import catalogue
from flowbench.data.dataset_entry import DatasetEntry, Report
from flowbench.data.user_formats import USER_FORMATS

__all__ = ["InventoryRow", "get", "inventory"]


@dataclass(frozen=True)
class InventoryRow:
    """One dataset of the catalogue.

    Attributes:
        name: in the catalogue.
        shape: of one sample.
        num_classes: None for unlabelled data.
        num_samples: N per split.
        download_mb: megabytes (10^6 bytes) to download; 0 when the data ship or are generated.
        licence: terms of use.
        present: whether no download is needed.
        folder: that holds the downloaded set; None where there is none.
    """

    name: str
    shape: tuple[int, ...]
    num_classes: int | None
    num_samples: dict[str, int]
    download_mb: float
    licence: str
    present: bool
    folder: Path | None


def inventory(root: Path | None = None) -> list[InventoryRow]:
    """Every dataset of the catalogue, by name.

    Args:
        root: folder of downloads; None looks where each set lies, see :func:`flowbench.core.places.data_root`.

    Returns:
        One row each; nothing is loaded or fetched.
    """
    return [_row(entry, root or data_root(entry.name)) for entry in catalogue.list_datasets()]


def _row(entry: DatasetEntry, root: Path) -> InventoryRow:
    present = entry.is_present(root)
    return InventoryRow(
        entry.name,
        entry.spec.shape,
        entry.spec.num_classes,
        dict(entry.num_samples),
        entry.download_mb,
        entry.licence,
        present,
        root / entry.name if present and entry.download_mb else None,
    )


def get(name: str, root: Path, report: Report = print) -> None:
    """Fetch a dataset, or verify the copy that is here and make it again when it is damaged.

    Args:
        name: in the catalogue.
        root: folder of downloads.
        report: receives a line per step.

    Raises:
        ValueError: one line: unknown name, no source gave it, FLOWBENCH_OFFLINE is set, or the folder cannot be
            written.
    """
    if name in USER_FORMATS:
        raise ValueError(f"{name}: is your own data, which nobody else keeps; nothing to get")
    entry = catalogue.get(name)
    if entry.fetch is None:
        report(f"{name}: needs no download")
        return
    entry.fetch(root, report)
    report(f"{name}: licence: {entry.licence}; cite: {entry.citation}")
