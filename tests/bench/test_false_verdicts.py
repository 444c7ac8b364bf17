"""How often a claim is decided where nothing is there to decide: measured with noise for the seeds' numbers.

``pytest -s -m slow tests/bench/test_false_verdicts.py`` prints the tables that docs/measuring.md shows.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from flowbench.bench.claims import parse_claim
from flowbench.bench.correction import correct
from flowbench.bench.results import Results
from flowbench.bench.verdicts import judge

pytestmark = pytest.mark.slow

SEEDS = (2, 3, 5, 10)
TRIALS = 4000
LARGE = 20.0
PAGE = Path(__file__).parents[2] / "docs" / "measuring.md"


def gaussian(rng, *shape):
    return rng.normal(0.0, 1.0, shape)


def heavy(rng, *shape):
    """Student's t with two degrees of freedom, whose variance is infinite."""
    return rng.standard_t(2, shape)


def diverging(rng, *shape):
    """One seed in ten is ten standard deviations worse; the mean is 0."""
    return rng.normal(0.0, 1.0, shape) + 10.0 * (rng.random(shape) < 0.1) - 1.0


def skewed(rng, *shape):
    """Log-normal, less its mean."""
    return np.exp(rng.normal(0.0, 1.0, shape)) - math.exp(0.5)


def results(make_row, sides):
    """Rows of ``{contender: values of shape (trials, seeds)}``, each trial a problem."""
    return Results(
        make_row(name, value=float(value), seed=seed, problem=str(trial))
        for name, values in sides.items()
        for trial, by_seed in enumerate(values)
        for seed, value in enumerate(by_seed)
    )


def verdicts(make_row, sides, *texts):
    """Verdicts of each claim on each trial, by trial."""
    rows = results(make_row, sides)
    trials = {str(trial): list(sides) for trial in range(len(next(iter(sides.values()))))}
    by_trial = defaultdict(list)
    for text in texts:
        for verdict in judge(parse_claim(text), rows, trials):
            by_trial[verdict.problem].append(verdict)
    return list(by_trial.values())


def share(found, *words):
    return sum(verdict.verdict in words for (verdict,) in found) / len(found)


def is_at_most(rate, level, trials=TRIALS):
    """Whether a rate is not shown to be above a level (p > 0.001, by the binomial test)."""
    return scipy.stats.binomtest(round(rate * trials), trials, level, alternative="greater").pvalue > 1e-3


def of_order(make_row, rng, noises, n):
    """Two contenders of equal means; ``<`` is decided either way by chance alone."""
    sides = {name: LARGE + noise(rng, TRIALS, n) for name, noise in zip("ab", noises, strict=True)}
    return share(verdicts(make_row, sides, "a.nll < b.nll"), "holds", "fails")


def of_a_number(make_row, rng, noises, n):
    sides = {"a": LARGE + noises[0](rng, TRIALS, n)}
    return share(verdicts(make_row, sides, f"a.nll < {LARGE}"), "holds", "fails")


def of_equivalence(make_row, rng, noises, n):
    """Two contenders that differ by just the margin: they are not within it. Twenty deviations leave one end alone."""
    a, b = (noise(rng, TRIALS, n) for noise in noises)
    return share(verdicts(make_row, {"a": 500 + LARGE + a, "b": 500 + b}, f"a.nll ~ b.nll within {LARGE}"), "holds")


def of_a_share(make_row, rng, noises, n):
    a, b = (noise(rng, TRIALS, n) for noise in noises)
    return share(verdicts(make_row, {"a": 110 + a, "b": 100 + b}, "a.nll ~ b.nll within 10%"), "holds")


RATES = {
    "order, Gaussian noise": (of_order, (gaussian, gaussian), 0.05),
    "order, heavy tails in both": (of_order, (heavy, heavy), 0.05),
    "order, both diverge on a seed in ten": (of_order, (diverging, diverging), 0.05),
    "order, one of them diverges on a seed in ten": (of_order, (diverging, gaussian), None),
    "against a number, log-normal noise": (of_a_number, (skewed,), None),
    "equivalence, Gaussian noise": (of_equivalence, (gaussian, gaussian), 0.05),
    "equivalence within a share, Gaussian noise": (of_a_share, (gaussian, gaussian), 0.05),
}
"""What is claimed about which noise, and the rate that must not be exceeded; None where the t-test promises none."""


def documented(name):
    """The rates of a row of the page's table, in percent."""
    row = re.search(rf"^\| {re.escape(name)} \|(.+)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert row, f"{PAGE.name} has no row {name!r}"
    return [float(cell) for cell in row[1].split("|")]


@pytest.mark.parametrize("name", RATES)
def test_rates_of_false_verdicts(make_row, name):
    measure, noises, level = RATES[name]
    rates = [measure(make_row, np.random.default_rng(n), noises, n) for n in SEEDS]
    print(f"\n| {name} | {' | '.join(f'{100 * rate:.1f}' for rate in rates)} |")
    if level is not None:
        assert all(is_at_most(rate, level) for rate in rates)
    assert documented(name) == pytest.approx([100 * rate for rate in rates], abs=0.3)


def files(rng, kind, n):
    """Values of ten claims ``a0 < b0`` ...; of shape (trials, seeds) for each contender."""
    shape = (TRIALS // 4, n)
    shared = gaussian(rng, *shape)
    return {
        **{f"a{k}": LARGE + gaussian(rng, *shape) - (LARGE / 2 if kind == "half" and k < 5 else 0) for k in range(10)},
        **{f"b{k}": LARGE + (shared if kind == "baseline" else gaussian(rng, *shape)) for k in range(10)},
    }


KINDS = {
    "ten claims apart": "apart",
    "ten claims against one baseline": "baseline",
    "ten claims, five of them true": "half",
}


@pytest.mark.parametrize("name", KINDS)
def test_rates_of_files_with_a_false_verdict(make_row, name):
    rates = {"alone": [], "over the file": []}
    for n in SEEDS:
        sides = files(np.random.default_rng(n), KINDS[name], n)
        found = [correct(f) for f in verdicts(make_row, sides, *(f"a{k}.nll < b{k}.nll" for k in range(10)))]
        is_true = [KINDS[name] == "half" and k < 5 for k in range(10)]
        false = [
            [(v.alone.verdict in words, v.over_file in words) for v, words in zip(f, allowed(is_true), strict=True)]
            for f in found
        ]
        for position, kind in enumerate(rates):
            rates[kind].append(np.mean([any(pair[position] for pair in f) for f in false]))
    for kind, by_seeds in rates.items():
        print(f"\n| {name}, {kind} | {' | '.join(f'{100 * rate:.1f}' for rate in by_seeds)} |")
    for kind, by_seeds in rates.items():
        assert documented(f"{name}, {kind}") == pytest.approx([100 * r for r in by_seeds], abs=0.3)
    assert all(is_at_most(rate, 0.05, TRIALS // 4) for rate in rates["over the file"])
    assert min(rates["alone"]) > max(rates["over the file"])


def allowed(is_true):
    """The verdicts that are false of each claim: either one where nothing differs, `fails` where the claim is true."""
    return [("fails",) if true else ("holds", "fails") for true in is_true]
