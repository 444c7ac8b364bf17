"""What a measurement compares with: real data and feature networks, loaded once per datamodule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flowbench.data import FlowDataModule
from flowbench.evaluation.metric import Metric
from flowbench.evaluation.networks import FeatureNetworks
from flowbench.evaluation.samples import RealSet

__all__ = ["Comparison"]


@dataclass(frozen=True)
class Comparison:
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
    extractors: FeatureNetworks

    def fill_cache(self, metrics: Mapping[str, Metric]) -> None:
        """Load the feature networks, and put the reference split's features into the cache."""
        for name in self.extractors:
            self.extractors[name]
        # The largest first: the smaller ones are its beginning.
        for metric in sorted(metrics.values(), key=lambda m: -(m.num_reference or len(self.reference))):
            metric.fill_cache(self.reference, self.extractors)
