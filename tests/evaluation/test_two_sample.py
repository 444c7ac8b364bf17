"""Rows of the classifier two-sample test, with labels and without."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from flowbench.evaluation import Answers, ClassifierTwoSample
from flowbench.evaluation.prospect import Prospect
from flowbench.evaluation.sampling import samples_of
from flowbench.metrics import classifier_two_sample
from flowbench.tasks.generation.references import Floor, Noise

from .known import DIGITS, POINTS, cloud, compared, known, sample_set

LABELLED = replace(POINTS, num_classes=2)


def labelled(swapped: bool = False) -> Answers:
    """Two clouds of one law; the label is the sign of the first coordinate, or the opposite of it."""
    sides = [sample_set(cloud(100, LABELLED, seed), LABELLED, name) for seed, name in ((0, "generated"), (1, "val"))]
    for side, turn in zip(sides, (swapped, False), strict=True):
        side.label = ((side.shown[:, 0] > 0) != turn).long()
    return compared(*sides)


def values(metric: ClassifierTwoSample, answers: Answers) -> list[float]:
    return [m.value for m in metric.measure(answers)]


def test_rows_of_points():
    given = known()
    found = {m.metric: m for m in ClassifierTwoSample().measure(given)}
    expected = classifier_two_sample(samples_of(given).points(), given.reference.points()[:60])
    assert (found["c2st"].value, found["c2st_error"].value) == tuple(expected)
    assert (found["c2st"].n, found["c2st"].protocol) == (60, "points/forest/5-folds/val-60/60")
    few = ClassifierTwoSample(num_samples=40).measure(given)
    assert few[0].protocol == "points/forest/5-folds/val-40/40"


@pytest.mark.slow
def test_labels_are_judged_with_the_points():
    """With labels at random places of the law, only their company can tell."""
    alone, error = values(ClassifierTwoSample(), labelled(swapped=True))
    assert abs(alone - 0.5) < 3 * error
    right, error = values(ClassifierTwoSample(labels=True), labelled())
    assert abs(right - 0.5) < 3 * error
    assert values(ClassifierTwoSample(labels=True), labelled(swapped=True))[0] > 0.9
    assert ClassifierTwoSample(labels=True).names == ("c2st_with_labels", "c2st_with_labels_error")


def test_samples_without_labels_have_no_rows_where_labels_are_judged():
    metric = ClassifierTwoSample(labels=True)
    assert metric.measure(known()) == []
    assert metric.expected(Prospect(LABELLED, reference=Floor())) == metric.names
    assert metric.expected(Prospect(LABELLED, reference=Noise())) == ()
    assert ClassifierTwoSample().expected(Prospect(LABELLED, reference=Noise())) == ("c2st", "c2st_error")


def test_a_diverged_sample_or_too_few_cost_these_rows():
    broken = cloud(20, POINTS, 0)
    broken[3, 0] = math.nan
    real = sample_set(cloud(30, POINTS, 1), POINTS, "val")
    few = sample_set(cloud(4, POINTS, 0), POINTS, "generated")
    for samples in (sample_set(broken, POINTS, "generated"), few):
        assert all(math.isnan(value) for value in values(ClassifierTwoSample(), compared(samples, real)))


def test_what_it_cannot_be_measured_on_is_refused():
    with pytest.raises(ValueError, match="c2st compares points, and digits holds images"):
        ClassifierTwoSample().check("digits", DIGITS)
    with pytest.raises(ValueError, match="c2st is to judge labels, and s_curve has none: set labels: false"):
        ClassifierTwoSample(labels=True).check("s_curve", POINTS)
    ClassifierTwoSample(labels=True).check("moons", LABELLED)


def test_what_it_declares():
    goals = {info.name: info.goal for info in ClassifierTwoSample(sweep=True).declares}
    assert goals == {"c2st": "down", "c2st_error": "none"}
    assert ClassifierTwoSample(sweep=True).in_sweep
    assert not ClassifierTwoSample().in_sweep
