"""Scores of flows and of references on one-class digits, through the evaluator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.metrics import roc_auc_score

from flowbench.data import FlowDataModule
from flowbench.evaluation import Evaluator
from flowbench.evaluation.prospect import Prospect
from flowbench.tasks.anomaly.data import ANOMALY
from flowbench.tasks.anomaly.metrics import ImageAUROC
from flowbench.tasks.anomaly.probes import Scores
from flowbench.tasks.anomaly.references import Mahalanobis, NearestNeighbours
from flowbench.tasks.generation import Floor

from ...contract.builders import build, perturb
from ...evaluation.evaluator_runs import quick, trainer
from ...evaluation.setups import setup_of


@pytest.fixture(scope="module")
def data() -> FlowDataModule:
    return FlowDataModule("one_class_digits_3", batch_size=16, eval_batch_size=100)


@pytest.mark.parametrize("normal", range(10))
def test_only_the_normal_digit_is_trained_on(normal):
    one, digits = FlowDataModule(f"one_class_digits_{normal}"), FlowDataModule("digits")
    for name in ("train", "val"):
        whole = digits.split(name)
        assert torch.equal(one.split(name).values, whole.values[whole.label == normal])
        assert not one.columns(name)[ANOMALY].any()
    assert torch.equal(one.split("test").values, digits.split("test").values)
    assert torch.equal(one.columns("test")[ANOMALY].bool(), digits.split("test").label != normal)
    assert one.split("train").label is None, "a classifier of the classes would know the anomalies"


@pytest.mark.parametrize("name", ["tarflow", "cfm"])
def test_a_flow_scores_by_its_density(data, name):
    flow = quick(build(name, replace(data.spec, num_classes=10)))  # builders know labelled data
    perturb(flow)
    found = Scores().ask(setup_of(flow.eval(), data, num_likelihood=30))
    (batch,) = data.evaluation_loader("test", 30)
    expected = -flow.log_prob(batch.x, index=torch.arange(30)).detach()
    torch.testing.assert_close(found.values, expected.double(), rtol=1e-4, atol=1e-3)
    assert torch.equal(found.is_anomaly, data.columns("test")[ANOMALY][:30].bool())


def test_references_by_numpy(data):
    # Features are 8-bit pictures, on which the 17 grey levels are spread.
    train, test = (data.split(name).values.flatten(1).long().numpy() * 255 // 16 for name in ("train", "test"))
    setup, labels = setup_of(None, data), data.columns("test")[ANOMALY].numpy()
    nearest = np.sort(cdist(test, train), axis=1)[:, :2].mean(1)
    found = NearestNeighbours(k=2).answer(Scores(), setup)
    np.testing.assert_allclose(found.values.numpy(), nearest, rtol=1e-9)
    assert roc_auc_score(labels, found.values) > 0.9
    assert found.method == "2-nearest/identity"
    distance = Mahalanobis().answer(Scores(), setup)
    assert distance.method == "mahalanobis/identity"
    assert roc_auc_score(labels, distance.values) > 0.9


def test_rows_of_a_flow_and_of_its_references(data, tmp_path):
    references = {"mahalanobis": Mahalanobis(), "nearest": NearestNeighbours()}
    measure = Evaluator({"auroc": ImageAUROC()}, references=references, num_samples=4, num_likelihood=20)
    trainer(tmp_path, measure).test(quick(build("tarflow", data.spec)), data, verbose=False)
    (row,) = measure.rows
    assert (row.metric, row.goal, row.group, row.status) == ("image_auroc", "up", "anomaly", "ok")
    assert row.protocol.startswith("negative log-density/test/")
    rows = {row.contender: row for row in measure.reference_rows(data)}
    assert rows.keys() == {"mahalanobis", "nearest"}
    assert all(0.9 < row.value <= 1 for row in rows.values())


def test_it_is_expected_of_densities_and_scoring_references_alone(data):
    flow = build("tarflow", data.spec)
    assert ImageAUROC().expected(Prospect(data.spec, flow)) == ("image_auroc",)
    assert ImageAUROC().expected(Prospect(data.spec, reference=NearestNeighbours())) == ("image_auroc",)
    assert ImageAUROC().expected(Prospect(data.spec, reference=Floor())) == ()


def test_data_without_the_column_are_refused_before_anything_is_trained(tmp_path):
    data = FlowDataModule("digits", batch_size=16)
    measure = Evaluator({"auroc": ImageAUROC()}, num_samples=4)
    with pytest.raises(
        ValueError, match=r"evaluator.metrics.auroc: digits has no column 'anomaly'.*one_class_digits_0"
    ):
        trainer(tmp_path, measure).fit(build("tarflow", data.spec), data)


def test_neighbours_are_counted_from_one():
    with pytest.raises(ValueError, match=r"k must be a whole number in .*, got 0"):
        NearestNeighbours(k=0)
