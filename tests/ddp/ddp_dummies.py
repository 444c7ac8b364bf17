"""Classes that the YAML of these tests names."""

from __future__ import annotations

from flowbench.families import Loss, TARFlow


class PoisonedTARFlow(TARFlow):
    """Its loss is NaN at step 2 on process 1 alone."""

    def flow_loss(self, x, label, rng):
        loss = super().flow_loss(x, label, rng)
        fitting = self._trainer is not None
        if fitting and self.trainer.global_step == 2 and self.global_rank == 1:
            return Loss(loss.total * float("nan"))
        return loss
