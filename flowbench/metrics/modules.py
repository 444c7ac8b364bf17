"""The metrics as ``torchmetrics.Metric``: update with batches, reduce over processes, compute once.

Each holds a feature extractor outside its modules, so neither ``state_dict`` nor ``parameters`` nor ``.to``
see the network; the extractor decides on its own device.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from flowbench.core.checks import check_count, check_numbers, check_seed
from flowbench.core.seeds import generator
from flowbench.metrics.features import FeatureExtractor
from flowbench.metrics.frechet import FeatureStatistics, frechet_distance
from flowbench.metrics.kernel import kernel_distance, mmd_rbf
from flowbench.metrics.neighbours import density_coverage, precision_recall
from flowbench.metrics.transport import sliced_wasserstein2, wasserstein2

__all__ = [
    "DensityCoverageMetric",
    "FrechetDistance",
    "KernelDistance",
    "MaximumMeanDiscrepancy",
    "PrecisionRecallMetric",
    "SampleMetric",
    "SlicedWasserstein2",
    "Wasserstein2",
]


class _FeatureMetric(Metric):
    """A metric on the features of real and generated samples."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    extractor: FeatureExtractor

    def __init__(self, extractor: FeatureExtractor) -> None:
        super().__init__()
        # Past nn.Module's own __setattr__: an extractor that is a module must not become a child.
        object.__setattr__(self, "extractor", extractor)

    def _features(self, samples: Tensor) -> Tensor:
        extractor = self.extractor
        features = extractor(samples)
        if features.shape != (len(samples), extractor.dimension):
            raise ValueError(
                f"extractor {extractor.name} gave shape {tuple(features.shape)}, promised ({len(samples)}, "
                f"{extractor.dimension})"
            )
        return features.to(self.device)


