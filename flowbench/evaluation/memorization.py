"""Are the samples copies of the training set?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowbench import metrics as pure
from flowbench.core.checks import check_count
from flowbench.evaluation.feature_metrics import FeatureMetric
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.pictures import image_grid
from flowbench.evaluation.subject import Subject

__all__ = ["Memorization"]


class Memorization(FeatureMetric):
    """Distances of samples to their nearest training neighbour, against those of held-out data.

    Args:
        features: name of the extractor.
        num_samples: see :class:`FeatureMetric`.
        num_reference: training samples to search, counted from the first; None searches all. Copies of the others
            are not found.
        num_pairs: closest pairs to show in the picture, >= 1.

    Raises:
        ValueError: for fewer than one pair.

    References:
        Alaa et al. (2022), arXiv 2102.08921 (authenticity); Meehan, Chaudhuri, Dasgupta (2020), arXiv 2004.05675
        (data copying).
    """

    bases = tuple(map(MetricInfo, ("authenticity", "data_copying", "neighbour_distance_ratio")))

    def __init__(
        self,
        features: str,
        num_samples: int | None = None,
        num_reference: int | None = None,
        num_pairs: int = 16,
    ) -> None:
        super().__init__(features, num_samples, num_reference)
        check_count("num_pairs", num_pairs)
        self.num_pairs = num_pairs

    def measure(self, subject: Subject) -> list[Measurement]:
        """`authenticity[features]`, `data_copying[features]` (z) and `neighbour_distance_ratio[features]`."""
        found = self._found(subject)
        values = {
            "authenticity": found.authenticity if found else math.nan,
            "data_copying": found.copying_z if found else math.nan,
            "neighbour_distance_ratio": found.median_ratio if found else math.nan,
        }
        counts = self.counts(subject)
        extra = f"/{subject.held_out.name}-{self._num_held_out(subject)}" if subject.held_out else ""
        return [self.measurement(subject, name, value, counts, extra) for name, value in values.items()]

    def pictures(self, subject: Subject) -> dict[str, Tensor]:
        """The samples that are closest to a training image (above), and that image (below)."""
        found = self._found(subject)
        if found is None or subject.spec.modality != "image":
            return {}
        pairs = torch.cat([subject.samples.images(found.generated), subject.reference.images(found.train)])
        return {f"nearest-{self.features}": image_grid(pairs, columns=len(found.generated))}

    def _num_held_out(self, subject: Subject) -> int:
        assert subject.held_out is not None, "the evaluator gives held-out data"
        return min(self.counts(subject)[0], len(subject.held_out))

    def _found(self, subject: Subject) -> pure.Memorization | None:
        """The measures; None where a sample diverged."""
        if not subject.samples.is_finite or subject.held_out is None:
            return None
        key = f"memorization {self.features} {self.counts(subject)} {self.num_pairs}"
        if key not in subject.memory:
            generated, train = self.pair(subject)
            fresh = subject.held_out.features(subject.extractors[self.features], self._num_held_out(subject))
            subject.memory[key] = pure.memorization(generated, train, fresh, self.num_pairs)
        result: pure.Memorization = subject.memory[key]
        return result
