"""`flowbench data list` and `flowbench data get`, behind the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flowbench.data import catalogue, list_datasets
from flowbench.data.inventory import get, inventory
from flowbench.data.real_images import CIFAR10


def test_every_dataset_has_a_row_and_nothing_is_fetched(tmp_path: Path) -> None:
    rows = {row.name: row for row in inventory(tmp_path)}
    assert list(rows) == [entry.name for entry in list_datasets()]
    assert not any(tmp_path.iterdir())
    assert all(row.licence and set(row.num_samples) == {"train", "val", "test"} for row in rows.values())
    assert {name for name, row in rows.items() if not row.present} == {"mnist", "fashion_mnist", "cifar10"}
    assert {name for name, row in rows.items() if row.download_mb} == {"mnist", "fashion_mnist", "cifar10"}
    cifar = rows["cifar10"]
    assert (cifar.shape, cifar.num_classes, cifar.download_mb) == ((3, 32, 32), 10, 138.9)
    assert cifar.num_samples == {"train": 45_000, "val": 5_000, "test": 10_000}


def test_get_reports_what_happens_and_the_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = replace(CIFAR10, fetch=lambda root, report: report(f"fetching into {root}"))
    monkeypatch.setitem(catalogue._entries, "cifar10", entry)
    lines: list[str] = []
    get("cifar10", tmp_path, lines.append)
    assert lines[0] == f"fetching into {tmp_path}"
    assert lines[1].startswith(
        "cifar10: licence: no formal licence; cite Krizhevsky (2009); cite: A. Krizhevsky (2009)"
    )


def test_nothing_to_get(tmp_path: Path) -> None:
    lines: list[str] = []
    get("digits", tmp_path, lines.append)
    assert lines == ["digits: needs no download"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CIFAR-10", "dataset: unknown name 'CIFAR-10'; did you mean 'cifar10'?"),
        ("fashion-mnist", "did you mean 'fashion_mnist'?"),
        ("minst", "did you mean 'mnist'?"),
        ("imagenet21k", "dataset: unknown name 'imagenet21k'; known: "),
        ("npz", "npz: is your own data"),
    ],
)
def test_names_that_cannot_be_got(tmp_path: Path, name: str, expected: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        get(name, tmp_path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