class FrechetDistance(_FeatureMetric):
    """Frechet distance between the features of real and generated samples.

    State: count, sum and outer products in float64, summed over processes, so the value depends neither on
        batches nor
    on ranks.

    Args:
        extractor: the feature network; :class:`~flowbench.metrics.features.IdentityFeatures` for points.
    """

    real_count: Tensor
    real_sum: Tensor
    real_outer: Tensor
    generated_count: Tensor
    generated_sum: Tensor
    generated_outer: Tensor

    def __init__(self, extractor: FeatureExtractor) -> None:
        super().__init__(extractor)
        dim = extractor.dimension
        for side in ("real", "generated"):
            self.add_state(f"{side}_count", torch.tensor(0), dist_reduce_fx="sum")
            self.add_state(f"{side}_sum", torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{side}_outer", torch.zeros(dim, dim, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, samples: Tensor, real: bool) -> None:
        """Add uint8 images (N, C, H, W), or points (N, *D), to one side.

        Raises:
            ValueError: the extractor refuses the samples, or a feature is not finite.
        """
        statistics = self.statistics(real).update(self._features(samples))
        side = "real" if real else "generated"
        setattr(self, f"{side}_count", torch.tensor(statistics.count, device=self.device))
        setattr(self, f"{side}_sum", statistics.sum)
        setattr(self, f"{side}_outer", statistics.outer)

    def statistics(self, real: bool) -> FeatureStatistics:
        """One side's statistics so far (of this process, unless synchronised), as a copy."""
        side = "real" if real else "generated"
        count, total, outer = (getattr(self, f"{side}_{part}") for part in ("count", "sum", "outer"))
        return FeatureStatistics.from_sums(int(count), total.clone(), outer.clone())

    def compute(self) -> Tensor:
        """The distance, a float64 scalar.

        Raises:
            ValueError: a side has fewer than two samples.
        """
        value = frechet_distance(self.statistics(real=True), self.statistics(real=False))
        return torch.tensor(value, dtype=torch.float64, device=self.device)


class SampleMetric(_FeatureMetric):
    """A metric that needs all features of both sides: they are kept and concatenated over processes.

    Args:
        extractor: the feature network; :class:`~flowbench.metrics.features.IdentityFeatures` for points.
    """

    real: list[Tensor]
    generated: list[Tensor]

    def __init__(self, extractor: FeatureExtractor) -> None:
        super().__init__(extractor)
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("generated", [], dist_reduce_fx="cat")

    def update(self, samples: Tensor, real: bool) -> None:
        """Add uint8 images (N, C, H, W), or points (N, *D), to one side."""
        (self.real if real else self.generated).append(self._features(samples))

    def compute(self) -> Tensor | dict[str, Tensor]:
        """The value, float64 scalars.

        Raises:
            ValueError: a side is empty, or too small for the metric.
        """
        real, generated = dim_zero_cat(self.real), dim_zero_cat(self.generated)
        if not len(real) or not len(generated):
            raise ValueError("a side has no samples; update with real=True and with real=False first")
        value = self.measure(real, generated)
        if isinstance(value, dict):
            return {name: self._scalar(number) for name, number in value.items()}
        return self._scalar(value)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather from all processes; one that saw no sample takes part with none."""
        for side in (self.real, self.generated):
            if isinstance(side, list) and not side:
                # torchmetrics would send an empty vector here, which does not match the others' tables.
                side.append(torch.zeros(0, self.extractor.dimension, device=self.device))
        super().sync(*args, **kwargs)

    @abstractmethod
    def measure(self, real: Tensor, generated: Tensor) -> float | dict[str, float]:
        """The pure function on features of shape (N, D) and (M, D)."""

    def _scalar(self, number: float) -> Tensor:
        return torch.tensor(number, dtype=torch.float64, device=self.device)


class KernelDistance(SampleMetric):
    """Kernel (Inception) distance, unbiased, over all pairs or subsets.

    Args:
        extractor: the feature network.
        degree: of the polynomial kernel, 1 to 20.
        subset_size: None for all pairs; or samples per subset, >= 2.
        num_subsets: subsets drawn, >= 1, with ``subset_size``.
        seed: of the subsets, >= 0. Their members depend on the order of samples, hence on the number of processes;
            all pairs do not.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        degree: int = 3,
        subset_size: int | None = None,
        num_subsets: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(extractor)
        check_count("degree", degree, at_most=20)
        check_count("subset_size", subset_size, at_least=2, or_none=True)
        check_count("num_subsets", num_subsets)
        check_seed("seed", seed)
        self.degree, self.subset_size, self.num_subsets, self.seed = degree, subset_size, num_subsets, seed

    def measure(self, real: Tensor, generated: Tensor) -> float:
        """MMD^2 (its mean over the subsets)."""
        return kernel_distance(
            generated,
            real,
            degree=self.degree,
            subset_size=self.subset_size,
            num_subsets=self.num_subsets,
            generator=generator(self.seed, "kernel-distance"),
        ).mean


class PrecisionRecallMetric(SampleMetric):
    """Improved precision and recall; computes ``{"precision", "recall"}``.

    Args:
        extractor: the feature network.
        k: neighbour that sets the radius, >= 1.
    """

    higher_is_better = True

    def __init__(self, extractor: FeatureExtractor, k: int = 3) -> None:
        super().__init__(extractor)
        check_count("k", k)
        self.k = k

    def measure(self, real: Tensor, generated: Tensor) -> dict[str, float]:
        """Precision and recall."""
        return precision_recall(real, generated, self.k)._asdict()


class DensityCoverageMetric(SampleMetric):
    """Density and coverage; computes ``{"density", "coverage"}``.

    Args:
        extractor: the feature network.
        k: neighbour that sets the radius, >= 1.
    """

    higher_is_better = True

    def __init__(self, extractor: FeatureExtractor, k: int = 5) -> None:
        super().__init__(extractor)
        check_count("k", k)
        self.k = k

    def measure(self, real: Tensor, generated: Tensor) -> dict[str, float]:
        """Density and coverage."""
        return density_coverage(real, generated, self.k)._asdict()


class Wasserstein2(SampleMetric):
    """Exact Wasserstein-2 distance (not squared); for a few thousand samples of low dimension."""

    def measure(self, real: Tensor, generated: Tensor) -> float:
        """W2 in the units of the features."""
        return wasserstein2(generated, real)


class SlicedWasserstein2(SampleMetric):
    """Sliced Wasserstein-2 distance (not squared).

    Args:
        extractor: the feature network, or identity.
        num_projections: number of directions, >= 1.
        seed: of the directions, >= 0.
    """

    def __init__(self, extractor: FeatureExtractor, num_projections: int = 256, seed: int = 0) -> None:
        super().__init__(extractor)
        check_count("num_projections", num_projections)
        check_seed("seed", seed)
        self.num_projections, self.seed = num_projections, seed

    def measure(self, real: Tensor, generated: Tensor) -> float:
        """Root of the mean squared 1-D distance."""
        return sliced_wasserstein2(generated, real, self.num_projections, generator(self.seed, "sliced-wasserstein"))


class MaximumMeanDiscrepancy(SampleMetric):
    """Unbiased squared MMD under a mixture of Gaussian kernels, for low dimension.

    Args:
        extractor: identity, as a rule.
        bandwidths: widths in data units, in (0, 1e12]; None: around the median distance of the real samples.
    """

    def __init__(self, extractor: FeatureExtractor, bandwidths: Sequence[float] | None = None) -> None:
        super().__init__(extractor)
        if bandwidths is not None:
            check_numbers("bandwidths", bandwidths, above=0)
        self.bandwidths = None if bandwidths is None else tuple(bandwidths)

    def measure(self, real: Tensor, generated: Tensor) -> float:
        """MMD^2."""
        return mmd_rbf(generated, real, self.bandwidths)
