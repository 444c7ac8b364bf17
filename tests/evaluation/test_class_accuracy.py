"""Rows of the class accuracy, and the labels that it needs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowbench.data import FlowDataModule
from flowbench.evaluation import Answers, ClassAccuracy
from flowbench.evaluation.samples import Collector, RealSet
from flowbench.evaluation.sampling import samples_of
from flowbench.metrics import ClassifierFeatures, train_classifier

from .known import DIGITS, cloud, compared, known


def classified(label: Tensor | None, x: Tensor) -> tuple[Answers, ClassifierFeatures]:
    images = DIGITS.to_uint8(cloud(60, DIGITS, 3))
    model = train_classifier(images, torch.arange(60) % 10, 10, 0, num_steps=2)
    network = ClassifierFeatures(model)
    collector = Collector(DIGITS, {"digits-cnn": network}, {"digits-cnn": len(x)}, len(x))
    collector.add(torch.arange(len(x)), x)
    drawn = collector.gathered("generated", label=label)
    return compared(drawn, drawn, {"digits-cnn": network}), network


def test_class_accuracy_is_that_of_the_whole_classifier():
    x = cloud(40, DIGITS, 4)
    guess = classified(None, x)[1].model(DIGITS.to_uint8(x)).argmax(dim=1)
    label = torch.where(torch.arange(40) < 25, guess, (guess + 1) % 10)
    given, _ = classified(label, x)
    (found,) = ClassAccuracy("digits-cnn").measure(given)
    assert found.value == 25 / 40
    assert (found.metric, found.n) == ("class_accuracy[digits-cnn]", 40)
    assert found.protocol == "digits-cnn/given-label/40"
    (few,) = ClassAccuracy("digits-cnn", num_samples=30).measure(given)
    assert (few.value, few.n, few.protocol) == (25 / 30, 30, "digits-cnn/given-label/30")
    x[0] = math.nan
    assert math.isnan(ClassAccuracy("digits-cnn").measure(classified(label, x)[0])[0].value)


def test_class_accuracy_needs_labels_and_a_classifier():
    assert ClassAccuracy("digits-cnn").measure(classified(None, cloud(12, DIGITS, 4))[0]) == []
    given = known(DIGITS)
    assert ClassAccuracy("identity").measure(given) == [], "without labels there is nothing to compare"
    samples = samples_of(given)
    samples.label = torch.zeros(len(samples), dtype=torch.int64)
    with pytest.raises(ValueError, match="class_accuracy needs a classifier of labelled images, identity is none"):
        ClassAccuracy("identity").measure(given)


def test_real_images_bring_their_own_labels():
    data = FlowDataModule("digits", batch_size=8)
    real = RealSet(data, "test", 20)
    assert torch.equal(real.label, data.split("test").label[:20])
    assert RealSet(FlowDataModule("s_curve", batch_size=8), "test").label is None
