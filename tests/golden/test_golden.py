"""Numbers that a refactoring must not change, within what another make of processor may be off.

``python -m tests.golden compare`` asks for every bit on the machine that stored them. Every kind of device has its own;
those of a GPU, losses alone, are tested where there is one and somebody has stored them.
"""

from __future__ import annotations

import json
import os

import pytest
import torch

from tests.golden import stored


def why_not(device: str) -> str | None:
    """Why the numbers of a kind of device cannot be tested here; None where they can."""
    if device == "cuda" and not torch.cuda.is_available():
        return "needs a CUDA device"
    if not stored.file_of(device).is_file():
        return f"no numbers of {device} are stored: python -m tests.golden store --device {device}"
    return None


@pytest.fixture(scope="module", params=stored.DEVICES)
def device(request) -> str:
    if (reason := why_not(request.param)) is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module")
def found(tmp_path_factory, device) -> stored.Numbers:
    return stored.compute(tmp_path_factory.mktemp("golden"), os.environ, device)


def test_losses_and_rows_are_those_that_are_stored(found, device):
    assert not (lines := stored.deviations(found, exactly=False, device=device)), "\n".join(lines)


def test_a_device_without_stored_numbers_is_skipped_and_says_how_to_store_them(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(stored, "file_of", lambda device: tmp_path / f"numbers-{device}.json")
    assert why_not("cuda") == "no numbers of cuda are stored: python -m tests.golden store --device cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not("cuda") == "needs a CUDA device"


def test_storing_one_kind_of_device_leaves_the_other(monkeypatch, tmp_path):
    monkeypatch.setattr(stored, "file_of", lambda device: tmp_path / f"numbers-{device}.json")
    stored.save({"loss a": [2.0, 1.0]}, [], "cpu")
    before = stored.file_of("cpu").read_bytes()
    stored.save({"loss a": [2.5, 1.5]}, [{"loss a": [2.5, 1.5003]}], "cuda")
    assert stored.file_of("cpu").read_bytes() == before
    assert stored.load("cuda")[0] == {"loss a": [2.5, 1.5]}
    # Ten times what another run deviated by, and 1e-3 of the number where no run did.
    assert stored.load("cuda")[1]["loss a"] == pytest.approx([2.5e-3, 3e-3], rel=0.01)
    (line,) = stored.deviations({"loss a": [2.5, 1.51]}, exactly=False, device="cuda")
    assert line == "loss a[1]: 1.51, stored is 1.5"


def test_a_changed_number_and_a_missing_one_are_found():
    values, tolerances = stored.load()
    losses = next(name for name in values if name.startswith("loss "))
    changed = {**values, losses: [values[losses][0] + 2 * tolerances[losses][0], *values[losses][1:]]}
    (line,) = stored.deviations(changed, exactly=False)
    assert line.startswith(f"{losses}[0]: ")
    (line,) = stored.deviations({name: row for name, row in values.items() if name != losses}, exactly=False)
    assert line == f"{losses}: is missing"
    assert stored.deviations(values, exactly=True) == []


def test_a_tolerance_is_small_beside_its_number():
    """A tolerance of the size of the number itself would hold whatever the code does."""
    wide = []
    files = [stored.file_of(device) for device in stored.DEVICES if stored.file_of(device).is_file()]
    entries = [item for file in files for item in json.loads(file.read_text(encoding="utf-8")).items()]
    for name, entry in entries:
        for value, tolerance in zip(entry["values"], entry["tolerances"], strict=True):
            if value and tolerance > 0.1 * abs(value) + 0.03:
                wide.append(f"{name}: {value} +- {tolerance}")
    assert not wide, "\n".join(wide)
