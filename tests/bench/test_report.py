from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from PIL import Image
from rich.console import Console

from flowbench.bench import build_report, compare
from flowbench.bench.plan import make_plan
from flowbench.bench.plots import load_curve
from flowbench.bench.results import Results, collect, csv_text, load_rows
from flowbench.bench.sample_pictures import load_array, tile
from flowbench.bench.statistics import Summary, summarise
from flowbench.bench.tables import format_summary, metric_table

from .synthetic import write_synthetic_bench

SWEEP = {"network_evaluations": [1, 2, 4, 8]}


@pytest.fixture
def digits(workshop) -> Path:
    workshop.experiment("x")
    path = workshop.bench(
        question="Which is better?",
        contenders={name: "x.yaml" for name in ("starflow", "wcfm", "tarflow")},
        seeds=[0, 1, 2],
        sweep=SWEEP,
        claims=["wcfm.straightness < starflow.straightness", "wcfm.fd[digits-cnn]@4 > noise.fd[digits-cnn]"],
    )
    return write_synthetic_bench(make_plan(path))


@pytest.fixture
def toys(workshop) -> Path:
    workshop.experiment("x")
    path = workshop.bench(
        name="toys",
        contenders={"cfm": "x.yaml", "tarflow": "x.yaml"},
        seeds=[0],
        sweep=SWEEP,
        problems={"toy-a": {}, "toy-b": {"only": ["cfm"], "reason": "needs a source"}},
    )
    return write_synthetic_bench(make_plan(path))


def test_report_holds_claims_tables_and_pictures(digits):
    text = build_report(digits).read_text()
    assert text.startswith("# mini\n\nWhich is better?")
    assert "| `wcfm.straightness < starflow.straightness` | **holds** |" in text
    assert "| `wcfm.fd[digits-cnn]@4 > noise.fd[digits-cnn]` | **fails** |" in text
    assert "| _floor_ | 6 | – |" in text
    assert "≤ 2." in text  # a bound is shown as one
    assert "wcfm − starflow" in text
    assert "<details>" in text
    assert "- git_sha: 0123abc" in text
    assert "train_seconds" in text
    for name in ("samples", "evaluations", "training", "strips", "straightness"):
        assert f"(pictures/{name}.png)" in text
        with Image.open(digits / "pictures" / f"{name}.png") as picture:
            assert min(picture.size) > 200
            assert np.asarray(picture.convert("L")).std() > 5  # something is drawn
    assert "trajectories.png" not in text


def test_main_table_against_scipy(digits):
    text = build_report(digits).read_text()
    rows = [r for r in load_rows(digits) if r.contender == "starflow" and r.metric == "straightness"]
    values = [r.value for r in rows]
    half = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(values)
    shown = re.search(r"\| starflow \| \**([\d.]+) ± ([\d.]+)", text[text.index("Sampling paths") :])
    assert float(shown[1]) == pytest.approx(np.mean(values), abs=0.6e-3)
    assert float(shown[2]) == pytest.approx(half, rel=0.06)


@pytest.mark.slow
def test_problems_in_the_plane(toys):
    text = build_report(toys).read_text()
    assert "### Quality: toy-a" in text
    assert "| tarflow | not applicable: needs a source |" in text
    assert "One seed: there are no intervals" in text
    assert "±" not in text.split("## Pictures")[0].split("bold:")[1]
    assert (toys / "pictures/trajectories.png").is_file()


def test_a_report_is_repeatable_and_movable(digits, tmp_path):
    first = build_report(digits).read_text()
    moved = digits.rename(tmp_path / "moved")
    assert build_report(moved).read_text() == first
    before = (moved / "results.jsonl").read_bytes()
    collect(moved)
    assert (moved / "results.jsonl").read_bytes() == before


def test_report_of_a_half_finished_bench(digits):
    for cell in ("cells/wcfm/seed-0", "cells/wcfm/seed-1", "cells/wcfm/seed-2", "reference"):
        (digits / cell / "status.json").unlink()
    collect(digits)
    text = build_report(digits).read_text()
    assert "3 of 9 cells are not finished" in text
    assert "**undecided** | wcfm has no rows" in text


def test_report_without_any_row(workshop):
    workshop.experiment("x")
    plan = make_plan(workshop.bench(contenders={"a": "x.yaml"}, claims=["a.nll < 1"]))
    plan.directory.mkdir(parents=True)
    (plan.directory / "plan.json").write_text(json.dumps(plan.describe()))
    collect(plan.directory)
    assert "2 of 2 cells are not finished" in build_report(plan.directory).read_text()


def test_damaged_files_are_named(digits, tmp_path):
    with pytest.raises(ValueError, match="holds no bench"):
        build_report(tmp_path)
    curve = digits / "cells/wcfm/seed-1/curve.jsonl"
    curve.write_text("{oops\n" + curve.read_text())
    with pytest.raises(ValueError, match=r"seed-1/curve\.jsonl, line 1"):
        build_report(digits)
    (digits / "results.jsonl").write_text("{oops\n")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1: not JSON"):
        build_report(digits)
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(ValueError, match=r"x\.npz is damaged"):
        load_array(tmp_path / "x.npz", "x")


def test_rows_of_another_cell_are_refused(digits):
    (digits / "cells/wcfm/seed-0/rows.jsonl").write_bytes((digits / "cells/wcfm/seed-1/rows.jsonl").read_bytes())
    with pytest.raises(ValueError, match="belongs to mini/wcfm seed 1, expected mini/wcfm seed 0"):
        collect(digits)


