"""What is loaded once per datamodule: the reference, held-out data, feature networks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flowbench.data import FlowDataModule
from flowbench.evaluation.frechet_metrics import FrechetDistance, FrechetInfinity
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.samples import RealSet
from flowbench.metrics import FeatureExtractor

__all__ = ["Prepared"]


@dataclass(frozen=True)
class Prepared:
    """What is loaded once per datamodule, not once per point of a sweep.

    Attributes:
        data: the datamodule.
        reference: split that samples are compared with.
        held_out: split that the floor scores.
        extractors: feature extractors by name.
    """

    data: FlowDataModule
    reference: RealSet
    held_out: RealSet
    extractors: dict[str, FeatureExtractor]

    def fill_cache(self, metrics: Iterable[Metric]) -> None:
        """Extract the features of the reference that some metrics look at, and their moments."""
        wanted = [m for m in metrics if m.features is not None and m.num_reference != 0]
        # The largest first: the smaller ones are its beginning.
        for metric in sorted(wanted, key=lambda m: -(m.num_reference or len(self.reference))):
            if self.data.spec.modality == "image" and metric.features is not None:
                extractor = self.extractors[metric.features]
                self.reference.features(extractor, metric.num_reference)
                if isinstance(metric, FrechetDistance | FrechetInfinity):
                    self.reference.moments(extractor, metric.num_reference or len(self.reference))
