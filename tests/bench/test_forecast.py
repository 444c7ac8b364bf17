"""The time that is left, against schedules worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flowbench.bench.display import _left
from flowbench.bench.forecast import Forecast, Underway
from flowbench.bench.plan import Cell


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


def test_the_longest_cell_of_a_seed_starts_first():
    forecast = Forecast(2)
    cells = [cell(name, seed) for name in ("a", "b", "new", "other") for seed in (1, 2)]
    assert forecast.longest_of_seed(cells) == cell("a", 1)
    forecast.add(cell("a"), 40.0)
    forecast.add(cell("b"), 100.0)
    started = []
    while cells:
        started.append(forecast.longest_of_seed(cells))
        cells.remove(started[-1])
    assert started == [cell(name, seed) for seed in (1, 2) for name in ("new", "other", "b", "a")]


def test_one_problem_is_not_mixed_with_another():
    forecast = Forecast(2)
    forecast.add(replace(cell("b"), problem="moons"), 9.0)
    cells = [replace(cell(name), problem=problem) for problem in ("rings", "moons") for name in ("a", "b")]
    assert forecast.longest_of_seed(cells) == cells[0]
    assert forecast.longest_of_seed(cells[2:]) == cells[2]


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
