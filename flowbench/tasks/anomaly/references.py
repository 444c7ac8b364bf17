"""Who scores anomalies without being trained by a flow: a Gaussian, and the nearest neighbours."""

from __future__ import annotations

from abc import abstractmethod
from typing import TypeVar, cast

import numpy as np
import torch
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

from flowbench.core.checks import check_count
from flowbench.data import DataSpec, FlowDataModule
from flowbench.evaluation.extractors import check_extractor, get_extractor
from flowbench.evaluation.probe import Probe, Setup
from flowbench.evaluation.reference import Reference
from flowbench.evaluation.samples import RealSet
from flowbench.metrics import FeatureExtractor
from flowbench.tasks.anomaly.probes import AnomalyScores, Scores, anomalies

__all__ = ["Mahalanobis", "NearestNeighbours", "ScoringReference"]

A = TypeVar("A")


class ScoringReference(Reference):
    """A reference that scores test samples by their features and those of the training split.

    Args:
        features: name of a frozen extractor, see :func:`flowbench.evaluation.get_extractor`; `auto` is what suits
            the data, for small images their pixels.
    """

    def __init__(self, features: str = "auto") -> None:
        self.features = features

    def check(self, dataset: str, spec: DataSpec) -> None:
        """Refuse an extractor that the data do not have."""
        check_extractor(self.features, dataset, spec)

    def prepare(self, data: FlowDataModule, device: torch.device | str) -> None:
        """Fetch or train the extractor."""
        get_extractor(self.features, data, device)

    def answer(self, probe: Probe[A], setup: Setup) -> A | None:
        """The scores of the test samples."""
        if not isinstance(probe, Scores):
            return None
        extractor = get_extractor(self.features, setup.data)
        train = _features(RealSet(setup.data, "train"), extractor)
        test = _features(RealSet(setup.data, "test", setup.num_likelihood), extractor)
        found = torch.from_numpy(self.scores(train, test))
        method = f"{self.method}/{extractor.protocol}"
        return cast(A, AnomalyScores(found, anomalies(setup, len(found)), method))

    @property
    @abstractmethod
    def method(self) -> str:
        """What the score is, for the protocol."""

    @abstractmethod
    def scores(self, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        """Scores of `test` (M, F), float64, shape (M,), from the normal samples `train` (N, F)."""


class Mahalanobis(ScoringReference):
    """Squared Mahalanobis distance under a Gaussian of full covariance (Rippel et al., 2020, arXiv 2005.14140).

    The covariance is shrunk towards a multiple of the identity by the rule of Ledoit and Wolf (2004), since there may
    be fewer samples than features.

    Args:
        features: see :class:`ScoringReference`.

    Example:
        >>> import numpy as np
        >>> normal = np.random.default_rng(0).normal(size=(500, 2))
        >>> inside, outside = Mahalanobis().scores(normal, np.array([[0.0, 0.0], [9.0, 0.0]]))
        >>> bool(inside < outside)
        True
    """

    @property
    def method(self) -> str:
        """Names the distance."""
        return "mahalanobis"

    def scores(self, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        """See :meth:`ScoringReference.scores`."""
        return np.asarray(LedoitWolf().fit(train).mahalanobis(test), dtype=np.float64)


class NearestNeighbours(ScoringReference):
    """Mean distance to the `k` nearest training samples (Bergman et al., 2020, arXiv 2002.10445).

    Args:
        features: see :class:`ScoringReference`.
        k: neighbours, >= 1; no more than there are training samples are taken.

    Example:
        >>> import numpy as np
        >>> NearestNeighbours(k=2).scores(np.array([[0.0], [1.0], [5.0]]), np.array([[0.5], [9.0]]))
        array([0.5, 6. ])
    """

    def __init__(self, features: str = "auto", k: int = 2) -> None:
        super().__init__(features)
        check_count("k", k)
        self.k = k

    @property
    def method(self) -> str:
        """Names `k`."""
        return f"{self.k}-nearest"

    def scores(self, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        """See :meth:`ScoringReference.scores`."""
        search = NearestNeighbors(n_neighbors=min(self.k, len(train))).fit(train)
        return np.asarray(search.kneighbors(test)[0].mean(1), dtype=np.float64)


def _features(samples: RealSet, extractor: FeatureExtractor) -> np.ndarray:
    return samples.features(extractor).double().numpy()
