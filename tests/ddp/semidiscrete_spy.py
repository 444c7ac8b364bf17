"""A semidiscrete pairing that writes down what it gave; the YAML of these tests names it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from flowbench.families import SemidiscretePairing


class SpyPairing(SemidiscretePairing):
    """Keeps pairs and potential of every training step in the folder that the environment names."""

    def pairs(self, context, x1, label, batch, rng):
        found = super().pairs(context, x1, label, batch, rng)
        folder = os.environ.get("FLOWBENCH_TEST_PAIRS")
        if folder and batch.position is not None and self._solved is not None:
            step = batch.position // self._data.batch_size
            kept = (found.x0, found.x1, self._solved.potentials[0].potential)
            torch.save(kept, Path(folder) / f"pairs-{step}-{context.rank}.pt")
        return found
