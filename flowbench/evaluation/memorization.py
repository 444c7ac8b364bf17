"""Are the samples copies of the training set?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowbench import metrics as pure
from flowbench.core.checks import check_count
from flowbench.evaluation.answers import Answers
from flowbench.evaluation.feature_metrics import FeatureMetric
from flowbench.evaluation.measurement import Measurement, MetricInfo
from flowbench.evaluation.pictures import image_grid
from flowbench.evaluation.sampling import samples_of

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

    def check_reference(self, split: str) -> None:
        """Refuse another split than the one whose copies it looks for."""
        if split != "train":
            raise ValueError(f"evaluator.reference is {split}, but memorization needs train; remove that metric")

    def measure(self, answers: Answers) -> list[Measurement]:
        """`authenticity[features]`, `data_copying[features]` (z) and `neighbour_distance_ratio[features]`."""
        found = self._found(answers)
        values = {
            "authenticity": found.authenticity if found else math.nan,
            "data_copying": found.copying_z if found else math.nan,
            "neighbour_distance_ratio": found.median_ratio if found else math.nan,
        }
        counts = self.counts(answers)
        extra = f"/{answers.held_out.name}-{self._num_held_out(answers)}"
        return [self.measurement(answers, name, value, counts, extra) for name, value in values.items()]

    def pictures(self, answers: Answers) -> dict[str, Tensor]:
        """The samples that are closest to a training image (above), and that image (below)."""
        found = self._found(answers)
        if found is None or answers.spec.modality != "image":
            return {}
        pairs = torch.cat([samples_of(answers).images(found.generated), answers.reference.images(found.train)])
        return {f"nearest-{self.features}": image_grid(pairs, columns=len(found.generated))}

    def _num_held_out(self, answers: Answers) -> int:
        return min(self.counts(answers)[0], len(answers.held_out))

    def _found(self, answers: Answers) -> pure.Memorization | None:
        """The measures; None where a sample diverged."""
        if not samples_of(answers).is_finite:
            return None

        def compute() -> pure.Memorization:
            generated, train = self.pair(answers)
            fresh = answers.held_out.features(answers.extractors[self.features], self._num_held_out(answers))
            return pure.memorization(generated, train, fresh, self.num_pairs)

        return answers.once(("memorization", self.features, self.counts(answers), self.num_pairs), compute)
