"""A flow that writes down what it says of its training pairs, on every process; the YAML of these tests names it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from flowbench.families import WeightedCFM

NUM, SEED = 300, 0  # as the evaluator of these tests asks


class SpyWeightedCFM(WeightedCFM):
    """Keeps the numbers in the folder that the environment names, a file for each process.

    The evaluator asks process 0 alone, which makes the rows.
    """

    def on_test_start(self) -> None:
        super().on_test_start()
        folder = Path(os.environ["FLOWBENCH_TEST_TRAINING_PAIRS"])
        found = self.training_pairs(self.trainer.datamodule, NUM, SEED)
        (folder / f"{self.trainer.world_size}-{self.global_rank}.json").write_text(json.dumps(found))
