"""What a result is called, and where it lies, is not what it is: nothing is measured twice, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from flowbench.bench.kept import adopt, find_kept
from flowbench.bench.plan import make_plan
from flowbench.bench.results import load_rows
from flowbench.bench.status import read_status, write_status
from flowbench.core.rows import read_rows, write_rows

from .synthetic import write_synthetic_bench

MOONS = {"overrides": {"data.dataset": "moons"}}
RINGS = {"overrides": {"data.dataset": "rings"}}


class Bench:
    """A finished bench, and what is changed in its file."""

    def __init__(self, workshop, **content) -> None:
        self.workshop = workshop
        for value, name in enumerate(("x", "y")):
            workshop.experiment(name, value=value)
        self.content = {"contenders": {"cfm": "x.yaml", "wcfm": "y.yaml"}, "run_dir": str(workshop.folder / "run")}
        self.content |= {"sweep": {"network_evaluations": [1]}, **content}
        self.directory = write_synthetic_bench(self.plan())
        self.before = self.values()

    def plan(self, **content):
        self.content |= content
        return make_plan(self.workshop.bench(**self.content))

    def run(self, **content) -> tuple[list[str], str]:
        """The commands that were started, and what was printed."""
        self.plan(**content)
        path = self.workshop.bench(**self.content)
        assert self.workshop.run(path, dry_run=False) == 0
        return [call for call in self.workshop.calls() if not call.startswith("prepare")], self.workshop.output

    def values(self) -> dict[tuple[str, str, int], list[float]]:
        found: dict = {}
        for row in load_rows(self.directory):
            found.setdefault((row.problem, row.contender, row.seed), []).append(row.value)
        return found


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take most of the time of a report, and nothing here is about them."""
    monkeypatch.setattr("flowbench.bench.report._pictures", lambda *_: [])


@pytest.fixture
def finished(workshop):
    return Bench(workshop)


def test_a_renamed_bench_file_goes_on_with_everything(finished, workshop):
    path = workshop.folder / "again.yaml"
    finished.plan()
    (workshop.folder / "mini.yaml").rename(path)
    assert workshop.run(path, dry_run=False) == 0
    assert workshop.calls() == []
    rows = load_rows(finished.directory)
    assert {row.bench for row in rows} == {"again"}
    assert finished.values() == finished.before
    assert (finished.directory / "report.md").read_text().startswith("# again")
    assert json.loads((finished.directory / "plan.json").read_text())["name"] == "again"


def test_a_renamed_run_folder_goes_on_with_everything(finished, tmp_path):
    moved = finished.directory.rename(tmp_path / "elsewhere")
    finished.directory = moved
    assert finished.run(name="other", run_dir=str(moved))[0] == []
    assert finished.values() == finished.before
    # Whoever starts from the files in it works in it.
    for cell in moved.glob("cells/*/*"):
        assert yaml.safe_load((cell / "cell.yaml").read_text())["run"]["dir"] == str(cell)


def test_a_copy_goes_on_with_everything_and_leaves_the_original_alone(finished, tmp_path):
    def content(root: Path) -> dict[str, bytes]:
        return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}

    copy = Path(shutil.copytree(finished.directory, tmp_path / "copy"))
    before = content(finished.directory)
    original, finished.directory = finished.directory, copy
    assert finished.run(run_dir=str(copy))[0] == []
    assert finished.values() == finished.before
    assert content(original) == before


def test_a_moved_checkout_with_its_runs_goes_on_with_everything(finished, workshop, tmp_path):
    """No path of a machine is part of what a cell is."""
    before = [cell.config_hash for cell in finished.plan().everything]
    moved = tmp_path / "new" / "place"
    moved.mkdir(parents=True)
    for item in [p for p in workshop.folder.iterdir() if p.name != "new"]:
        item.rename(moved / item.name)
    workshop.folder = moved
    finished.directory = moved / "run"
    assert [cell.config_hash for cell in finished.plan(run_dir=str(moved / "run")).everything] == before
    assert finished.run()[0] == []
    assert finished.values() == finished.before


def test_a_renamed_contender_keeps_its_cells(finished):
    calls, said = finished.run(contenders={"flow": "x.yaml", "wcfm": "y.yaml"})
    assert calls == []
    assert said.count("the same experiment, kept from cells/cfm") == 2
    after = finished.values()
    for seed in (0, 1):
        assert after["", "flow", seed] == finished.before["", "cfm", seed]
        assert after["", "wcfm", seed] == finished.before["", "wcfm", seed]
    assert not (finished.directory / "cells" / "cfm").exists()


def test_names_that_change_places_take_their_cells_along(finished):
    calls, said = finished.run(contenders={"wcfm": "x.yaml", "cfm": "y.yaml"})
    assert (calls, "changed" in said) == ([], False)
    after = finished.values()
    for seed in (0, 1):
        assert after["", "wcfm", seed] == finished.before["", "cfm", seed]
        assert after["", "cfm", seed] == finished.before["", "wcfm", seed]
    assert not list(finished.directory.rglob("*.stale-*"))


