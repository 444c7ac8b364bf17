"""Image AUROC against scikit-learn, and what it says of ties, gaps and single kinds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from flowbench.tasks.anomaly.metrics import ImageAUROC
from flowbench.tasks.anomaly.probes import AnomalyScores, Scores

from ...evaluation.known import DIGITS, known


def auroc(values, is_anomaly):
    scores = AnomalyScores(torch.tensor(values, dtype=torch.float64), torch.tensor(is_anomaly), "by hand")
    (found,) = ImageAUROC().measure(known(DIGITS, given={Scores(): scores}))
    return found


@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6) | st.sampled_from([0.0, 250.5]), st.booleans()), min_size=2, max_size=40)
)
@settings(max_examples=60, deadline=None)
def test_it_is_that_of_scikit_learn_with_ties(pairs):
    values, labels = map(list, zip(*pairs, strict=True))
    found = auroc(values, labels).value
    if len(set(labels)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(roc_auc_score(labels, values), abs=1e-6)


def test_large_scores_are_not_squashed_into_ties():
    """Negative log-densities of images are hundreds of nats: a sigmoid of them is 1."""
    assert auroc([501.0, 502.0, 503.0, 504.0], [False, False, True, True]).value == 1.0
    assert auroc([501.0, 503.0, 502.0, 504.0], [False, False, True, True]).value == 0.75


def test_the_protocol_counts_both_kinds():
    found = auroc([0.1, 0.2, 0.9], [False, False, True])
    assert (found.metric, found.n) == ("image_auroc", 3)
    assert found.protocol == "by hand/test/2-normal/1-anomalies"


def test_a_score_without_a_number_costs_the_row():
    assert math.isnan(auroc([0.1, math.nan, 0.3], [False, True, True]).value)
