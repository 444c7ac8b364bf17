"""What an evaluator loads once per datamodule: real samples and feature networks."""

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
    """Real samples and feature networks.

    Attributes:
        data: where they are from.
        reference: what samples are compared with.
        held_out: what is scored as if it were generated.
        extractors: feature networks by name.
    """

    data: FlowDataModule
    reference: RealSet
    held_out: RealSet
    extractors: dict[str, FeatureExtractor]

    def fill_cache(self, metrics: Iterable[Metric]) -> None:
        """Put the reference's features into the cache, as far as metrics need them."""
        if self.data.spec.modality != "image":
            return
        wanted = [m for m in metrics if m.features is not None and m.num_reference != 0]
        # The largest first: the smaller ones are its beginning.
        for metric in sorted(wanted, key=lambda m: -(m.num_reference or len(self.reference))):
            extractor = self.extractors[str(metric.features)]
            self.reference.features(extractor, metric.num_reference)
            if isinstance(metric, FrechetDistance | FrechetInfinity):
                self.reference.moments(extractor, metric.num_reference or len(self.reference))
