"""The time that is left, against schedules worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flowbench.bench.forecast import Forecast, Underway
from flowbench.bench.plan import Cell
from flowbench.bench.progress import _left


def cell(contender: str, seed: int = 0) -> Cell:
    return Cell("fit", "", contender, seed, Path(contender, str(seed)), {}, "hash", "")


def test_nothing_is_known_before_anything_has_run():
    forecast = Forecast(2)
    assert forecast.seconds_left([cell("a")], []) is None
    assert forecast.seconds_left([], [Underway(cell("a"), 5.0, 0.05)]) is None
    forecast.add(replace(cell("reference"), kind="reference"), 3.0)
    assert forecast.seconds_left([cell("a")], []) is None


def test_the_pace_of_a_running_cell_counts_until_one_of_its_kind_has_ended():
    forecast, running = Forecast(1), [Underway(cell("a"), 30.0, 0.25)]
    assert forecast.seconds_left([], running) == pytest.approx(90.0)
    for seconds in (70.0, 100.0, 1000.0):
        forecast.add(cell("a", 1), seconds)
    assert forecast.seconds_left([], running) == pytest.approx(70.0)
    assert forecast.seconds_left([cell("a", 2)], running) == pytest.approx(170.0)
    # Longer than expected: a tenth of what is expected is still to come.
    assert forecast.seconds_left([], [Underway(cell("a"), 150.0, 0.9)]) == pytest.approx(10.0)


def test_cells_start_where_one_has_ended():
    forecast = Forecast(2)
    forecast.add(cell("a"), 100.0)
    forecast.add(cell("b"), 40.0)
    # Slots: a 100 then b 40; b 40, then an unknown one of the mean of both, 70.
    assert forecast.seconds_left([cell("a"), cell("b"), cell("new"), cell("b")], []) == pytest.approx(140.0)
    # The last one waits for a that runs: 60 of 100 seconds are left.
    running = [Underway(cell("a"), 40.0, 0.5), Underway(cell("b"), 10.0, 0.1)]
    assert forecast.seconds_left([cell("b")], running) == pytest.approx(70.0)
    assert forecast.seconds_left([], []) == 0.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0.0, ", about 1 min left"),
        (100.0, ", about 2 min left"),
        (3600.0, ", about 1 h left"),
        (7500.0, ", about 2 h 5 min left"),
    ],
)
def test_in_words(seconds, text):
    assert _left(seconds) == text
