"""Classes that the YAML of these tests names."""

from __future__ import annotations

import os

from flowbench.families import Loss, TARFlow


class PoisonedTARFlow(TARFlow):
    """Its loss is NaN at step 2 on process 1 alone, while the environment says so."""

    def flow_loss(self, x, label, rng):
        loss = super().flow_loss(x, label, rng)
        poisoned = "FLOWBENCH_TEST_POISON" in os.environ and self._trainer is not None
        if poisoned and self.trainer.global_step == 2 and self.global_rank == 1:
            return Loss(loss.total * float("nan"))
        return loss
