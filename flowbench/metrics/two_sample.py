"""A classifier as a two-sample test: can anything tell the samples from the data?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowbench.core.checks import check_count
from flowbench.metrics.table_checks import check_tables

__all__ = ["TwoSampleAccuracy", "classifier_two_sample"]

# What scikit-learn takes.
_LARGEST_SEED = 2**32 - 1


class TwoSampleAccuracy(NamedTuple):
    """Accuracy of a classifier that tells two sets of samples apart, on samples that it was not trained on.

    Attributes:
        accuracy: 0.5 where it cannot, 1 where it always can; below 0.5 is noise.
        standard_error: spread of the accuracy over other samples of the same two laws.

    Example:
        >>> x = torch.linspace(0, 1, 50)[:, None]
        >>> classifier_two_sample(x, x + 10)  # nothing overlaps
        TwoSampleAccuracy(accuracy=1.0, standard_error=0.0)
    """

    accuracy: float
    standard_error: float


def classifier_two_sample(
    x: Tensor,
    y: Tensor,
    *,
    num_folds: int = 5,
    seed: int = 0,
) -> TwoSampleAccuracy:
    """C2ST: cross-validated accuracy of a random forest between samples and as many reference samples.

    Both sides are scaled by mean and standard deviation of the reference, as the package sbi does (a column that is
    constant there is only shifted), and the forest has scikit-learn's default settings, as there. A condition is judged
    with the samples where its columns stand beside theirs.

    Args:
        x: samples, shape (N, *D).
        y: reference samples, shape (M, *D); the first min(N, M) of each side are used.
        num_folds: parts of the cross-validation, >= 2, stratified and shuffled.
        seed: of the folds and of the forest, 0 to 2**32 - 1.

    Returns:
        The accuracy over all folds. The standard error is the larger one of the binomial error of as many predictions
        and of the spread over folds.

    References:
        Revisiting Classifier Two-Sample Tests (Lopez-Paz, Oquab, 2017), https://arxiv.org/abs/1610.06545.

    Raises:
        ValueError: fewer samples than folds, widths that differ, values that are not finite.
    """
    from sklearn.ensemble import RandomForestClassifier  # slow to import, and used here alone
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    check_count("num_folds", num_folds, at_least=2)
    check_count("seed", seed, at_least=0, at_most=_LARGEST_SEED)
    table = _scaled(*check_tables(x, y, minimum=num_folds))
    truth = np.repeat([0, 1], len(table) // 2)
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    guess = cross_val_predict(RandomForestClassifier(random_state=seed), table, truth, cv=folds)
    right = guess == truth
    parts = [float(right[test].mean()) for _, test in folds.split(table, truth)]
    accuracy = float(right.mean())
    binomial = (accuracy * (1 - accuracy) / len(right)) ** 0.5
    return TwoSampleAccuracy(accuracy, max(binomial, float(np.std(parts, ddof=1)) / num_folds**0.5))


def _scaled(x: Tensor, y: Tensor) -> np.ndarray:
    """Both sides, equally many, in units of the reference's spread: shape (2 N, D)."""
    count = min(len(x), len(y))
    x, y = x[:count], y[:count]
    spread = y.std(dim=0, correction=0)
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    return ((torch.cat([x, y]) - y.mean(dim=0)) / spread).cpu().numpy()
