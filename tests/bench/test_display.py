"""What the user sees while cells run: what is being done, how far it is, on any terminal, and never as markup."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from flowbench.bench.display import LiveDisplay, PlainDisplay, share_of_cell
from flowbench.bench.forked import Starter
from flowbench.bench.plan import make_plan
from flowbench.bench.preparation import Preparations
from flowbench.bench.preview import plan_table
from flowbench.core import preparation_progress as core
from tests.marks import slow

from .conftest import PROGRAM

MARKUP = ("[bold]x", "[/bold]", "[/]", "fd[digits-cnn]", "[link=http://x]y[/link]", "[[", "\\[a]")


def screen(display: LiveDisplay, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(display.progress.get_renderable())
    return console.file.getvalue()


def live(width: int) -> LiveDisplay:
    return LiveDisplay(Console(file=io.StringIO(), width=width, force_terminal=True))


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_bars_fit_the_terminal_and_cells_can_be_told_apart(width):
    display = live(width)
    labels = [f"gaussian-eight_gaussians/oversampled_entropic_coupling_32 seed {seed}" for seed in (0, 11)]
    running = {
        label: {"phase": "test", "what": "sweep 2/7, 16 evaluations, 256/2000", "fraction": 0.4} for label in labels
    }
    display.update(
        {**running, "prepare cfm seed 0": {"phase": "preparing", "what": "training autoencoder"}}, 2, 9, 200.0
    )
    text = screen(display, width)
    assert max(map(len, text.splitlines())) <= width
    assert len(text.splitlines()) == 4
    assert " seed 0" in text
    assert "seed 11" in text
    assert "40%" in text
    assert "2/9" in text
    if width >= 60:
        assert "about 3 min left" in text


@pytest.mark.parametrize("text", MARKUP)
def test_what_somebody_wrote_is_shown_as_it_is(text):
    display = live(200)
    display.update({f"cell {text}": {"phase": "test", "what": f"what {text}", "fraction": 0.1}}, 0, 1)
    shown = screen(display, 200)
    assert f"cell {text} " in shown
    assert f"test: what {text} " in shown
    display.say(f"line {text}")
    assert f"line {text}" in display.progress.console.file.getvalue()
    console = Console(file=io.StringIO(), width=200)
    plain = PlainDisplay(console, -1.0)
    plain.update({f"cell {text}": {"phase": "preparing", "what": f"what {text}", "fraction": 0.5}}, 0, 1, 200.0)
    assert "0/1 finished, about 3 min left; running" in console.file.getvalue()
    assert f"running: cell {text} preparing: what {text} (50%)" in console.file.getvalue()


@pytest.mark.parametrize("text", ["".join(MARKUP), slow("[/]")])
def test_nothing_in_a_bench_file_is_markup(workshop, text):
    folder = workshop.folder / text.replace("/", "")
    folder.mkdir(exist_ok=True)
    workshop.experiment("cfm")
    (workshop.folder / "cfm.yaml").rename(folder / "cfm.yaml")
    path = workshop.bench(
        contenders={"cfm": f"{folder.name}/cfm.yaml", "other": f"{folder.name}/cfm.yaml"},
        question=f"why {text}?",
        problems={"t": {"only": ["cfm"], "reason": f"because {text}"}, "u": {}},
        run_dir=str(folder / "run"),
    )
    assert workshop.run(path) == 0
    assert f"because {text}" in workshop.output
    assert f"{folder.name}/cfm.yaml" in workshop.output
    assert f"report: {folder}/run/report.md" in workshop.output
    report = (folder / "run" / "report.md").read_text()
    assert f"why {text}?" in report
    assert f"because {text}" in report


def test_a_reason_of_several_lines_stays_in_its_cell(workshop):
    workshop.experiment("cfm")
    problems = {"t": {"only": ["cfm"], "reason": "first\nsecond | third"}, "u": {}}
    plan = make_plan(workshop.bench(contenders={"cfm": "cfm.yaml", "b": "cfm.yaml"}, problems=problems))
    assert plan.describe()["reasons"] == {"t": "first second | third"}


@settings(max_examples=50, deadline=None)
@given(fractions=st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_the_bar_of_all_cells_never_goes_back(fractions):
    """A cell trains from 0 to 1, then measures from 0 to 1."""
    steps = [{"phase": "fit", "fraction": f} for f in sorted(fractions)]
    steps += [{"phase": "fit", "fraction": 1.0}, *({"phase": "test", "fraction": f} for f in sorted(fractions))]
    shares = [share_of_cell(step) for step in [{}, *steps, {"phase": "done", "fraction": 1.0}]]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    nobody_trains = [share_of_cell({"phase": "reference", "fraction": f}) for f in sorted(fractions)]
    assert nobody_trains == sorted(fractions)


def test_a_preparation_tells_what_is_trained_and_how_far(workshop):
    workshop.experiment("a", prepare_notes=[["training autoencoder, step 3", 0.25]])
    plan = make_plan(workshop.bench(contenders={"a": "a.yaml"}, seeds=[0]))
    for cell in plan.cells:
        cell.directory.mkdir(parents=True)
        cell.config_path.write_text(cell.config_text())
    shown: list = []
    preparations = Preparations(plan, Starter(PROGRAM, (), {}), lambda _: None)
    preparations.add(plan.cells)
    while preparations.advance(1):
        shown.append(preparations.progress)
        time.sleep(0.02)
    assert (preparations.failures, preparations.progress) == ({}, {})
    assert preparations.ended == {cell.preparation for cell in plan.cells}
    expected = {"what": "training autoencoder, step 3", "fraction": 0.25, "phase": "preparing"}
    assert {"prepare a seed 0": expected} in shown
    assert shown[0]["prepare a seed 0"]["phase"] == "preparing"


def test_notes_of_progress_go_where_they_are_asked_for_at_most_once_a_second(tmp_path, monkeypatch):
    file, clock = tmp_path / "progress.json", iter([10.0, 10.5, 11.5])
    monkeypatch.setattr(core, "_last", 0.0)
    core.note_progress("nobody asked", 1)
    assert not file.exists()
    monkeypatch.setenv(core.PROGRESS_FILE, str(file))
    monkeypatch.setattr(core.time, "monotonic", lambda: next(clock))
    core.note_progress("a", 1, 4)
    assert json.loads(file.read_text()) == {"what": "a", "fraction": 0.25}
    core.note_progress("b", 2, 4)
    assert json.loads(file.read_text())["what"] == "a"
    core.note_progress("c", 0, 0)
    assert json.loads(file.read_text()) == {"what": "c", "fraction": 0.0}
    assert os.listdir(tmp_path) == ["progress.json"]


def test_a_note_that_cannot_be_written_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "_last", -10.0)
    monkeypatch.setenv(core.PROGRESS_FILE, str(tmp_path / "nowhere" / "progress.json"))
    core.note_progress("a", 1)
    assert not list(tmp_path.iterdir())


def test_the_plan_is_text_too(workshop):
    workshop.experiment("cfm")
    table = plan_table(make_plan(workshop.bench(contenders={"cfm": "cfm.yaml"})))
    assert all(not isinstance(cell, str) for column in table.columns for cell in column.cells)
    assert Path(str(next(iter(table.columns[1].cells)))) == Path("cfm.yaml")
