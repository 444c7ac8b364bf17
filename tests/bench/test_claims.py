from __future__ import annotations

import pytest
import scipy.stats

from flowbench.bench.claims import Quantity, parse_claim
from flowbench.bench.results import Results
from flowbench.bench.verdicts import judge

TASKS = {"": ["a", "b", "noise"]}


@pytest.mark.parametrize(
    ("text", "left", "right"),
    [
        (
            "wcfm.straightness < starflow.straightness",
            Quantity("wcfm", "straightness"),
            Quantity("starflow", "straightness"),
        ),
        (
            "a.fd[digits-cnn]@4 < 0.5 * noise.fd[digits-cnn]",
            Quantity("a", "fd[digits-cnn]", None, 4),
            Quantity("noise", "fd[digits-cnn]", factor=0.5),
        ),
        (
            "moons/ot-cfm.npe > moons/cfm.npe",
            Quantity("ot-cfm", "npe", "moons"),
            Quantity("cfm", "npe", "moons"),
        ),
        ("moons/ot.npe < cfm.npe", Quantity("ot", "npe", "moons"), Quantity("cfm", "npe", "moons")),
        ("1e-3*a.nll<2.6", Quantity("a", "nll", factor=1e-3), 2.6),
        ("-0.5 < a.npe", -0.5, Quantity("a", "npe")),
        ("a.nll < b.nll + 0.02", Quantity("a", "nll"), Quantity("b", "nll", margin=0.02)),
        (
            "a-b.nll-1e-2 > 2*c.fd[x]@4+.5",
            Quantity("a-b", "nll", margin=-0.01),
            Quantity("c", "fd[x]", None, 4, factor=2.0, margin=0.5),
        ),
    ],
)
def test_grammar(text, left, right):
    claim = parse_claim(text)
    assert (claim.left, claim.right) == (left, right)


@pytest.mark.parametrize(
    "text",
    [
        "a.nll",
        "a.nll < b.nll < c.nll",
        "a.nll <= b.nll",
        "1 < 2",
        "a < b",
        "x/a.nll < y/b.nll extra",
        "a.nll@x < 1",
        "a.nll + < 1",
        "a.nll + b.nll < 1",
        "a.nll + 1 + 1 < 1",
    ],
)
def test_grammar_refuses(text):
    with pytest.raises(ValueError, match="claim") as caught:
        parse_claim(text)
    assert "\n" not in str(caught.value)


def results(make_row, **contenders):
    return Results(
        make_row(name, value=value, seed=seed, family="reference" if name == "noise" else "F")
        for name, values in contenders.items()
        for seed, value in enumerate(values)
    )


@pytest.mark.parametrize(("margin", "verdict"), [("+ 0.5", "holds"), ("+ 0.2", "undecided"), ("- 0.1", "fails")])
def test_a_margin_shifts_the_difference(make_row, margin, verdict):
    """The differences are 0.1, 0.2 and 0.3: their 95 % interval is 0.2 +- 0.248."""
    found = results(make_row, a=[1.1, 2.2, 3.3], b=[1.0, 2.0, 3.0])
    (judged,) = judge(parse_claim(f"a.nll < b.nll {margin}"), found, TASKS)
    assert judged.verdict == verdict


@pytest.mark.parametrize(
    ("a", "b", "operator", "verdict"),
    [
        ([1.0, 2.0, 3.0], [2.0, 3.1, 3.9], "<", "holds"),
        ([1.0, 2.0, 3.0], [2.0, 3.1, 3.9], ">", "fails"),
        ([2.0, 3.1, 3.9], [1.0, 2.0, 3.0], "<", "fails"),
        ([2.0, 3.1, 3.9], [1.0, 2.0, 3.0], ">", "holds"),
        ([1.0, 2.0, 3.0], [1.1, 1.8, 3.2], "<", "undecided"),
        ([1.0], [2.0], "<", "undecided"),
    ],
)
def test_truth_table(make_row, a, b, operator, verdict):
    (got,) = judge(parse_claim(f"a.nll {operator} b.nll"), results(make_row, a=a, b=b), TASKS)
    assert got.verdict == verdict
    if len(a) > 1 and a != b:
        low, high = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
        assert f"[{low:.4g}, {high:.4g}]" in got.reason
        side = "<" if high < 0 else ">" if low > 0 else ""
        assert (verdict == "undecided") == (side == "")
        assert (verdict == "holds") == (side == operator)


