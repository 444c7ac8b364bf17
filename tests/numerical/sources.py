"""Sources fitted to little data, for tests that hold for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from flowbench.core.seeds import generator
from flowbench.flows import GaussianSource, Source
from flowbench.flows.source.low_frequency import LowFrequencySource
from flowbench.flows.source.mixture import GaussianMixtureSource
from flowbench.flows.source.pruned import PrunedSource
from flowbench.flows.source.radial import NormAlignedSource, RadialSource
from flowbench.flows.source.von_mises_fisher import VonMisesFisherSource

BUILDERS = {
    "gaussian": lambda: GaussianSource(1.3),
    "norm_aligned": lambda: NormAlignedSource(),
    "radial_chi": lambda: RadialSource("chi", dof=7, scale=0.4),
    "radial_data": lambda: RadialSource("data"),
    "vmf_centroids": lambda: VonMisesFisherSource(6.0, centres=2),
    "vmf_data": lambda: VonMisesFisherSource(9.0, centres="data", dof=4, scale=0.7),
    "low_frequency": lambda: LowFrequencySource(1, noise=0.4, prior=GaussianMixtureSource(2)),
    "mixture": lambda: GaussianMixtureSource(2),
    "pruned": lambda: PrunedSource(0.5, quantile=0.25),
    "pruned_truncated": lambda: PrunedSource(0.5, quantile=0.25, method="truncated"),
    "pruned_random": lambda: PrunedSource(0.6, quantile=0.5, axes="random", source=NormAlignedSource()),
}


def data(num: int = 400, shape: tuple[int, ...] = (2,)) -> Tensor:
    """Two clusters off the origin, of different widths; every point has a norm of its own."""
    rng = generator(0, "data")
    noise = torch.randn(num, *shape, generator=rng)
    second = torch.rand(num, generator=rng) < 0.4
    centre = torch.zeros(2, *shape)
    centre.flatten(1)[0, 0], centre.flatten(1)[1, 1] = 3.0, 2.0
    return centre[second.long()] + noise * torch.where(second, 0.2, 0.5).reshape(-1, *[1] * len(shape))


def fitted(name: str, points: Tensor | None = None) -> Source:
    """A source of ``BUILDERS``, fitted."""
    source = BUILDERS[name]()
    source.fit(data() if points is None else points, generator(0, "fit"))
    return source
