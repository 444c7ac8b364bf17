"""A pairing that writes down what it gave; the YAML of these tests names it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from flowbench.families.pairing.stream import StreamPairing


class SpyPairing(StreamPairing):
    """Keeps the pairs of every training step in the folder that the environment names, a file for each process."""

    def pairs(self, context, x1, label, batch, rng):
        found = super().pairs(context, x1, label, batch, rng)
        folder = os.environ.get("FLOWBENCH_TEST_PAIRS")
        if folder and batch.position is not None and self._stream is not None:
            step = batch.position // self._stream.batch_size
            torch.save((found.x0, found.x1), Path(folder) / f"pairs-{step}-{context.rank}.pt")
        return found


class FailingPairing(SpyPairing):
    """Its coupling cannot be asked on the process that solves."""

    def setup(self, context, data, training=True):
        super().setup(context, data, training)
        if context.rank == 0:
            self.coupling = _refusing


def _refusing(*_):
    raise ValueError("no pairs today: give another coupling")
