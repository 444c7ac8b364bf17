"""With what probes are asked, without a trainer."""

from __future__ import annotations

from flowbench.data import FlowDataModule
from flowbench.evaluation import Setup
from flowbench.evaluation.samples import RealSet


def setup_of(module, data: FlowDataModule, *, reference: str = "train", held_out: str = "test", **options) -> Setup:
    sides = {"reference": RealSet(data, reference), "held_out": RealSet(data, held_out)}
    return Setup(**{"module": module, "data": data, "extractors": {}, **sides, **options})
