"""What is loaded once per datamodule: real data, feature networks, and what the metrics ask of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flowbench.data import FlowDataModule
from flowbench.evaluation.frechet_metrics import FrechetDistance, FrechetInfinity
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.samples import RealSet, SampleSet
from flowbench.evaluation.subject import Subject
from flowbench.metrics import FeatureExtractor

__all__ = ["Prepared", "feature_counts"]


@dataclass(frozen=True)
class Prepared:
    """Real data and feature networks of a measurement.

    Attributes:
        data: the data.
        reference: what samples are compared with.
        held_out: what the row `floor` scores as if it were generated.
        extractors: feature networks by name.
    """

    data: FlowDataModule
    reference: RealSet
    held_out: RealSet
    extractors: dict[str, FeatureExtractor]

    def subject(self, samples: SampleSet) -> Subject:
        """Somebody of whom only the samples are known."""
        spec = self.data.spec
        return Subject(spec, samples, self.reference, extractors=self.extractors, held_out=self.held_out)

    def fill_cache(self, metrics: Iterable[Metric]) -> None:
        """Put the reference split's features into the cache, as far as these metrics look at them."""
        wanted = [m for m in metrics if m.features is not None and m.num_reference != 0]
        # The largest first: the smaller ones are its beginning.
        for metric in sorted(wanted, key=lambda m: -(m.num_reference or len(self.reference))):
            if self.data.spec.modality == "image" and metric.features is not None:
                extractor = self.extractors[metric.features]
                self.reference.features(extractor, metric.num_reference)
                if isinstance(metric, FrechetDistance | FrechetInfinity):
                    self.reference.moments(extractor, metric.num_reference or len(self.reference))


def feature_counts(metrics: Iterable[Metric], num_samples: int) -> dict[str, int]:
    """Samples that each extractor is asked for by these metrics, `num_samples` at most."""
    counts: dict[str, int] = {}
    for metric in metrics:
        if metric.features is not None:
            wanted = min(metric.num_samples or num_samples, num_samples)
            counts[metric.features] = max(counts.get(metric.features, 0), wanted)
    return counts