def test_a_name_alone_is_not_taken_for_the_content(finished):
    """The other experiment under the first one's name is trained; the first one's cells wait aside."""
    calls, said = finished.run(contenders={"cfm": "y.yaml"})
    assert calls == []  # those of wcfm, which the bench does not name any more
    assert said.count("its experiment changed") == 2
    assert (finished.directory / "cells/cfm/seed-0.stale-1/rows.jsonl").is_file()
    calls, said = finished.run(contenders={"cfm": "x.yaml", "wcfm": "y.yaml"})
    assert calls == []  # and back again
    assert finished.values() == finished.before


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (None, {"moons": None}),
        ({"moons": None}, None),
        ({"moons": MOONS, "rings": RINGS}, {"a": MOONS, "b": RINGS}),
        ({"moons": MOONS, "rings": RINGS}, {"rings": MOONS, "moons": RINGS}),
    ],
)
def test_renamed_problems_keep_cells_and_reference_rows(workshop, first, then):
    finished = Bench(workshop, problems=first)
    calls, _ = finished.run(problems=then)
    assert calls == []
    renamed = dict(zip(first or [""], then or [""], strict=True))
    assert finished.values() == {(renamed[problem], *key): value for (problem, *key), value in finished.before.items()}


def test_what_changes_a_result_is_measured_again(finished, workshop):
    workshop.experiment("y", value=7)
    calls, _ = finished.run()
    assert sorted(calls) == ["fit wcfm 0", "fit wcfm 1"]


def test_equal_experiments_do_not_take_each_others_cells(workshop):
    finished = Bench(workshop, contenders={"cfm": "x.yaml", "wcfm": "x.yaml"})
    assert find_kept(finished.plan()) == {}
    shutil.rmtree(finished.directory / "cells" / "wcfm" / "seed-0")
    assert finished.run()[0] == ["fit wcfm 0"]


def test_a_finished_cell_is_kept_before_one_that_failed(finished):
    cells = finished.directory / "cells"
    shutil.copytree(cells / "cfm" / "seed-0", cells / "cfm" / "seed-0.stale-1")
    write_status(cells / "cfm" / "seed-0", replace(read_status(cells / "cfm" / "seed-0"), state="FAILED"))
    kept = find_kept(finished.plan(contenders={"flow": "x.yaml"}))
    assert kept[cells / "flow" / "seed-0"] == cells / "cfm" / "seed-0.stale-1"


def test_a_move_that_is_killed_goes_on(finished, monkeypatch):
    plan = finished.plan(contenders={"flow": "x.yaml", "wcfm": "y.yaml"})
    moves = iter(range(100))
    original = Path.replace

    def killed(self, target):
        if next(moves) == 2:
            raise KeyboardInterrupt
        return original(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        adopt(plan, lambda _: None)
    monkeypatch.undo()
    monkeypatch.setenv("FAKE_CALLS", str(finished.workshop.calls_file))
    assert finished.run()[0] == []
    assert finished.values()["", "flow", 0] == finished.before["", "cfm", 0]


def test_a_live_process_is_not_moved_from_under(finished, monkeypatch):
    monkeypatch.setattr("flowbench.bench.kept.lock_is_held", lambda directory: "cfm" in str(directory))
    with pytest.raises(ValueError, match=r"flow seed 0: a process still runs this experiment under its old name in .*"):
        adopt(finished.plan(contenders={"flow": "x.yaml"}), lambda _: None)


def test_the_dry_run_says_what_the_run_does(finished, workshop):
    plan = finished.plan(contenders={"flow": "x.yaml", "wcfm": "y.yaml"}, name="other")
    (finished.directory / "cells/wcfm/seed-1/rows.jsonl").write_text("{broken\n")
    from flowbench.bench.preview import plan_table

    first, last = (list(plan_table(plan).columns[k].cells) for k in (0, 2))
    assert dict(zip(map(str, first), map(str, last), strict=True)) == {
        "flow": "2/2 done (kept in cells/cfm)",
        "wcfm": "1/2 done",
    }
    assert sorted(finished.run()[0]) == ["fit wcfm 1"]


def test_a_bench_under_a_new_name_and_folder_names_the_old_one(workshop):
    finished = Bench(workshop, run_dir=None)
    from flowbench.bench.preview import plan_lines

    assert "under another name" not in plan_lines(finished.plan())
    text = plan_lines(finished.plan(name="other"))
    assert f"{workshop.runs / 'mini'} holds cells of this bench under another name" in text


def test_rows_of_somebody_else_are_still_refused(finished):
    """Copied by hand over those of another cell: the names in the file are those of no attempt of this cell."""
    ours, other = (finished.directory / f"cells/{name}/seed-0" for name in ("cfm", "wcfm"))
    write_status(ours, replace(read_status(ours), names=["mini", "", "cfm"]))
    write_rows(ours / "rows.jsonl", read_rows(other / "rows.jsonl"))
    calls, said = finished.run()
    assert calls == ["fit cfm 0"]
    assert "belongs to mini/wcfm seed 0, expected mini/cfm seed 0; it is run again" in " ".join(said.split())


def test_images_of_others_follow_the_bench(finished):
    (row, *_) = read_rows(finished.directory / "reference" / "rows.jsonl")
    stranger = replace(row, contender="cfm", family="external", problem="", value=1.5)
    write_rows(finished.directory / "external" / "cfm" / "rows.jsonl", [stranger])
    finished.run(name="other", problems={"digits": None})
    (found,) = [row for row in load_rows(finished.directory) if row.family == "external"]
    assert (found.bench, found.problem, found.contender) == ("other", "digits", "cfm (external)")
