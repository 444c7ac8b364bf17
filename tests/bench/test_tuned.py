"""Claims and tables at the best point of a sweep."""

from __future__ import annotations

import pytest

from flowbench.bench.claims import parse_claim
from flowbench.bench.plan import make_plan
from flowbench.bench.results import Results
from flowbench.bench.tuned import tuned_table
from flowbench.bench.verdicts import judge

SWEEP = {"guidance": [1, 2, 3]}


def rows(make_row, name, values):
    """Rows at the chosen scale of every seed."""
    return [
        make_row(name, "fd", value, seed=seed, axis="best_guidance", at=at, goal="down")
        for seed, (at, value) in enumerate(values)
    ]


def test_a_claim_reads_every_seed_at_its_own_choice(make_row):
    results = Results(
        [*rows(make_row, "a", [(1, 5.0), (3, 5.2), (2, 5.1)]), *rows(make_row, "b", [(2, 7.0), (2, 7.1), (2, 7.3)])]
    )
    claim = parse_claim("a.fd@guidance=best < b.fd@guidance=best")
    (verdict,) = judge(claim, results, {"": ["a", "b"]})
    assert verdict.verdict == "holds"
    assert verdict.difference.mean == pytest.approx((5.0 - 7.0 + 5.2 - 7.1 + 5.1 - 7.3) / 3)
    assert claim.left.name == "a.fd@guidance=best"


def test_a_seed_without_a_choice_leaves_the_claim_undecided(make_row):
    results = Results(rows(make_row, "a", [(1, 5.0), (3, 5.2)]), {"a": [0, 1, 2]})
    (verdict,) = judge(parse_claim("a.fd@guidance=best < 9"), results, {"": ["a"]})
    assert verdict.verdict == "undecided"
    assert "seed 2" in verdict.reason


def test_the_table_shows_the_choices(make_row):
    results = Results(rows(make_row, "a", [(1, 5.0), (3, 5.5)]))
    plan = {"problems": {"": ["a"]}, "seeds": [0, 1], "best_by": "fd"}
    table = tuned_table(plan, results, "")
    assert [entry.text for entry in table.rows[0]][:3] == ["a", "guidance", "1, 3"]
    assert table.rows[0][3].text.startswith("5.2")
    assert tuned_table(plan, Results([make_row("a", "fd", 1.0)]), "") is None


def test_the_cells_choose_by_what_the_bench_names(workshop):
    workshop.experiment("cfm")
    path = workshop.bench(
        contenders={"cfm": "cfm.yaml"}, sweep=SWEEP, best_by="fd[x]", claims=["cfm.fd[x]@guidance=best < 1"]
    )
    plan = make_plan(path)
    assert plan.cells[0].config["evaluator"] == {"sweep": SWEEP, "best_by": "fd[x]"}
    assert plan.describe()["best_by"] == "fd[x]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sweep": SWEEP}, "needs what it is chosen by; give e.g. best_by"),
        ({"best_by": "fd"}, "chooses among the points of a sweep, and sweep.guidance is not given"),
    ],
)
def test_a_claim_about_a_choice_that_nobody_makes_is_refused(workshop, content, message):
    workshop.experiment("cfm")
    path = workshop.bench(contenders={"cfm": "cfm.yaml"}, claims=["cfm.fd@guidance=best < 1"], **content)
    with pytest.raises(ValueError, match=message):
        make_plan(path)
