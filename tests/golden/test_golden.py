"""Numbers that a refactoring must not change, within what another make of processor may be off.

``python -m tests.golden compare`` asks for every bit on the machine that recorded them.
"""

from __future__ import annotations

import json
import os

import pytest

from tests.golden import stored


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> stored.Numbers:
    return stored.compute(tmp_path_factory.mktemp("golden"), os.environ)


def test_losses_and_rows_are_those_that_are_stored(found):
    assert not (lines := stored.deviations(found, exactly=False)), "\n".join(lines)


def test_a_changed_number_and_a_missing_one_are_found(found):
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
    for name, entry in json.loads(stored.FILE.read_text(encoding="utf-8")).items():
        for value, tolerance in zip(entry["values"], entry["tolerances"], strict=True):
            if value and tolerance > 0.1 * abs(value) + 0.03:
                wide.append(f"{name}: {value} +- {tolerance}")
    assert not wide, "\n".join(wide)