def test_a_curve_survives_a_crash_and_a_resume(tmp_path):
    point = {"metric": "fd", "train_seconds": 1.0}
    lines = [
        {**point, "step": 1, "value": 9.0},
        {**point, "step": 2, "value": 8.0},
        {**point, "step": 2, "value": 7.0},
    ]
    path = tmp_path / "curve.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "met')
    assert load_curve(path, "fd") == {1: (1.0, 9.0), 2: (1.0, 7.0)}


def test_csv_has_every_row(digits):
    rows = load_rows(digits)
    lines = csv_text(rows).splitlines()
    assert len(lines) == len(rows) + 1
    assert lines[0].startswith("schema,bench,problem,contender")
    assert "provenance.git_sha" in lines[0]


def test_raw_weights_give_way_to_ema(make_row):
    results = Results(
        [make_row(value=1.0, weights="raw"), make_row(value=2.0), make_row("b", value=3.0, weights="raw")]
    )
    assert results.values("", "cfm", "nll") == {0: 2.0}
    assert results.values("", "b", "nll") == {0: 3.0}
    several = Results([make_row(value=1.0, protocol="z"), make_row(value=2.0, protocol="a")])
    assert several.values("", "cfm", "nll") == {0: 2.0}
    assert "also measured: z" in several.notes[0]


@pytest.mark.parametrize(
    ("summary", "text"),
    [
        (Summary(3, 12.3456, 0.1, 0.567), "12.35 ± 0.57"),
        (Summary(3, 12.3456, 0.1, 5.67), "12.3 ± 5.7"),
        (Summary(3, 1234.5, 1, 56.7), "1234 ± 57"),
        (Summary(3, 0.01234, 0.1, 0.00056), "0.01234 ± 0.00056"),
        (Summary(3, 4e12, 1, 5e10), "4e+12 ± 5e+10"),
        (Summary(3, 4e12, 0, 0.0), "4e+12"),
        (Summary(1, 2.98, None, None), "2.98 (n=1)"),
        (Summary(2, 1.0, 0.1, 0.9), "1.00 ± 0.90 (n=2)"),
    ],
)
def test_numbers_show_what_the_interval_supports(summary, text):
    assert format_summary(summary, seeds=3) == text


def test_tile_places_every_image():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 2, 3), dtype=np.uint8)
    picture = tile(images, columns=3, gap=1, scale=2)
    assert picture.shape == (2 * 5 - 1, 3 * 7 - 1, 3)
    for index in range(5):
        assert (picture[(index // 3) * 5, (index % 3) * 7] == index).all()
    assert (picture[4] == 255).all()


def test_compare_runs_and_benches(digits):
    text = compare([digits / "cells/wcfm/seed-0", digits / "cells/tarflow/seed-0"])
    assert "wcfm/seed-0" in text
    assert "fd[digits-cnn]" in text
    assert "nll: not the same protocol" in text
    both = compare([digits])
    value = summarise([r.value for r in load_rows(digits) if r.contender == "wcfm" and r.metric == "npe"])
    assert format_summary(value) in both
    with pytest.raises(ValueError, match="given twice"):
        compare([digits, digits])
    with pytest.raises(ValueError, match="nothing to compare"):
        compare([])
    with pytest.raises(ValueError, match="holds neither"):
        compare([digits / "pictures"])


def test_other_units_win_nothing(make_row):
    rows = [
        make_row(name, "straightness", value, seed=seed, unit=unit)
        for name, value, unit in [("a", 1.0, "data units"), ("b", 5.0, "latent units")]
        for seed in range(2)
    ]
    plan = {"contenders": ["a", "b"], "problems": {"": ["a", "b"]}, "seeds": [0, 1], "reasons": {}}
    table = metric_table(plan, Results(rows), "", "transport")
    assert not any(entry.bold for row in table.rows for entry in row)
    assert table.notes == ["straightness cannot be compared: a in data units; b in latent units."]


@pytest.mark.parametrize("width", [60, 100, 200])
def test_wide_tables_are_printed_in_parts(make_row, width):
    rows = [make_row("a", f"metric_number_{k}", 1.25 + k) for k in range(9)]
    plan = {"contenders": ["a"], "problems": {"": ["a"]}, "seeds": [0], "reasons": {}}
    console = Console(file=io.StringIO(), width=width)
    metric_table(plan, Results(rows), "", "quality").print(console)
    text = console.file.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for k in range(9):
        assert f"metric_number_{k}" in text
        assert f"{1.25 + k:g}" in text


@pytest.mark.parametrize("name", ["digits", pytest.param("toys", marks=pytest.mark.slow)])
def test_a_bench_of_an_earlier_version_is_reported_with_the_same_numbers(name, request):
    directory = request.getfixturevalue(name)
    expected = build_report(directory).read_text()
    plan = json.loads((directory / "plan.json").read_text())
    plan["tasks"] = plan.pop("problems")
    for cell in plan["cells"]:
        cell["task"] = cell.pop("problem")
    (directory / "plan.json").write_text(json.dumps(plan))
    marks = {"network_evaluations": "sweep", "guidance": "sweep-guidance"}
    lines = []
    for line in (directory / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        row["task"], row["schema"] = row.pop("problem"), 2
        if axis := row.pop("axis"):
            row |= {"protocol": f"{row['protocol']}/{marks[axis]}", axis: row["at"]}
        lines.append(json.dumps({key: value for key, value in row.items() if key not in ("goal", "group", "at")}))
    (directory / "results.jsonl").write_text("\n".join(lines) + "\n")
    assert build_report(directory).read_text() == expected