def test_pairing_decides_what_independent_means_cannot(make_row):
    a, b = [1.0, 5.0, 9.0], [1.2, 5.21, 9.19]
    assert scipy.stats.ttest_ind(a, b).pvalue > 0.5
    assert judge(parse_claim("a.nll < b.nll"), results(make_row, a=a, b=b), TASKS)[0].verdict == "holds"


@pytest.mark.parametrize(("bound", "verdict"), [(1.5, "holds"), (0.5, "fails"), (1.01, "undecided")])
def test_against_a_number(make_row, bound, verdict):
    values = [1.0, 1.1, 0.9]
    low, high = scipy.stats.t.interval(0.95, 2, 1.0, scipy.stats.sem(values))
    assert (high < bound, low > bound) == (verdict == "holds", verdict == "fails")
    for text in (f"a.nll < {bound}", f"{bound} > a.nll"):
        assert judge(parse_claim(text), results(make_row, a=values), TASKS)[0].verdict == verdict


def test_a_reference_is_a_constant_for_every_seed(make_row):
    rows = results(make_row, a=[1.0, 1.1, 0.9], noise=[4.0])
    (got,) = judge(parse_claim("a.nll < 0.5 * noise.nll"), rows, TASKS)
    assert (got.verdict, got.difference.n) == ("holds", 3)
    assert judge(parse_claim("noise.nll < 5"), rows, TASKS)[0].verdict == "holds"
    assert judge(parse_claim("noise.nll < 3"), rows, TASKS)[0].verdict == "fails"


def test_a_claim_without_problem_is_judged_where_its_contenders_take_part(make_row):
    rows = Results(
        make_row(name, value=value + 0.01 * seed * seed, seed=seed, problem=problem)
        for problem, name, value in [("x", "a", 1), ("x", "b", 2), ("y", "a", 3), ("y", "b", 2), ("z", "a", 1)]
        for seed in range(3)
    )
    problems = {"x": ["a", "b"], "y": ["a", "b"], "z": ["a"]}
    got = judge(parse_claim("a.nll < b.nll"), rows, problems)
    assert [(v.problem, v.verdict) for v in got] == [("x", "holds"), ("y", "fails")]
    assert [v.verdict for v in judge(parse_claim("y/a.nll < y/b.nll"), rows, problems)] == ["fails"]
    assert [v.verdict for v in judge(parse_claim("x/a.nll < y/a.nll"), rows, problems)] == ["holds"]


def test_swept_values(make_row):
    rows = Results(
        make_row("a", "fd", value=k + 0.01 * seed, seed=seed, axis="network_evaluations", at=float(k))
        for k in (1, 4)
        for seed in range(3)
    )
    assert judge(parse_claim("a.fd@1 < a.fd@4"), rows, {"": ["a"]})[0].verdict == "holds"
    (missing,) = judge(parse_claim("a.fd@8 < 1"), rows, {"": ["a"]})
    assert (missing.verdict, "1, 4" in missing.reason) == ("undecided", True)


def test_guided_values_are_a_sweep_of_their_own(make_row):
    both = [("network_evaluations", 4.0), ("guidance", 4.0), ("guidance", 1.5)]
    rows = Results(
        make_row("a", "fd", value=value + 0.01 * seed, seed=seed, axis=axis, at=point)
        for value, (axis, point) in enumerate(both, start=1)
        for seed in range(3)
    )
    assert judge(parse_claim("a.fd@guidance=4 < a.fd@guidance=1.5"), rows, {"": ["a"]})[0].verdict == "holds"
    assert judge(parse_claim("a.fd@4 < a.fd@guidance=4"), rows, {"": ["a"]})[0].verdict == "holds"
    assert "measured at 4" in judge(parse_claim("a.fd@1 < 1"), rows, {"": ["a"]})[0].reason
    assert parse_claim("a.fd@guidance=1.5 < 1").left.name == "a.fd@guidance=1.5"


