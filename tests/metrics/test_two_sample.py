"""C2ST: 0.5 within its error for equal laws, 1 for disjoint ones, and the best accuracy there is in between."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import StratifiedKFold, cross_val_score

from flowbench.core.seeds import generator
from flowbench.metrics import classifier_two_sample


def normal(num, *name):
    return torch.randn(num, 2, generator=generator(14, *name), dtype=torch.float64)


def test_equal_laws_have_a_half_and_disjoint_ones_one():
    x, y = normal(150, "x"), normal(150, "y")
    equal = classifier_two_sample(x, y)
    assert abs(equal.accuracy - 0.5) < 3 * equal.standard_error
    assert equal.standard_error == pytest.approx(0.5 / 300**0.5, rel=0.8)  # of 300 predictions, or a little more
    assert classifier_two_sample(x, y + 20) == (1.0, 0.0)


def test_a_shift_is_told_as_well_as_the_best_rule_can_and_no_better():
    """Between N(0, I) and N(m, I) no rule has more than Phi(|m| / 2)."""
    x, y = normal(400, "x"), normal(400, "y") + torch.tensor([1.5, 0.0])
    found, best = classifier_two_sample(x, y), float(norm.cdf(0.75))
    assert best - 0.1 < found.accuracy < best + 3 * found.standard_error


@pytest.mark.slow
def test_is_that_of_scikit_learn_in_any_units():
    """Powers of two change no digit of what the forest sees."""
    x, y = normal(60, "x") * 1.5, normal(60, "y")
    table = ((torch.cat([x, y]) - y.mean(0)) / y.std(0, correction=0)).numpy()
    folds, truth = StratifiedKFold(4, shuffle=True, random_state=3), [0] * 60 + [1] * 60
    scores = cross_val_score(RandomForestClassifier(random_state=3), table, truth, cv=folds)
    found = classifier_two_sample(1024 * x, 1024 * y, num_folds=4, seed=3)
    assert found.accuracy == pytest.approx(scores.mean())


@pytest.mark.slow
def test_equal_numbers_are_taken_and_a_constant_column_is_no_clue():
    x, y = normal(60, "x"), normal(45, "y")
    found = classifier_two_sample(x, y)
    assert found == classifier_two_sample(x[:45], y)
    constant = torch.full((60, 1), 7.0, dtype=torch.float64)
    beside = classifier_two_sample(torch.cat([x, constant], 1), torch.cat([y, constant[:45]], 1))
    assert math.isfinite(beside.accuracy)
    assert beside.accuracy < 0.8


@pytest.mark.slow
def test_a_condition_beside_the_samples_is_judged_with_them():
    """Samples of the right law whose condition says the opposite: alone they cannot be told, with it they can."""
    x, y = normal(150, "x"), normal(150, "y")
    wrong, right = torch.sign(-x[:, :1]), torch.sign(y[:, :1])
    alone = classifier_two_sample(x, y)
    together = classifier_two_sample(torch.cat([x, wrong], 1), torch.cat([y, right], 1))
    assert abs(alone.accuracy - 0.5) < 3 * alone.standard_error
    assert together.accuracy > 0.9


def test_users_mistakes_cost_one_line():
    x = normal(20, "x")
    with pytest.raises(ValueError, match="x has 20 samples, this metric needs at least 21"):
        classifier_two_sample(x, x, num_folds=21)
