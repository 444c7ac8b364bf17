"""The rows that no contender owns: held-out data, noise, and two classical densities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from flowbench.core.seeds import generator, indexed_normal
from flowbench.data import DataSpec, FlowDataModule
from flowbench.evaluation.probe import Probe, Setup
from flowbench.evaluation.reference import Reference
from flowbench.evaluation.samples import CHUNK, RealSet
from flowbench.evaluation.sampling import Generated, Samples
from flowbench.tasks.generation.likelihood import Densities, LogDensities
from flowbench.tasks.generation.mixture import (
    MIXTURE_POINTS,
    MIXTURE_SIZES,
    MixtureSampler,
    affordable,
    fit_mixture,
)

__all__ = ["Floor", "Gaussian", "Mixture", "Noise"]

A = TypeVar("A")

# Above it, 64x64 pixels in colour, a covariance takes gigabytes several times over, and its root many minutes.
MOST_DIMENSIONS = 12_288


class Floor(Reference):
    """Held-out data, scored as if they were generated: what a perfect model of the data would have."""

    has_labels = True
    is_free = True

    def answer(self, probe: Probe[A], setup: Setup) -> A | None:
        """Its samples."""
        if not isinstance(probe, Samples):
            return None
        return cast(A, Generated(RealSet(setup.data, setup.held_out.name, setup.num_samples)))


class Noise(Reference):
    """Standard normal noise: what an untrained model has."""

    def answer(self, probe: Probe[A], setup: Setup) -> A | None:
        """Its samples."""
        if not isinstance(probe, Samples):
            return None
        shape, seed = setup.data.spec.shape, setup.seed
        return cast(A, _generated(probe, setup, lambda index: indexed_normal(index, shape, seed, "sample")))


class Gaussian(Reference):
    """The Gaussian of full covariance with the best validation likelihood: samples and log-densities."""

    has_density = True
    sizes: Sequence[int] = (1,)
    name = "gaussian"

    def left_out(self, spec: DataSpec) -> str:
        """Data of more dimensions than a covariance has room for."""
        if spec.num_dims <= MOST_DIMENSIONS:
            return ""
        size = f"{spec.num_dims:,} dimensions takes {8 * spec.num_dims**2 / 2**30:,.0f} GiB"
        return f"a covariance of {size}; smaller images have these rows (data.image_size)"

    def answer(self, probe: Probe[A], setup: Setup) -> A | None:
        """Its samples and its log-densities of the test split."""
        if isinstance(probe, LogDensities):
            test = _points(setup.data, "test", setup.num_likelihood)
            log_prob = torch.from_numpy(self._fitted(setup).score_samples(test))
            return cast(A, Densities(log_prob, dequantize=setup.data.dequantize))
        if not isinstance(probe, Samples):
            return None
        sampler = MixtureSampler(self._fitted(setup), setup.num_samples, generator(setup.seed, self.name))
        shape = setup.data.spec.shape
        return cast(A, _generated(probe, setup, lambda index: sampler.draw(index).reshape(-1, *shape).float()))

    def _fitted(self, setup: Setup) -> GaussianMixture:
        """Large images can afford a single component: their mixture is the Gaussian, which is fitted once."""
        data = setup.data
        train, val = (_points(data, split, MIXTURE_POINTS) for split in ("train", "val"))
        key, fits = (affordable(self.sizes, train), setup.seed), _FITS.setdefault(data, {})
        if key not in fits:
            fits[key] = fit_mixture(train, val, key[0], setup.seed)
        return fits[key]


class Mixture(Gaussian):
    """The mixture of up to 40 Gaussians of full covariance with the best validation likelihood."""

    sizes = MIXTURE_SIZES
    name = "gmm"


_FITS: WeakKeyDictionary[FlowDataModule, dict[Any, GaussianMixture]] = WeakKeyDictionary()


def _generated(probe: Samples, setup: Setup, draw: Callable[[Tensor], Tensor]) -> Generated:
    collector = probe.collector(setup)
    for index in torch.arange(setup.num_samples).split(CHUNK):
        collector.add(index, draw(index))
    return Generated(collector.gathered("generated"))


def _points(data: FlowDataModule, split: str, most: int | None) -> np.ndarray:
    return data.model_values(split, slice(most)).flatten(1).double().numpy()
