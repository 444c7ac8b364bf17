"""Equivalence, matched quality, and what a misspelt claim is answered."""

from __future__ import annotations

import pytest

from flowbench.bench.claims import Margin, Matched, Quantity, parse_claim
from flowbench.bench.plan import make_plan


@pytest.mark.parametrize(
    ("text", "margin"),
    [
        ("a.nll ~ b.nll within 5%", Margin(0.05, relative=True)),
        ("a.nll~b.nll   within 2.5 %", Margin(0.025, relative=True)),
        ("a.nll ~ b.nll within 0.02", Margin(0.02, relative=False)),
        ("a.nll ~ b.nll within 3", Margin(3.0, relative=False)),
    ],
)
def test_equivalence(text, margin):
    claim = parse_claim(text)
    assert (claim.operator, claim.margin, claim.matched) == ("~", margin, None)
    assert (claim.left, claim.right) == (Quantity("a", "nll"), Quantity("b", "nll"))


def test_equivalence_takes_what_sides_take():
    claim = parse_claim("x/a.fd[cnn]@4 ~ 2 * b.fd[cnn]@guidance=1.5 - 0.1 within 10%")
    assert claim.left == Quantity("a", "fd[cnn]", "x", 4.0)
    assert claim.right == Quantity("b", "fd[cnn]", "x", 1.5, "guidance", factor=2.0, margin=-0.1)
    assert parse_claim("a.nll ~ 2.6 within 0.1").right == 2.6


@pytest.mark.parametrize(
    ("text", "matched"),
    [
        ("raag.fd < cfg.fd at class_accuracy", Matched("class_accuracy")),
        ("raag.fd[cnn] > 0.9 * cfg.fd[cnn] at recall[cnn] along guidance", Matched("recall[cnn]", "guidance")),
        ("a.fd ~ b.fd within 5% at recall along network_evaluations", Matched("recall", "network_evaluations")),
    ],
)
def test_matched_quality(text, matched):
    assert parse_claim(text).matched == matched


def test_contenders_may_have_the_names_of_the_words():
    claim = parse_claim("at.within < along.at")
    assert (claim.left, claim.right) == (Quantity("at", "within"), Quantity("along", "at"))


@pytest.mark.parametrize(
    ("text", "message", "form"),
    [
        ("a.nll <= b.nll", "", "did you mean 'a.nll < b.nll'?"),
        ("a.nll>=b.nll", "", "did you mean 'a.nll > b.nll'?"),
        ("a.nll == b.nll", "exactly one", "did you mean 'a.nll ~ b.nll within 5%'?"),
        ("a.nll = b.nll within 0.1", "exactly one", "did you mean 'a.nll ~ b.nll within 0.1'?"),
        ("a.nll ≈ b.nll", "exactly one", "did you mean 'a.nll ~ b.nll within 5%'?"),
        ("a.nll ~ b.nll", "how close", "did you mean 'a.nll ~ b.nll within 5%'?"),
        ("a.nll ~ b.nll at recall", "how close", "did you mean 'a.nll ~ b.nll within 5% at recall'?"),
        ("a.nll ~ b.nll within 5 percent", "", "did you mean 'a.nll ~ b.nll within 5%'?"),
        ("a.nll ~ b.nll within ±0.1", "", "did you mean 'a.nll ~ b.nll within 0.1'?"),
        ("a.nll < b.nll within 5%", "within belongs to ~", "did you mean 'a.nll ~ b.nll within 5%'?"),
        ("a.nll ~ b.nll at recall within 5%", "", "did you mean 'a.nll ~ b.nll within 5% at recall'?"),
        ("a.fd < b.fd @ recall", "", "did you mean 'a.fd < b.fd at recall'?"),
        ("a.fd < b.fd at recall on guidance", "", "did you mean 'a.fd < b.fd at recall along guidance'?"),
        (
            "a.fd < b.fd at recall along guidanc",
            "did you mean 'guidance'",
            "write e.g. 'a.fd < b.fd at class_accuracy'",
        ),
        ("a.nll ~ b.nll within 0", "no margin", "write e.g. 'a.fd ~ b.fd within 5%'"),
        ("a.nll ~ b.nll within 100%", "within 100% is no margin", "write e.g. 'a.fd ~ b.fd within 5%'"),
        ("a.nll ~ b.nll within 1e999", "no margin", "write e.g."),
        ("a.nll ~ b.nll within x", "'b.nll within x' is neither", "write e.g."),
        ("a.fd < 3 at recall", "one side is a number", "write e.g. 'a.fd < b.fd at class_accuracy'"),
        ("a.fd@4 < b.fd@4 at recall", "leave @4 out", "write e.g."),
        ("a.recall < b.recall at recall", "both compared and held equal", "write e.g."),
        ("1 < 2", "two numbers", "write e.g. 'a.fd < b.fd'"),
        ("a.nll", "exactly one", "write e.g. 'a.fd < b.fd'"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_right_form(text, message, form):
    with pytest.raises(ValueError, match="claim") as caught:
        parse_claim(text)
    line = str(caught.value)
    assert line.startswith(f"claim {text!r}: ")
    assert message in line
    assert form in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("sweep", "claim", "message"),
    [
        ({}, "a.nll < b.nll at fd", "at fd needs a sweep of two points or more; the bench sweeps nothing"),
        ({"guidance": [3]}, "a.nll < b.nll at fd", "two points or more; sweep.guidance is [3]"),
        ({"guidance": [1, 3]}, "a.nll < b.nll at fd along network_evaluations", "sweep.network_evaluations is []"),
        (
            {"guidance": [1, 3], "network_evaluations": [2, 4]},
            "a.nll < b.nll at fd",
            "write 'at fd along guidance' or 'at fd along network_evaluations'",
        ),
    ],
)
def test_matched_quality_needs_one_sweep(workshop, sweep, claim, message):
    for name in "ab":
        workshop.experiment(name)
    path = workshop.bench(contenders={"a": "a.yaml", "b": "b.yaml"}, sweep=sweep, claims=[claim])
    with pytest.raises(ValueError, match="claim") as caught:
        make_plan(path)
    assert message in str(caught.value)


def test_a_plan_holds_the_claim_as_it_is_read_again(workshop):
    for name in "ab":
        workshop.experiment(name)
    lines = ["a.nll < b.nll at fd", "a.nll ~ b.nll within 5%", "a.nll < 0.5 * b.nll"]
    path = workshop.bench(contenders={"a": "a.yaml", "b": "b.yaml"}, sweep={"guidance": [1, 3]}, claims=lines)
    plan = make_plan(path)
    assert [parse_claim(text) for text in plan.describe()["claims"]] == list(plan.bench.claims)