def test_missing_numbers_say_why(make_row):
    rows = results(make_row, a=[1.0, 2.0])
    (got,) = judge(parse_claim("a.nl < 1"), rows, TASKS)
    assert got.verdict == "undecided"
    assert "a has no metric nl; did you mean 'nll'?" in got.reason
    assert "b has no rows" in judge(parse_claim("a.nll < b.nll"), rows, TASKS)[0].reason


def test_bounds_and_other_protocols_are_said(make_row):
    rows = Results(
        make_row(name, value=value + 0.1 * seed * seed, seed=seed, protocol=protocol)
        for name, value, protocol in [("a", 1.0, "exact/test/360"), ("b", 5.0, "bound/test/360")]
        for seed in range(3)
    )
    (got,) = judge(parse_claim("a.nll < b.nll"), rows, TASKS)
    assert "b.nll is an upper bound" in got.reason
    assert "protocols differ" in got.reason


def test_other_units_are_not_compared(make_row):
    rows = Results(
        make_row(name, "straightness", value=value, seed=seed, unit=unit)
        for name, value, unit in [("a", 1.0, "squared data units"), ("b", 5.0, "squared latent units")]
        for seed in range(3)
    )
    (got,) = judge(parse_claim("a.straightness < b.straightness"), rows, TASKS)
    assert got.verdict == "undecided"
    assert got.reason == "not comparable: squared data units against squared latent units"


@pytest.mark.parametrize("operator", ["<", ">"])
@pytest.mark.parametrize(
    ("left", "right"),
    [
        ([0.1 + 0.2, 5.0], [0.3, 5.0]),
        ([0.1 + 0.2, 0.6, 0.3], [0.3, 0.3 + 0.3, 0.1 + 0.2]),  # rounding on both sides: it has a variance
        ([40.0, 40.0, 40.0], [40.0, 40.0, 40.0]),
        ([1e300 * (0.1 + 0.2)] * 2, [3e299] * 2),
        ([-1e-300, 0.0], [-1e-300, 0.0]),
    ],
)
def test_what_differs_by_rounding_is_equal_on_whichever_side_and_of_whatever_size(make_row, left, right, operator):
    rows = results(make_row, a=left, b=right)
    for text in (f"a.nll {operator} b.nll", f"b.nll {operator} a.nll"):
        (got,) = judge(parse_claim(text), rows, TASKS)
        assert (got.verdict, got.difference.mean) == ("equal", 0.0)
        assert got.reason.startswith("equal to a relative 1e-09")


@pytest.mark.parametrize("operator", ["<", ">"])
def test_constants_that_differ_by_rounding_are_equal(make_row, operator):
    rows = results(make_row, noise=[0.1 + 0.2], a=[0.3, 0.1 + 0.2])
    for text in (f"noise.nll {operator} 0.3", f"0.3 {operator} noise.nll", f"a.nll {operator} noise.nll"):
        assert judge(parse_claim(text), rows, TASKS)[0].verdict == "equal"
    assert judge(parse_claim(f"3 * noise.nll {operator} 0.9"), rows, TASKS)[0].verdict == "equal"


def test_a_difference_beyond_rounding_is_one(make_row):
    rows = results(make_row, a=[1.0, 2.0, 3.0], b=[1.0 + 1e-8, 2.0 + 1e-8, 3.0 + 1e-8], noise=[1.0])
    assert judge(parse_claim("a.nll < b.nll"), rows, TASKS)[0].verdict == "holds"
    assert judge(parse_claim("noise.nll < 1.00000001"), rows, TASKS)[0].verdict == "holds"
