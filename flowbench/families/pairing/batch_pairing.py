"""Pairs inside one batch."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from flowbench.data import Batch
from flowbench.families.pairing.base import Pairing, PairingContext, Pairs, cost_ratio, true_label
from flowbench.flows import Coupling, IndependentCoupling

__all__ = ["BatchPairing"]


class BatchPairing(Pairing):
    """Fresh noise for every batch, coupled inside this process's share of it.

    Args:
        coupling: chooses a source point for every data point; None pairs as drawn. Where the flow is conditional it is
            given the labels of the data, dropped ones too: which labels the network does without does not concern the
            pairs.

    Example:
        >>> from flowbench.data import Batch
        >>> from flowbench.flows import GaussianSource, OptimalTransportCoupling
        >>> context = PairingContext(GaussianSource(), PixelSpace((2,)), None, 0.0, seed=0, device=torch.device("cpu"))
        >>> x1 = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        >>> pairing, rng = BatchPairing(OptimalTransportCoupling()), torch.Generator().manual_seed(1)
        >>> pairs = pairing.pairs(context, x1, None, Batch(x1), rng)
        >>> pairs.x0.shape, bool(pairs.diagnostics()["cost_ratio"] < 1)  # shorter than independent pairs
        (torch.Size([64, 2]), True)
    """

    def __init__(self, coupling: Coupling | None = None) -> None:
        self.coupling: Coupling = coupling or IndependentCoupling()
        self.is_independent = isinstance(self.coupling, IndependentCoupling)

    def pairs(
        self, context: PairingContext, x1: Tensor, label: Tensor | None, batch: Batch, rng: torch.Generator
    ) -> Pairs:
        """Noise from the step's generator, then the coupling's choice among it."""
        noise = context.source.sample_for(x1, rng)
        start = time.perf_counter()
        x0 = noise[self.coupling(noise, x1, rng, true_label(label, batch))]
        seconds = time.perf_counter() - start

        def diagnostics() -> dict[str, Tensor | float]:
            own = {"coupling_ms": 1e3 * seconds, "effective_batch": float(len(x1))}
            return {**own, "cost_ratio": cost_ratio(x0, noise, x1)}

        return Pairs(x0, x1, label, diagnostics=diagnostics)

    def __repr__(self) -> str:
        return f"BatchPairing({self.coupling!r})"
